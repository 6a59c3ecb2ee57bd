"""batch_norm_act in autograd and around it: derivatives, what is saved, memory, ops, compilers, transforms."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from helpers import Recorder, by_layout, by_mode, channel_arguments, torch_ops, values
from test_act import ACTS, by_act, by_residual, composed
from test_ops import opcheck
from torch.autograd import gradcheck, gradgradcheck

import bnext
from bnext import activation, ops

pytestmark = [
    pytest.mark.bnext("batch_norm_act is bnext's own"),
    pytest.mark.usefixtures("one_thread"),
]

SHAPE = (4, 5, 3, 6)
NAMES = ("input", "weight", "bias", "residual")


def leaves(adds, dtype=torch.float64, shape=SHAPE, layout="contiguous"):
    a = channel_arguments(shape[1], dtype)
    x, residual = values(shape, dtype, layout), values(shape, dtype, layout)
    return [t.requires_grad_() for t in (x, a["weight"], a["bias"], *[residual] * adds)]


def function(batch_norm_act, act, training):
    def f(x, weight, bias, residual=None):
        mean, var = torch.linspace(-1, 1, x.shape[1], dtype=weight.dtype), torch.ones_like(weight)
        return batch_norm_act(x, mean, var, weight=weight, bias=bias, training=training, residual=residual, act=act)

    return f


@by_mode
@by_residual
@by_act
def test_gradcheck_to_second_order(act, adds, training):
    f, inputs = function(bnext.batch_norm_act, act, training), leaves(adds, shape=(3, 2, 2, 2))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@by_mode
@by_residual
@by_act
def test_second_derivative_is_torchs(act, adds, training):
    inputs, found = leaves(adds), []
    for batch_norm_act in (bnext.batch_norm_act, composed):
        y = function(batch_norm_act, act, training)(*inputs)
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@by_mode
@by_act
@pytest.mark.parametrize("wanted", [("input",), ("residual",), ("weight", "bias"), NAMES], ids=str)
def test_only_what_is_asked_for_is_computed(wanted, act, training):
    expected = [n in wanted for n in NAMES]
    inputs = [t.requires_grad_(w) for t, w in zip(leaves(True, torch.float32), expected, strict=True)]
    y = function(bnext.batch_norm_act, act, training)(*inputs)
    with Recorder() as recorder:
        y.sum().backward()
    assert [t.grad is not None for t in inputs] == expected
    (name, arguments), *_ = recorder.bnext
    if act == "identity":  # the plain op; the residual's gradient is that of the output
        assert (name, list(arguments[-1])) == ("backward", expected[:3])
    else:
        assert (name, list(arguments[-1])) == ("act_backward", expected)


def test_the_gradient_of_a_residual_alone_is_that_of_the_output():
    inputs = leaves(True)
    y, dy = function(bnext.batch_norm_act, "identity", True)(*inputs), torch.randn(SHAPE, dtype=torch.float64)
    assert torch.autograd.grad(y, inputs[3], dy)[0].data_ptr() == dy.data_ptr()


def saved_bytes(f, inputs):
    saved = {}

    def note(t):
        saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        f(*inputs)
    return sum(saved.values())


@by_mode
@by_residual
@by_act
def test_saved_bytes(act, adds, training):
    """input, 4 C, and a bit an element, or the residual of a smooth activation: no more than torch, and no z."""
    inputs = leaves(adds, torch.float32, (8, 16, 12, 12))
    ours, theirs = (saved_bytes(function(f, act, training), inputs) for f in (bnext.batch_norm_act, composed))
    elements, name = inputs[0].numel(), activation.parse(act)[0]
    mask = elements // 8 if adds and name in activation.TWO_SLOPES else 0
    residual = inputs[0].nbytes if adds and name in ("silu", "hardswish") else 0
    assert ours <= inputs[0].nbytes + mask + residual + 4 * 4 * 16
    assert ours <= theirs + mask + 4 * 16  # the bias, which torch does not need in evaluation


def test_without_gradients_there_is_no_mask():
    inputs = leaves(True, torch.float32)
    with Recorder() as recorder, torch.no_grad():
        function(bnext.batch_norm_act, "relu", True)(*inputs)
    (name, arguments), *_ = recorder.bnext
    assert (name, arguments[11]) == ("act_train", False)


SCRIPT = textwrap.dedent("""
    import re, torch, bnext
    torch.set_num_threads(1)
    x = torch.ones(8, 64, 256, 256, dtype=torch.{dtype}){layout}
    layer = bnext.BatchNormAct2d(64, act="{act}")
    def in_process(name):
        return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
    def peak(call):
        open("/proc/self/clear_refs", "w").write("5")
        before = in_process("VmRSS")
        result = call()
        return (in_process("VmHWM") - before) / x.nbytes, result
    for x in (x[:, :, :8, :8], x):  # first a small one, for what is loaded at the first call
        r = torch.ones_like(x).requires_grad_() if {adds} else None
        x.requires_grad_()
        forward, y = peak(lambda: layer(x, r))
        dy, leaves = torch.ones_like(x), [t for t in (x, layer.weight, layer.bias, r) if t is not None]
        backward, _ = peak(lambda: torch.autograd.grad(y, leaves, dy))
    print(forward, backward)
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("dtype", "layout", "act", "adds"),
    [
        ("float32", "", "relu", False),
        ("bfloat16", ".to(memory_format=torch.channels_last)", "relu", True),
        ("bfloat16", "", "silu", True),
    ],
)
def test_peak_of_a_step(dtype, layout, act, adds):
    """In sizes of the input: the output and, with a residual, its mask; the gradients of input and residual."""
    script = SCRIPT.format(dtype=dtype, layout=layout, act=act, adds=adds)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    forward, backward = map(float, output.stdout.split())
    assert 0.9 < forward < 1.2
    assert 0.9 + adds < backward < 1.2 + adds


