"""What the tests share: layouts, the oracle, the rule of accuracy, and the witness of which ops ran."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import subject
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from bnext import reference

DEVICE = torch.get_default_device()  # --device
WIDE = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
# Of the input, and of parameters and buffers.
DTYPES = [(d, d) for d in WIDE + HALF] + [(d, torch.float32) for d in HALF]
LAYOUTS = ["contiguous", "channels_last"]
OUTPUTS = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
ALL = (True, True, True)

Results = dict[str, Tensor | None]  # by the names in OUTPUTS

# Few elements and odd sizes.
SMALL = [
    (2, 3),  # one value a plane
    (7, 5),
    (5, 17, 3),
    (3, 5, 7, 11),
    (2, 7, 3, 5, 3),
    (1, 8, 5, 5),  # one image
    (4, 1, 9, 9),  # one channel
    (33, 1),
    (1, 1, 2, 1),
    (4, 10, 1, 1),
]
# Each crosses some boundary of the kernels: blocks, chunks, cache groups, threads.
LARGE = [
    (8, 64, 14, 14),  # as in a ResNet
    (4, 64, 28, 28),
    (16, 256, 7, 7),
    (2, 3, 64, 67),  # planes of several blocks, few channels
    (1, 1, 300, 301),
    (3, 2, 50, 40),  # planes of 2000: less than a block of 2048
    (9, 9, 2049),  # a plane one longer than a block
    (130, 9, 23, 41),  # more blocks than chunks
    (40000, 3),  # many rows
    (3, 4099),  # many channels
    (2, 1024, 16, 20),  # rows of several stretches in a block
    (20, 9001, 2, 2),
    (2, 16, 8, 17, 19),
]


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with the strides of `layout`; a shape without a channels_last format is made so by a transpose."""
    if layout == "contiguous":
        return x.contiguous()
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Seeded normal values, each channel with a mean and spread of its own."""
    broadcast = (1, -1, *[1] * (len(shape) - 2))
    mean, spread = torch.randn(shape[1], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64) + 0.5
    x = torch.randn(shape, dtype=torch.float64) * spread.reshape(broadcast) + mean.reshape(broadcast)
    return in_layout(x.to(dtype), layout)


def channel_arguments(channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """weight, bias, running_mean and running_var of a layer that has been in use."""
    return {
        "weight": torch.randn(channels, dtype=dtype) + 1,
        "bias": torch.randn(channels, dtype=dtype),
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
    }


def run(
    batch_norm: Callable[..., Tensor],
    input: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    grad_output: Tensor | None = None,
    requires: tuple[bool, bool, bool] = ALL,
) -> Results:
    """Everything a batch norm gives on copies of these arguments, by name; no gradients without grad_output."""
    wanted = [r and grad_output is not None for r in requires]
    leaves = [
        t if t is None else t.detach().requires_grad_(r) for t, r in zip((input, weight, bias), wanted, strict=True)
    ]
    buffers = [None if t is None else t.clone() for t in (running_mean, running_var)]
    output = batch_norm(leaves[0], *buffers, *leaves[1:], training=training, momentum=momentum, eps=eps)
    if output.requires_grad:
        output.backward(grad_output)
    grads = [None if t is None else t.grad for t in leaves]
    return dict(zip(OUTPUTS, (output.detach(), *buffers, *grads), strict=True))


def exact(input: Tensor, **arguments: Any) -> tuple[Results, dict[str, float]]:
    """The same by bnext.reference in float64, and the size of the terms that each result is a difference of."""
    a = {k: reference.oracle(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    x, weight, dy = reference.oracle(input), a.get("weight"), a.get("grad_output")
    training, eps = a.get("training", True), a.get("eps", 1e-5)
    running = a.get("running_mean"), a.get("running_var")
    if training:
        mean, var, invstd = reference.batch_stats(x, eps)
        if running[0] is not None:
            count = x.numel() // x.shape[1]
            running = reference.update_running(*running, mean, var, count, a.get("momentum", 0.1))
    else:
        mean, invstd = running[0], (running[1] + eps).rsqrt()
    output = reference.normalize(x, weight, a.get("bias"), mean, invstd)
    slope = invstd if weight is None else weight * invstd
    before = (a.get("running_mean"), mean)
    without_bias = reference.normalize(x, weight, None, mean, invstd)
    terms = {"output": [mean * slope, without_bias]}  # the saved mean is rounded
    if before[0] is not None and (input.dtype == torch.float64 or subject.cuda_kernels):
        terms["running_mean"] = [*before]
    if before[0] is not None and subject.cuda_kernels:
        terms["running_mean"] += [x]  # summed in the input's precision, or float32
    grads = [None] * 3
    if dy is not None:
        present = (True, weight is not None, a.get("bias") is not None)
        found = reference.backward(dy, x, weight, mean, invstd, training)
        grads = [g if p and r else None for g, p, r in zip(found, present, a.get("requires", ALL), strict=True)]
        terms["grad_weight"] = [mean * invstd * found[2]]
        terms["grad_input"] = [slope.abs() * dy.abs().max()]
        if input.dtype == torch.float64 or subject.cuda_kernels:
            # The oracle's own mean is rounded, and torch's in the same way; so are the oracle's sums.
            terms["grad_input"] += [terms["grad_input"][0] * (mean * invstd)]
            normalized = reference.normalize(x, None, None, mean, invstd)
            terms["grad_weight"] += [(dy * normalized).square().sum().sqrt()]
            terms["grad_bias"] = [dy.square().sum().sqrt()]
    sizes = {name: max(t.abs().max().item() for t in ts if t.numel()) for name, ts in terms.items() if x.numel()}
    return dict(zip(OUTPUTS, (output, *running, *grads), strict=True)), sizes


def assert_accurate(name: str, ours: Tensor, theirs: Tensor, oracle: Tensor, size: float = 0.0) -> None:
    """Our error is at most 1.5 times torch's plus one rounding of the result, or of the terms that cancel to it.

    A float64 oracle of float64 numbers rounds as they do: eight roundings. CUDA kernels have statistics in float32
    or float64: four roundings of those.
    """
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    if oracle.numel() == 0:
        return
    our_error = (ours.double() - oracle).abs().max().item()
    their_error = (theirs.double() - oracle).abs().max().item()
    rounding = torch.finfo(ours.dtype).eps * max(oracle.abs().max().item(), size)
    rounding *= 8 if ours.dtype == torch.float64 else 1
    if subject.cuda_kernels:
        rounding += 4 * rounding * min(1.0, torch.finfo(torch.float32).eps / torch.finfo(ours.dtype).eps)
    assert our_error <= 1.5 * their_error + rounding, (
        f"{name}: error {our_error:.3g}, torch's {their_error:.3g}, rounding {rounding:.3g}"
    )


def check(input: Tensor, **arguments: Any) -> Results:
    """The subject's results, checked against torch and the oracle: ops, presence, strides, accuracy."""
    training, grad_output = arguments.get("training", True), arguments.get("grad_output")
    present = (True, arguments.get("weight") is not None, arguments.get("bias") is not None)
    requires = arguments.get("requires", ALL)
    backward = grad_output is not None and any(r and p for r, p in zip(requires, present, strict=True))
    with bnext_ops("train" if training else "eval", *["backward"] * backward) as recorder:
        ours = run(subject.batch_norm, input, **arguments)
    if backward and subject.is_bnext:
        mask = list(recorder.bnext[-1][1][-1])
        assert mask == [r and p for r, p in zip(requires, present, strict=True)]  # no more is computed
    compare(ours, run(F.batch_norm, input, **arguments), input, **arguments)
    return ours


