"""torch.compile(fullgraph=True) runs bnext's ops, with their side effects."""

import copy
import functools
import shutil
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers import DEVICE, assert_same_state, layers
from torch._dynamo.backends.common import aot_autograd
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

import bnext

pytestmark = pytest.mark.bnext("compiles bnext.ops")

inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
        pytest.mark.skipif(DEVICE.type == "cuda" and not has_triton(), reason="inductor needs triton on CUDA"),
    ],
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own, while it compiles
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="TensorFloat32")  # inductor's, where CUDA is not told to use it
        yield
    torch.compiler.set_stance("default")


class Watching:
    """A backend that notes the ops of each graph it compiles."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph, inputs):
        def note(graph, inputs):
            self.targets += [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            for n in graph.graph.nodes:  # an op that writes is wrapped once it is functional
                self.targets += [str(a) for a in n.args if isinstance(a, torch._ops.OpOverload)]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=note, bw_compiler=note)(graph, inputs)


def step(model, x, dy):
    """Output and gradients of one forward and backward."""
    x = x.detach().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.backward(dy)
    return [y.detach(), x.grad, *[p.grad for p in model.parameters()]]


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_train(backend, momentum):
    ours, theirs = layers(5, momentum=momentum)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for batch in (4, 4, 7, 9):  # from the third on, of dynamic size
        x, dy = torch.randn(2, batch, 5, 6, 7).unbind()
        for a, b in zip(step(compiled, x, dy), step(theirs, x, dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_eval(backend):
    ours, theirs = layers(5)
    compiled = torch.compile(ours.eval(), fullgraph=True, backend=backend)
    theirs.eval()
    x, dy = torch.randn(2, 4, 5, 6, 7).unbind()
    for a, b in zip(step(compiled, x, dy), step(theirs, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), theirs(x))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_all_sizes(training, momentum):
    ours, theirs = (layer.train(training) for layer in layers(5, momentum=momentum))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 5, 6, 7), (2, 5, 9, 3), (8, 5, 2, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-5)
        torch.compiler.set_stance("fail_on_recompile")
    assert_same_state(ours, theirs)


def test_channels_last():
    ours, theirs = layers(5)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, 4, 5, 6, 7).unbind())
    compiled = step(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, dy)
    for a, b in zip(compiled, step(theirs, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("training", [True, False])
def test_the_graph_holds_bnext_ops(training):
    ours, _ = layers(5)
    watching = Watching()
    compiled = torch.compile(ours.train(training), fullgraph=True, backend=watching)
    step(compiled, torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7))
    forward = "train" if training else "eval"
    assert any(f"bnext.batch_norm_{forward}" in t for t in watching.targets), watching.targets
    assert any("bnext.batch_norm_backward" in t for t in watching.targets), watching.targets
    assert not any("native_batch_norm" in t for t in watching.targets)


def test_a_converted_network():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 1),
        torch.nn.BatchNorm2d(4),
    )
    ours = bnext.convert_batchnorm(copy.deepcopy(net))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 9, 9)
    dy = torch.randn(4, 4, 7, 7)
    for a, b in zip(step(compiled, x, dy), step(net, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert_same_state(ours, net)


def test_the_function():
    def f(x, mean, var):
        return bnext.batch_norm(x, mean, var, training=True).relu()

    x, buffers = torch.randn(4, 5, 6), (torch.zeros(5), torch.ones(5))
    expected = f(x, *(b.clone() for b in buffers))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(x, *buffers)
    torch.testing.assert_close(compiled, expected)
    assert buffers[0].abs().sum() > 0


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=bnext.checkpoint_context)


def checkpointed_network():
    return torch.nn.Sequential(bnext.BatchNorm2d(5), torch.nn.Sigmoid(), bnext.BatchNorm2d(5))


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("outside", ["compile", "checkpoint"])
def test_activation_checkpointing(outside, backend):
    """Both ways round, a batch counts once."""
    ours = checkpointed_network()
    twin = copy.deepcopy(ours)
    compiler = functools.partial(torch.compile, fullgraph=True, backend=backend)
    function = compiler(checkpointed(ours)) if outside == "compile" else checkpointed(compiler(ours))
    for _ in range(2):
        x = torch.randn(4, 5, 6, 7, requires_grad=True)
        for model in (function, twin):
            model(x).square().sum().backward()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    assert_same_state(ours, twin)


def test_a_compiled_checkpoint_saves_no_activations():
    saved = []

    def note(graph, inputs):
        (outputs,) = next(n for n in graph.graph.nodes if n.op == "output").args
        saved.append([n for n in outputs if n is not None and n.meta["val"].shape == x.shape])
        return make_boxed_func(graph.forward)

    x = torch.randn(4, 5, 6, 7, requires_grad=True)
    backend = aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    for function in (checkpointed_network(), checkpointed(checkpointed_network())):
        torch.compile(function, fullgraph=True, backend=backend)(x)
    plain, checked = saved
    assert len(plain) > 2
    assert len(checked) == 2, "the output, and the input for the backward"
