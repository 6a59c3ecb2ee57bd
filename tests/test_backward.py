"""Gradients of input, weight and bias against torch and the float64 oracle."""

import itertools
import math

import pytest
import subject
import torch
import torch.nn.functional as F
from helpers import (
    ALL,
    LARGE,
    OUTPUTS,
    SMALL,
    bnext_ops,
    by_dtype,
    by_layout,
    by_mode,
    by_wide_dtype,
    channel_arguments,
    check,
    exact,
    float_id,
    in_layout,
    layers,
    nonfinite_alike,
    run,
    torch_ops,
    values,
)

import bnext

SHAPE = (3, 5, 7, 9)


def problem(shape, dtype, layout="contiguous"):
    """input, and the keyword arguments of a backward through it."""
    arguments = channel_arguments(shape[1], dtype)
    arguments["grad_output"] = in_layout(torch.randn(shape, dtype=dtype) + 0.3, layout)
    return values(shape, dtype, layout), arguments


@by_mode
@by_layout
@by_dtype
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_shapes(shape, dtype, layout, training):
    x, arguments = problem(shape, dtype, layout)
    check(x, training=training, **arguments)


@by_mode
@by_layout
@by_dtype
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)], ids=str)
def test_affine(given, dtype, layout, training):
    x, arguments = problem(SHAPE, dtype, layout)
    for name in {"weight", "bias"} - set(given):
        del arguments[name]
    check(x, training=training, **arguments)


@by_mode
@by_layout
@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 64, 67)], ids=str)
@pytest.mark.parametrize("requires", list(itertools.product([True, False], repeat=3)), ids=str)
def test_requires_grad(requires, shape, layout, training):
    x, arguments = problem(shape, torch.float32, layout)
    check(x, training=training, requires=requires, **arguments)


@by_mode
def test_weight_wanted_but_absent(training):
    x, arguments = problem(SHAPE, torch.float32)
    del arguments["weight"]
    check(x, training=training, requires=(False, True, True), **arguments)


@pytest.mark.bnext("torch takes such parameters, and fails in the backward")
@by_mode
def test_parameters_of_two_dimensions(training):
    x, arguments = problem(SHAPE, torch.float32)
    flat = run(subject.batch_norm, x, training=training, **arguments)
    for name in ("weight", "bias"):
        arguments[name] = arguments[name][None]
        flat[f"grad_{name}"] = flat[f"grad_{name}"][None]
    found = run(subject.batch_norm, x, training=training, **arguments)
    assert all(torch.equal(found[name], flat[name]) for name in OUTPUTS)


UPSTREAM = {
    "expanded scalar": lambda shape: torch.tensor(2.5).expand(shape),
    "expanded channels": lambda shape: torch.randn(1, shape[1], 1, 1).expand(shape),
    "expanded batch": lambda shape: torch.randn(1, *shape[1:]).expand(shape),
    "sliced": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "permuted": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
    "contiguous": torch.randn,
    "channels_last": lambda shape: in_layout(torch.randn(shape), "channels_last"),
    "offset": lambda shape: torch.randn(1 + math.prod(shape))[1:].view(shape),
}


@by_mode
@by_layout
@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_strides(name, layout, training):
    x, arguments = problem(SHAPE, torch.float32, layout)
    arguments["grad_output"] = UPSTREAM[name](SHAPE)
    before = arguments["grad_output"].clone()
    check(x, training=training, **arguments)
    assert torch.equal(arguments["grad_output"], before)


INPUTS = {
    "permuted": lambda: torch.randn(9, 5, 7, 3).permute(3, 1, 2, 0),
    "sliced": lambda: torch.randn(3, 5, 7, 18)[..., ::2],
    "sliced channels": lambda: in_layout(torch.randn(3, 11, 7, 9), "channels_last")[:, 3:8],
    "expanded": lambda: torch.randn(1, 5, 7, 9).expand(SHAPE),
    "offset": lambda: torch.randn(1 + math.prod(SHAPE))[1:].view(SHAPE),
}


@by_mode
@pytest.mark.parametrize("name", INPUTS)
def test_input_strides(name, training):
    _, arguments = problem(SHAPE, torch.float32)
    check(INPUTS[name](), training=training, **arguments)


