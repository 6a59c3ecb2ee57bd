"""batch_norm_act: the numbers of BN, residual and activation in one, against torch's composition and the oracle."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    OUTPUTS,
    Recorder,
    assert_accurate,
    assert_strides,
    by_layout,
    by_mode,
    channel_arguments,
    exact,
    in_layout,
    run,
    values,
)

import bnext
from bnext import activation, ops, reference

pytestmark = [
    pytest.mark.bnext("batch_norm_act is bnext's own"),
]

ACTS = ["identity", "relu", "relu6", ("leaky_relu", 0.1), "silu", "hardswish"]
KINKS = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0], "hardswish": [-3, 3]}  # where a derivative jumps
SHAPES = [(7, 5), (3, 5, 7, 11), (2, 7, 3, 5, 3), (8, 40, 7, 7), (2, 16, 8, 6)]
LARGE = [(8, 64, 14, 14), (2, 3, 64, 67), (40000, 3), (20, 901, 2, 2), (3, 4099)]

by_act = pytest.mark.parametrize("act", ACTS, ids=lambda act: act if isinstance(act, str) else act[0])
by_residual = pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
by_dtypes = pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=["float32", "float64", "bfloat16-float32", "float16"],
)


def composed(input, *buffers, residual=None, act="relu", **arguments):
    """torch's own composition."""
    z = F.batch_norm(input, *buffers, **arguments)
    return reference.activate(z if residual is None else z + residual, *activation.parse(act))


def found(function, input, residual, act, **arguments):
    """Everything it gives, by the names in OUTPUTS, and grad_residual."""
    leaf = None if residual is None else residual.detach().requires_grad_()
    results = run(lambda *a, **k: function(*a, residual=leaf, act=act, **k), input, **arguments)
    return results | {"grad_residual": None if leaf is None else leaf.grad}


def oracle(input, residual, act, **arguments):
    """The same in float64, the terms' sizes, and the argument of the activation."""
    name, slope = activation.parse(act)
    dy = reference.oracle(arguments.pop("grad_output"))
    z = exact(input, **arguments)[0]["output"]
    z = z if residual is None else z + reference.oracle(residual)
    dz = reference.activate_backward(dy, z, name, slope)
    results, sizes = exact(input, **arguments, grad_output=dz)
    after = {"output": reference.activate(z, name, slope), "grad_residual": None if residual is None else dz}
    return results | after, sizes, z


def compare(shape, dtypes, layout, act, adds, training, dy_scale=1.0):
    x = values(shape, dtypes[0], layout)
    residual = values(shape, dtypes[0], layout) if adds else None
    arguments = {**channel_arguments(shape[1], dtypes[1]), "training": training}
    dy = in_layout((dy_scale * torch.randn(shape)).to(dtypes[0]), layout)
    z = oracle(x, residual, act, **arguments, grad_output=dy)[2]
    for kink in KINKS.get(activation.parse(act)[0], []):  # on which side of one an element is, is a matter of rounding
        dy.masked_fill_((z - kink).abs() < (2**-4 if dtypes[0].itemsize == 2 else 1e-3), 0)
    arguments["grad_output"] = dy
    expected, sizes, _ = oracle(x, residual, act, **arguments)
    with Recorder() as recorder:
        ours = found(bnext.batch_norm_act, x, residual, act, **arguments)
    assert recorder.torch == []
    theirs = found(composed, x, residual, act, **arguments)
    for name in (*OUTPUTS, "grad_residual"):
        assert (ours[name] is None) == (theirs[name] is None), name
        if ours[name] is not None:
            assert_strides(name, ours[name], theirs[name], x)
            assert_accurate(name, ours[name], theirs[name], expected[name], sizes.get(name, 0.0))


@by_mode
@by_residual
@by_layout
@by_dtypes
@by_act
def test_against_torch_and_the_oracle(act, dtypes, layout, adds, training):
    for shape in SHAPES:
        compare(shape, dtypes, layout, act, adds, training)


@by_residual
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, dtype, layout, adds):
    compare(shape, (dtype, torch.float32), layout, "relu", adds, True)


@by_residual
@by_layout
def test_denormal_gradients_in_bfloat16(layout, adds):
    """Its dot products take them for 0."""
    compare((8, 40, 14, 14), (torch.bfloat16, torch.float32), layout, "relu", adds, True, dy_scale=1e-39)


@pytest.mark.only("cpu", "CUDA kernels have statistics in float32")
@by_residual
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_of_many_deviations(dtype, layout, adds):
    """With gradients of all sizes whose sum is 0, all of which pass: sum(dz * x) - mean * sum(dz) would lose digits."""
    x = in_layout((torch.randn(8, 9, 14, 14, dtype=torch.float64) + 100).to(dtype), layout)
    half = torch.randn(2, 4, 9, 14, 14, dtype=torch.float64)
    half = (half[0] * (2 * half[1]).exp()).to(dtype)
    arguments = {"weight": torch.ones(9), "bias": torch.full((9,), 8.0), "training": True}
    arguments["grad_output"] = in_layout(torch.cat([half, -half]), layout)
    residual = torch.zeros_like(x) if adds else None
    expected, sizes, z = oracle(x, residual, "relu", **arguments)
    assert z.min() > 0
    ours, theirs = (found(f, x, residual, "relu", **arguments) for f in (bnext.batch_norm_act, composed))
    for name in ("grad_input", "grad_weight"):
        assert_accurate(name, ours[name], theirs[name], expected[name], sizes.get(name, 0.0))