def op_arguments(act, adds, dtype, layout, shape=SHAPE, keep_mask=True):
    a = channel_arguments(shape[1], dtype)
    x, residual = values(shape, dtype, layout), values(shape, dtype, layout) if adds else None
    after = (residual, *activation.parse(act), keep_mask)
    train = (x, *a.values(), torch.tensor(3), 0.1, 1e-5, *after, torch.zeros(shape[1], dtype=torch.int64))
    return train, (x, *a.values(), 1e-5, *after)


@by_residual
@by_act
@pytest.mark.parametrize("traced", [False, True], ids=["quick", "traced"])
def test_opcheck(traced, act, adds):
    space = torch.ops.bnext
    for dtype, layout in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
        train, eval = op_arguments(act, adds, dtype, layout)
        opcheck(space.batch_norm_act_train, train, traced)
        opcheck(space.batch_norm_act_eval, eval, traced)
        y, mean, invstd, mask = ops.batch_norm_act_eval(*eval)
        assert (mask is None) == (not adds or activation.parse(act)[0] not in activation.TWO_SLOPES)
        residual = eval[6] if mask is None else None
        backward = (torch.ones_like(y), *eval[:3], mean, invstd, residual, mask, True, *eval[7:9])
        opcheck(space.batch_norm_act_backward, (*backward, [True, True, True, mask is not None]), traced)


@by_layout
def test_meta_agrees_with_the_kernels(layout):
    for act in ACTS:
        for keep_mask in (True, False):
            for arguments in op_arguments(act, True, torch.float32, layout, keep_mask=keep_mask):
                op = ops.batch_norm_act_train if len(arguments) == 13 else ops.batch_norm_act_eval
                real = op(*arguments)
                meta = op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments))
                for r, m in zip(real, meta, strict=True):
                    assert (r is None) == (m is None)
                    assert r is None or (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@by_mode
@by_residual
@pytest.mark.parametrize("act", ["relu", ("leaky_relu", 0.1), "silu"], ids=str)
def test_compiled_in_one_graph(act, adds, training):
    torch._dynamo.reset()
    layer = bnext.BatchNormAct2d(5, act=act).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, _, _, *residual = leaves(adds, torch.float32)
        found = []
        for f in (compiled, layer):
            y = f(x, *residual)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters(), *residual])))
    torch.testing.assert_close(*found)
    assert layer.num_batches_tracked == 2 * training