@by_mode
def test_strided_weight(training):
    x, arguments = problem(SHAPE, torch.float32)
    for name in ("weight", "bias", "running_mean", "running_var"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    check(x, training=training, **arguments)


@by_mode
@by_layout
def test_sum_backward(layout, training):
    ours, theirs = layers()
    x = values(SHAPE, torch.float32, layout)
    grads = []
    for layer, ops in ((ours, bnext_ops("train" if training else "eval", "backward")), (theirs, torch_ops())):
        leaf = x.clone().requires_grad_()
        with ops:
            layer.train(training)(leaf).sum().backward()
        grads.append((leaf.grad, layer.weight.grad, layer.bias.grad))
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


@by_mode
@by_dtype
def test_tails_of_planes(dtype, training, one_thread):
    for planes, size in [*((3, size) for size in [*range(1, 71), *range(80, 290, 16), 513]), (9, 49)]:
        x, arguments = problem((planes, 5, size), dtype)
        check(x, training=training, **arguments)


ROWS = [(rows, channels) for channels in range(1, 71) for rows in (5, 107)]
LONG_ROWS = [(rows, channels) for channels in (272, 816, *range(4095, 4100)) for rows in (3, 37)]


@by_mode
@by_dtype
@pytest.mark.parametrize("shapes", [ROWS, LONG_ROWS], ids=["few channels", "many channels"])
def test_tails_of_rows(shapes, dtype, training, one_thread):
    for shape in shapes:
        x, arguments = problem(shape, dtype)
        check(x, training=training, **arguments)


@by_layout
@pytest.mark.parametrize("mean", [0.0, 1.0, 2.0**-20], ids=str)
def test_gradients_that_are_denormals(mean, layout):
    """Of bfloat16, with gradients of the output down to the smallest: none is lost."""
    x = (torch.randn(3, 2, 7, 9) + mean).bfloat16()
    for exponent in range(-132, 2, 6):
        dy = (torch.randn(3, 2, 7, 9) * 2.0**exponent).bfloat16()
        found, expected = [], []
        for grads, batch_norm, dtype in ((found, subject.batch_norm, None), (expected, F.batch_norm, torch.float64)):
            leaf = in_layout(x.to(dtype or x.dtype), layout).requires_grad_()
            y = batch_norm(leaf, None, None, training=True, eps=2.0**-10)
            grads += torch.autograd.grad(y, leaf, in_layout(dy.to(dtype or x.dtype), layout))
        error, size = (found[0].double() - expected[0]).abs(), dy.double().abs().max()
        assert (error <= 2.0**-8 * expected[0].abs() + 2.0**-18 * size + 2.0**-134).all(), exponent


def check_each_channel(x, training, eps, **arguments):
    """Each channel by itself to four roundings, whatever torch's are. Sums have the size of four random walks."""
    with bnext_ops("train" if training else "eval", "backward"):
        ours = run(subject.batch_norm, x, training=training, eps=eps, **arguments)
    for c in range(x.shape[1]):

        def part(t, c=c):
            return t[:, c : c + 1] if t.dim() > 1 else t[c : c + 1]

        parts = {name: part(t) for name, t in arguments.items()}
        oracle, sizes = exact(part(x), training=training, eps=eps, **parts)
        plain = {name: t for name, t in parts.items() if name.startswith("running")}
        normalized, dy = exact(part(x), training=training, eps=eps, **plain)[0]["output"], parts["grad_output"].double()
        for name, terms in (("grad_weight", dy * normalized), ("grad_bias", dy)):
            sizes[name] = max(sizes.get(name, 0.0), 4 * terms.square().sum().sqrt().item())
        mean, spread = part(x).double().mean().item(), part(x).double().std().item()
        sizes["grad_input"] *= 1 + (abs(mean) / spread if spread > abs(mean) * 1e-9 else 0)  # the mean is rounded
        for name in OUTPUTS:
            if ours[name] is None or oracle[name].abs().max() > torch.finfo(ours[name].dtype).max:
                continue
            error = (part(ours[name]).double() - oracle[name]).abs().max().item()
            limits = torch.finfo(ours[name].dtype)
            rounding = limits.eps * max(oracle[name].abs().max().item(), sizes.get(name, 0.0), limits.tiny)
            assert error <= 4 * rounding, f"{name} of channel {c}: error {error:.3g}, rounding {rounding:.3g}"


# Mean and spread of a channel. Its squares may be beyond float32, or below.
SIZES = [
    *[(0, 1), (0, 1e25), (0, 1e-25), (0, 3e37), (0, 1e-33), (0, 1e-20), (0, 3e-15)],
    *[(0, 0), (3, 0), (1e25, 0), (1e-25, 0)],
    *[(100, 1), (1e25, 1e23), (1e-25, 1e-27), (1e38, 1e36)],
]


@pytest.mark.bnext("torch's own sums of float32 numbers overflow")
@pytest.mark.only("cpu", "CUDA kernels square in float32, as torch's do")
@by_layout
@by_mode
@pytest.mark.parametrize("eps", [1e-5, 1e-60])
@pytest.mark.parametrize("upstream", [1.0, 1e25, 1e-10])
@pytest.mark.parametrize("shape", [(8, 14, 14), (301,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=float_id)
def test_sizes(dtype, shape, upstream, eps, training, layout, one_thread):
    """Channels of all sizes, wherever float32 can hold the result; torch's overflow, or underflow, in some."""
    full = (shape[0], len(SIZES), *shape[1:])
    mean, spread = (
        torch.tensor(t, dtype=torch.float64).reshape(1, -1, *[1] * (len(full) - 2)) for t in zip(*SIZES, strict=True)
    )
    x = in_layout((torch.randn(full, dtype=torch.float64) * spread + mean).to(dtype), layout)
    arguments = channel_arguments(len(SIZES), torch.float64 if dtype == torch.float64 else torch.float32)
    dy = torch.randn(full, dtype=torch.float64) + 0.3
    if len(shape) == 1:
        dy = dy.abs() * (x.double() - mean).sign()  # the products' sum overflows to infinity, not to NaN
    dy = in_layout((dy * upstream).to(dtype), layout)
    arguments["grad_output"] = dy
    if training:
        del arguments["running_mean"], arguments["running_var"]
    else:
        arguments["running_mean"], arguments["running_var"] = (
            x.double().mean([i for i in range(x.dim()) if i != 1]).to(arguments["weight"].dtype),
            torch.ones(len(SIZES), dtype=arguments["weight"].dtype),
        )
    check_each_channel(x, training=training, eps=eps, **arguments)


@pytest.mark.bnext("torch's own sums of float32 numbers overflow")
@pytest.mark.only("cpu", "CUDA kernels have statistics in float32")
@by_layout
@pytest.mark.parametrize("shape", [(8, 9, 14, 14), (600, 9)], ids=str)
def test_gradients_that_overflow_before_they_cancel(shape, layout):
    """A few of them are beyond float32, all together are not, nor are their products with small deviations."""
    x, arguments = problem(shape, torch.float32, layout)
    x.detach().mul_(1e-6)
    arguments["weight"] = arguments["weight"] * 1e-3
    large = torch.full_like(arguments["grad_output"], 2e38)
    large[: shape[0] // 2].neg_()
    arguments["grad_output"] = large
    del arguments["running_mean"], arguments["running_var"]
    check_each_channel(x, training=True, eps=1e-5, **arguments)


@pytest.mark.only("cpu", "CUDA kernels have statistics in float32")
@by_layout
@by_dtype
@pytest.mark.parametrize("shape", [(8, 9, 14, 14), (600, 9)], ids=str)
@pytest.mark.parametrize("mean", [2, 9, 100])
def test_means_of_many_deviations(mean, shape, dtype, layout):
    """With gradients of all sizes whose sum is 0, where sum(dy * x) - mean * sum(dy) would lose many digits."""
    x = in_layout((torch.randn(shape, dtype=torch.float64) + mean).to(dtype), layout)
    half = torch.randn(2, shape[0] // 2, *shape[1:], dtype=torch.float64)
    half = (half[0] * (2 * half[1]).exp()).to(dtype)
    dy = in_layout(torch.cat([half, -half]), layout)
    weight = torch.ones(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    check_each_channel(x, training=True, eps=1e-5, weight=weight, bias=weight - 1, grad_output=dy)


HARD = {"mean 1e6 spread 1": (1e6, 1.0), "mean 1e4 spread 1e-2": (1e4, 1e-2), "spread 1e20": (0.0, 1e20)}


@by_layout
@by_wide_dtype
@pytest.mark.parametrize("shape", [(8, 9, 14, 14), (4, 3, 70, 70), (3000, 9)], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_numbers(name, shape, dtype, layout):
    mean, spread = HARD[name]
    if subject.cuda_kernels and dtype == torch.float32 and spread == 1e20:
        pytest.skip("CUDA kernels square in float32, as torch's do")
    _, arguments = problem(shape, dtype, layout)
    x = in_layout((torch.randn(shape, dtype=torch.float64) * spread + mean).to(dtype), layout)
    del arguments["running_mean"], arguments["running_var"]
    check(x, **arguments)


@by_layout
@by_wide_dtype
def test_constant_channels(dtype, layout):
    _, arguments = problem(SHAPE, dtype, layout)
    ours = check(in_layout(torch.full(SHAPE, 1e5, dtype=dtype), layout), **arguments)
    assert (ours["grad_weight"] == 0).all()


@by_layout
def test_large_gradient_beside_small_ones(layout):
    x, arguments = problem((8, 9, 14, 14), torch.float32, layout)
    arguments["grad_output"][0, :, 0, 0] = 1e8
    check(x, **arguments)


@by_mode
@by_layout
@pytest.mark.parametrize("where", ["input", "grad_output"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_channel(bad, where, layout, training):
    x, arguments = problem((8, 9, 14, 14), torch.float32, layout)
    (x if where == "input" else arguments["grad_output"])[2, 1, 3, 3] = bad
    ours = run(subject.batch_norm, x, training=training, **arguments)
    theirs = run(F.batch_norm, x, training=training, **arguments)
    for name in OUTPUTS[3:]:
        mine, reference = nonfinite_alike(ours[name]), nonfinite_alike(theirs[name])
        torch.testing.assert_close(
            mine, reference, equal_nan=True, rtol=1e-3, atol=1e-2, msg=lambda m, n=name: f"{n}: {m}"
        )
    others = [c for c in range(9) if c != 1]
    assert ours["grad_input"][:, others].isfinite().all()
    assert not ours["grad_weight"][1].isfinite()


@by_layout
def test_zero_upstream(layout):
    x, arguments = problem(SHAPE, torch.float32, layout)
    arguments["grad_output"].zero_()
    ours = check(x, **arguments)
    for name in OUTPUTS[3:]:
        assert (ours[name] == 0).all(), name


@by_mode
def test_gradients_accumulate(training):
    layer, _ = layers()
    layer.train(training)
    x = values(SHAPE, torch.float32).requires_grad_()
    for _ in range(2):
        layer(x).square().sum().backward()
    once = x.grad.clone() / 2
    x.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, once)


@pytest.mark.parametrize("switch", ["no_grad", "nothing requires grad"])
def test_no_graph_where_none_is_wanted(switch):
    x, arguments = problem(SHAPE, torch.float32)
    leaf = x.requires_grad_(switch == "no_grad")
    with torch.set_grad_enabled(switch != "no_grad"), bnext_ops("train"):
        y = subject.batch_norm(leaf, None, None, arguments["weight"], arguments["bias"], training=True)
    assert not y.requires_grad
    assert y.grad_fn is None


def test_bnext_function_takes_the_documented_arguments():
    x, arguments = problem(SHAPE, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, arguments["weight"], arguments["bias"])]
    counter, buffers = torch.tensor(3), [arguments["running_mean"].clone(), arguments["running_var"].clone()]
    with bnext_ops("train", "backward"):
        y = bnext.BatchNormFunction.apply(*leaves, *buffers, counter, True, None, 1e-5)
        y.backward(arguments["grad_output"])
    theirs = run(F.batch_norm, x, momentum=0.25, requires=ALL, **arguments)
    assert counter == 4
    found = (y.detach(), *buffers, *[t.grad for t in leaves])
    for mine, name in zip(found, OUTPUTS, strict=True):
        torch.testing.assert_close(mine, theirs[name])