SPECIAL = [0.0, -0.0, torch.nan, 6.0, -6.0, 3.0, -3.0, 1e-30, -1e-30, torch.inf, -torch.inf]


@by_residual
@by_layout
@by_act
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_exact_where_activations_break(act, dtype, layout, adds):
    """z of 0, -0, NaN and infinity, at a kink and beside it: torch's bits.

    But for the gradient of NaN by relu6 and hardswish, where torch's vectors give 0 and NaN, and its scalars pass the
    gradient on, as bnext does.
    """
    z = in_layout(torch.tensor(SPECIAL, dtype=dtype).repeat(3, 7, 5, 1), layout)
    zeros, minus = torch.zeros(7, dtype=dtype), torch.full((7,), -0.0, dtype=dtype)
    x, residual = (torch.full_like(z, -0.0), z) if adds else (z, None)
    arguments = {"running_mean": zeros, "running_var": zeros + 1, "bias": minus, "eps": 0.0, "training": False}
    arguments |= {"weight": zeros + 1, "grad_output": torch.full_like(z, 2.0)}
    ours, theirs = (found(f, x, residual, act, **arguments) for f in (bnext.batch_norm_act, composed))
    for name in ("output", "grad_input", *["grad_residual"] * adds):
        mine, expected = ours[name], theirs[name]
        if name != "output" and act in ("relu6", "hardswish"):
            expected = expected.where(~z.isnan(), 2.0)
        if act in ("silu", "hardswish"):
            torch.testing.assert_close(mine, expected, equal_nan=True)
        else:
            assert torch.equal(mine.nan_to_num(7.0), expected.nan_to_num(7.0)), name
        assert torch.equal(mine.signbit()[~mine.isnan()], expected.signbit()[~mine.isnan()]), name


@by_act
@by_layout
def test_silu_and_the_others_far_out(layout, act):
    """Nothing overflows that torch's keeps: e^-z of large numbers."""
    z = in_layout(torch.linspace(-120, 120, 3 * 7 * 5 * 11).reshape(3, 7, 5, 11), layout)
    buffers = torch.zeros(7), torch.ones(7)
    ours, theirs = (f(z, *buffers, eps=0.0, act=act) for f in (bnext.batch_norm_act, composed))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-35)


def memory_order(t):
    return t.as_strided((t.numel(),), (1,))


@by_mode
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5, 3, 3), (3, 40, 7, 7), (9, 9, 2049), (8, 64, 14, 14)], ids=str)
def test_mask(shape, dtype, layout, training):
    """Bit j of byte i is whether the gradient passes element 8 i + j in order of memory, whatever the threads."""
    x, residual = values(shape, dtype, layout), values(shape, dtype, layout)
    a = channel_arguments(shape[1], dtype)
    rest = (residual, "relu6", 0.0, True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if training:
            y, *_, mask = ops.batch_norm_act_train(x, a["weight"], a["bias"], None, None, None, 0.1, 1e-5, *rest)
        else:
            y, *_, mask = ops.batch_norm_act_eval(x, *a.values(), 1e-5, *rest)
        flat = memory_order(y) if layout == "contiguous" or len(shape) == 4 else memory_order(y.contiguous())
        bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: x.numel()].bool()
        inside = (flat > 0) & (flat < 6)
        assert torch.equal(bits | (flat == 0) | (flat == 6), inside | (flat == 0) | (flat == 6))
        assert mask.numel() == (x.numel() + 7) // 8


@by_residual
@by_layout
@by_act
def test_same_bits_by_any_number_of_threads(act, layout, adds):
    for shape in ((8, 64, 14, 14), (6, 17, 33, 37)):
        x, residual, dy = (values(shape, torch.float32, layout) for _ in range(3))
        arguments = {**channel_arguments(shape[1], torch.float32), "grad_output": dy}
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(found(bnext.batch_norm_act, x, residual if adds else None, act, **arguments))
        for name, first in results[0].items():
            assert all(first is None or torch.equal(first, other[name]) for other in results[1:]), name


def test_the_masks_of_reduction_and_result_agree():
    """What grad_bias sums is what grad_input has, where rounding decides on which side of 0 an element is."""
    x = torch.randint(-3, 4, (64, 3, 3, 5)).float()
    bias = (torch.randint(-8, 9, (3,)) / 8).requires_grad_()
    weight, mean, var = torch.full((3,), 1 / 3), torch.rand(3), torch.rand(3) + 0.5
    for dtype in (torch.float32, torch.bfloat16):
        z = x.to(dtype).requires_grad_()
        y = bnext.batch_norm_act(z, mean, var, weight, bias, act="relu")
        dx, dbias = torch.autograd.grad(y, (z, bias), torch.ones_like(y))
        assert torch.equal(dbias, (dx != 0).sum((0, 2, 3)).float())