def compare(ours: Results, theirs: Results, input: Tensor, **arguments: Any) -> None:
    """Presence, strides and accuracy of every result of a batch norm with these arguments."""
    oracle, sizes = exact(input, **arguments)
    for name in OUTPUTS:
        assert (ours[name] is None) == (theirs[name] is None) == (oracle[name] is None), name
        if ours[name] is not None:
            assert_strides(name, ours[name], theirs[name], input)
            assert_accurate(name, ours[name], theirs[name], oracle[name], sizes.get(name, 0.0))


def assert_strides(name: str, ours: Tensor, theirs: Tensor, input: Tensor) -> None:
    """Those of torch's result; but torch's CUDA kernels differ in their outputs, which for bnext are as suggested.

    There, dimensions without a choice of places have any stride.
    """
    if ours.is_cpu:
        assert ours.stride() == theirs.stride(), name
    elif ours.numel() > 0:
        if name == "output" and subject.is_bnext:
            theirs = torch.empty_like(input, memory_format=suggest_memory_format(input), device="meta")
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (ours, theirs)]
        assert strides[0] == strides[1], name


def nonfinite_alike(t: Tensor) -> Tensor:
    """Infinities as NaN, for CUDA kernels: which of them a sum through infinity comes to depends on its order."""
    return t.where(t.isfinite(), torch.nan) if subject.cuda_kernels else t


class Recorder(TorchDispatchMode):
    """Notes the ops that run under it, in order: (name, arguments) of bnext's, and names of torch's batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.bnext: list[tuple[str, tuple[Any, ...]]] = []
        self.torch: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")
        if name[0] == "bnext":
            self.bnext.append((name[1].removeprefix("batch_norm_"), args))
        elif "batch_norm" in name[1]:
            self.torch.append(name[1])
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.bnext)


@contextlib.contextmanager
def bnext_ops(*expected: str) -> Iterator[Recorder]:
    """Asserts that exactly these bnext ops (train, eval, backward) run inside, and none of torch's batch norms.

    Of another batch norm under test nothing is asserted.
    """
    with Recorder() as recorder:
        yield recorder
    if not subject.is_bnext:
        return
    assert recorder.names == expected
    assert recorder.torch == []


@contextlib.contextmanager
def torch_ops() -> Iterator[Recorder]:
    """Asserts that no bnext op runs inside."""
    with Recorder() as recorder:
        yield recorder
    assert recorder.names == ()


def modules(dim: int = 2) -> tuple[type, type]:
    """The BatchNorm under test and torch's, of that many spatial dimensions."""
    return getattr(subject, f"BatchNorm{dim}d"), getattr(torch.nn, f"BatchNorm{dim}d")


def layers(channels: int = 5, dim: int = 2, **keywords: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A bnext and a torch layer with the same parameters and buffers, none of them at its initial value."""
    ours, theirs = (cls(channels, **keywords) for cls in modules(dim))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p))
        if theirs.running_mean is not None:
            theirs.running_mean.normal_()
            theirs.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def norms(model: torch.nn.Module) -> list[torch.nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def bring_into_use(ours: torch.nn.Module, theirs: torch.nn.Module, batches: list[Tensor]) -> None:
    """Both models in the state of torch's after these batches, with batch norm parameters that are not initial."""
    for x in batches:
        theirs(x)
    with torch.no_grad():
        for norm in norms(theirs):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    ours.load_state_dict(theirs.state_dict())


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Equal keys and values of the state dicts, up to the last bits."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=lambda m, key=key: f"{key}: {m}")


def float_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


by_dtype = pytest.mark.parametrize("dtype", WIDE + HALF, ids=float_id)
by_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(map(float_id, dict.fromkeys(pair))))
by_wide_dtype = pytest.mark.parametrize("dtype", WIDE, ids=float_id)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