@by_residual
@by_act
def test_transforms_run_torchs_composition(act, adds):
    inputs = [t.detach() for t in leaves(adds)]
    ours, theirs = (function(f, act, True) for f in (bnext.batch_norm_act, composed))
    ours, theirs = ((lambda *a, f=f: f(*a).square().sum()) for f in (ours, theirs))
    with torch_ops():
        found = torch.func.grad(ours, tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(found, torch.func.grad(theirs, tuple(range(len(inputs))))(*inputs))
    with pytest.raises(RuntimeError, match="residual to have the shape of input"):
        torch.func.grad(lambda r: bnext.batch_norm_act(*inputs[:1], None, None, training=True, residual=r).sum())(
            torch.ones(4, 5, 1, 1, dtype=torch.float64)
        )


@by_residual
@by_act
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of a custom op, as torch says
def test_batched_gradients(act, adds):
    """Of a Jacobian: the backward by its formula, as torch.vmap sees through it."""
    inputs, found = leaves(adds, shape=(3, 2, 2)), []
    for batch_norm_act in (bnext.batch_norm_act, composed):
        y = function(batch_norm_act, act, True)(*inputs)
        found.append(
            torch.autograd.grad(y, inputs, torch.eye(12).reshape(12, *y.shape).double(), is_grads_batched=True)
        )
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)], ids=str)
def test_nothing(shape):
    inputs = leaves(True, torch.float32, shape)
    y = function(bnext.batch_norm_act, "relu", True)(*inputs)
    assert y.shape == shape
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert not grads[1].any()
    assert not grads[2].any()


def test_what_was_saved_may_not_change():
    for act, adds, changed in (("relu", False, 2), ("silu", True, 3), ("relu", True, 0)):
        inputs = leaves(adds)
        y = function(bnext.batch_norm_act, act, True)(*inputs)
        with torch.no_grad():
            inputs[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize(
    ("act", "mask", "message"),
    [
        ("silu", torch.zeros(45, dtype=torch.uint8), "expected no mask but for relu"),
        ("relu", torch.zeros(44, dtype=torch.uint8), "expected mask to be contiguous, with 45 uint8"),
        ("relu", torch.zeros(45), "expected mask to be contiguous, with 45 uint8"),
    ],
    ids=str,
)
def test_raw_backward_refuses(act, mask, message):
    x, weight, bias = (t.detach() for t in leaves(False, torch.float32))
    rest = (torch.zeros(5), torch.ones(5), None, mask, True, act, 0.0, [True] * 4)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.batch_norm_act_backward(x, x, weight, bias, *rest)


def test_a_relu_is_differentiated_by_its_residual_too():
    """Of the ops: the same gradients without a mask."""
    x, weight, bias, residual = (t.detach() for t in leaves(True, torch.float32))
    y, mean, invstd, mask = ops.batch_norm_act_train(
        x, weight, bias, None, None, None, 0.1, 1e-5, residual, "relu", 0.0, True
    )
    grads = [
        ops.batch_norm_act_backward(y, x, weight, bias, mean, invstd, *kept, True, "relu", 0.0, [True] * 4)
        for kept in ((None, mask), (residual, None))
    ]
    torch.testing.assert_close(*grads)


def test_the_gradient_of_a_residual_after_identity_is_refused():
    """It is that of the output: an op would copy it."""
    x = torch.randn(4, 5, 6)
    _, mean, invstd, _ = ops.batch_norm_act_train(
        x, None, None, None, None, None, 0.1, 1e-5, x, "identity", 0.0, False, None
    )
    with pytest.raises(ValueError, match=r"expected output_mask\[3\] to be False for identity"):
        ops.batch_norm_act_backward(x, x, None, None, mean, invstd, None, None, True, "identity", 0.0, [True] * 4)
