"""Batch norm, residual and activation in one, by the CUDA kernels: races, the same bits in any order, results, traffic.

pytest tests/cuda_on_cpu/fused_checks.py --cuda-on-cpu checked
"""

import math
from typing import Any

import pytest
import torch
from cuda_on_cpu import emulated
from cuda_on_cpu.cases import EACH, ONE, SIXTEEN, TEN, TWO, by_strategy, on_a_small_gpu
from helpers import by_layout, channel_arguments, values
from test_act import by_act, by_residual, compare
from test_act import by_dtypes as by_some_dtypes
from torch import Tensor

from bnext import ops

SCHEDULES = [("fwd", 0), ("rev", 0), ("rand", 1), ("warp", 2)]
ALL = [True, True, True, True]

# Bytes of a mask that are one thread's, two's, and four's; that planes and rows share; slabs of several planes.
SHAPES = [(4, 8, 8, 8), (5, 16, 7, 7), (4, 3, 6, 6), (3, 5, 13, 11), (37, 3), (2, 134)]
SHARED = [
    ("cluster", {}, (48, 8, 7, 7), "contiguous"),
    ("cluster", TWO, (8, 5, 31, 33), "contiguous"),
    ("cluster", SIXTEEN, (7, 16, 20, 20), "channels_last"),
    ("grid", TEN, (16, 7, 40, 40), "contiguous"),
    ("retained", ONE, (120, 8, 7, 7), "contiguous"),
    ("retained", ONE, (8, 8, 40, 40), "channels_last"),
]
# act and whether there is a residual: ReLU's own kernels, and those of any activation by mask, residual and input.
KINDS = [("relu", False), ("relu", True), ("relu6", True), ("silu", True), ("identity", True), ("hardswish", False)]

by_kind = pytest.mark.parametrize(("act", "adds"), KINDS, ids=lambda v: v if isinstance(v, str) else "")
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
by_shared = pytest.mark.parametrize(("strategy", "gpu", "shape", "layout"), SHARED)

_gpu = pytest.fixture(autouse=True)(on_a_small_gpu)


def train(x: Tensor, residual: Tensor | None, act: str, a: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Output, mean, invstd and mask of one batch."""
    return ops.batch_norm_act_train(
        x, a["weight"], a["bias"], None, None, None, 0.1, 1e-5, residual, act, 0.0, residual is not None, None
    )


def backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, act: str, a: dict[str, Tensor], saved: tuple[Tensor, ...],
    training: bool = True, wanted: list[bool] = ALL,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of input, weight, bias and residual."""
    mean, invstd, mask = saved
    needed = residual if mask is None else None
    adds = residual is not None and act != "identity"
    return ops.batch_norm_act_backward(
        dy, x, a["weight"], a["bias"], mean, invstd, needed, mask, training, act, 0.0, [*wanted[:3], wanted[3] and adds]
    )


def bits(mask: Tensor | None, count: int) -> Tensor | None:
    """Those of the elements: what follows them in the last byte is nobody's."""
    return None if mask is None else ((mask[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[:count]


SOME = [[True, False, False, False], [False, True, False, True], [False, False, False, True]]


def everything(
    x: Tensor, dy: Tensor, residual: Tensor | None, act: str, a: dict[str, Tensor], some: list[list[bool]]
) -> list[Tensor | None]:
    """The results of each op, in training and in evaluation, of all gradients and of some."""
    batch = train(x, residual, act, a)
    rest = (residual, act, 0.0, residual is not None)
    running = ops.batch_norm_act_eval(x, *a.values(), 1e-5, *rest)
    found: list[Tensor | None] = []
    for training, (output, mean, invstd, mask) in ((True, batch), (False, running)):
        found += [output, mean, invstd, bits(mask, x.numel())]
        for wanted in (ALL, *some):
            found += backward(dy, x, residual, act, a, (mean, invstd, mask), training, wanted)
    return found


def same_bits(
    x: Tensor, dy: Tensor, residual: Tensor | None, act: str, a: dict[str, Tensor], some: list[list[bool]] = SOME
) -> None:
    assert emulated.module is not None
    found = []
    for schedule, seed in SCHEDULES:
        emulated.module.configure(schedule, seed, True)
        found.append(everything(x, dy, residual, act, a, some))
    for other in found[1:]:
        assert all((s is None and t is None) or torch.equal(s, t) for s, t in zip(found[0], other, strict=True))


@by_shape
@by_dtype
@by_layout
@by_kind
@by_strategy
def test_every_order_gives_the_same_bits(strategy, act, adds, layout, dtype, shape):
    """Clean of races, of accesses out of bounds and of reads of nothing, whatever thread and block runs first."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    x, dy, residual = (values(shape, dtype, layout) for _ in range(3))
    same_bits(x, dy, residual if adds else None, act, channel_arguments(shape[1], dtype))


@by_shared
@pytest.mark.parametrize(("act", "adds"), [("relu", False), ("relu", True), ("silu", True)])
def test_every_order_gives_the_same_bits_of_shared_slabs(act, adds, strategy, gpu, shape, layout):
    assert emulated.module is not None
    emulated.reset(**gpu)
    emulated.module.force(strategy)
    x, dy, residual = (values(shape, torch.bfloat16, layout) for _ in range(3))
    same_bits(x, dy, residual if adds else None, act, channel_arguments(shape[1], torch.float32), some=[])


@by_shared
@by_kind
def test_results_of_shared_slabs(act, adds, strategy, gpu, shape, layout):
    assert emulated.module is not None
    emulated.reset(**gpu)
    emulated.module.force(strategy)
    compare(shape, (torch.bfloat16, torch.float32), layout, act, adds, True)
    assert emulated.module.planned()["strategy"] == strategy


def test_a_byte_of_the_mask_is_not_split():
    """Slots of four elements, of which a split would have an odd number."""
    assert emulated.module is not None
    emulated.reset(**TEN)
    emulated.module.force("grid")
    shape = (3, 2, 72, 72)
    compare(shape, (torch.float32, torch.float32), "contiguous", "relu", True, True)
    x, residual = (values(shape, torch.float32, "contiguous") for _ in range(2))
    output, *_, mask = train(x, residual, "relu", channel_arguments(2, torch.float32))
    assert emulated.module.planned()["splits"] == 10
    assert torch.equal(bits(mask, x.numel()).bool(), output.flatten() != 0)


@by_residual
@by_layout
@by_some_dtypes
@by_act
def test_results_of_resident_slabs(act, dtypes, layout, adds):
    assert emulated.module is not None
    emulated.module.force("block")
    for shape in ((8, 40, 7, 7), (3, 5, 7, 11)):
        compare(shape, dtypes, layout, act, adds, True)


def test_tensors_that_start_anywhere():
    """Tensors that start anywhere: bytes of a mask that are shared, and no access of 16 bytes."""
    assert emulated.module is not None
    shape = (4, 8, 5, 8)
    for layout in ("contiguous", "channels_last"):
        whole = values(shape, torch.bfloat16, layout)
        x, residual = (
            torch.empty(whole.numel() + 1, dtype=whole.dtype)[1:].as_strided(shape, whole.stride()) for _ in range(2)
        )
        x.copy_(whole), residual.copy_(values(shape, torch.bfloat16, layout))
        a = channel_arguments(8, torch.float32)
        shifted = train(x, residual, "relu", a)
        moved = emulated.module.traffic()
        assert all(moved[name]["reads"][4] == moved[name]["writes"][4] == 0 for name in ("input", "residual"))
        aligned = train(whole, residual.clone(), "relu", a)
        torch.testing.assert_close(shifted[0], aligned[0])
        assert torch.equal(shifted[3], aligned[3])


# op, act, whether a residual; tensors: times read and written, once where it is kept and as often where it is not.
TRAFFIC = [
    ("train", "relu", False, {"input": (1, 0), "output": (0, 1)}, {}),
    ("train", "relu", True, {"input": (1, 0), "output": (0, 1)}, {"residual": (1, 0), "mask": (0, 1)}),
    ("train", "silu", True, {"input": (1, 0), "output": (0, 1)}, {"residual": (1, 0)}),
    ("eval", "relu", True, {}, {"input": (1, 0), "residual": (1, 0), "output": (0, 1), "mask": (0, 1)}),
    ("backward", "relu", False, {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1)}, {}),
    (
        "backward", "relu", True,
        {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1), "grad_residual": (0, 1), "mask": (1, 0)}, {},
    ),
    (
        "backward", "silu", True,
        {"grad_output": (1, 0), "input": (1, 0), "residual": (1, 0), "grad_input": (0, 1), "grad_residual": (0, 1)}, {},
    ),
    (
        "eval backward", "relu", True, {},
        {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1), "grad_residual": (0, 1), "mask": (1, 0)},
    ),
]  # fmt: skip


def traffic(op: str, x: Tensor, residual: Tensor | None, act: str, a: dict[str, Tensor]) -> dict[str, Any]:
    """What one op moved, by buffer."""
    assert emulated.module is not None
    if op == "eval":
        ops.batch_norm_act_eval(x, *a.values(), 1e-5, residual, act, 0.0, residual is not None)
    else:
        saved = train(x, residual, act, a)[1:]
        if op != "train":
            backward(x.clone(), x, residual, act, a, saved, op == "backward")
    return emulated.module.traffic()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_layout
@pytest.mark.parametrize("strategy", EACH)
@pytest.mark.parametrize(("op", "act", "adds", "again", "once"), TRAFFIC)
def test_traffic(op, act, adds, again, once, strategy, layout, dtype):
    """Every tensor moves so often and no oftener, 16 bytes at a time; the mask with a byte, or part of one, a pack."""
    assert emulated.module is not None
    emulated.reset(**SIXTEEN)
    emulated.module.force(strategy)
    shape = EACH[strategy]
    x = values(shape, dtype, layout)
    residual = values(shape, dtype, layout) if adds else None
    found = traffic(op, x, residual, act, channel_arguments(shape[1], dtype))
    planned = emulated.module.planned()
    assert planned["strategy"] == (strategy if again else "streaming")
    times = {**once, **again}
    if strategy == "streaming":
        times |= {name: (2 * reads, writes) for name, (reads, writes) in again.items()}
    if dtype == torch.float64 and again.get("mask") == (1, 0):
        times["mask"] = (2, 0)  # by any activation's kernel, which keeps dy and not what of it passes
    elements, size = math.prod(shape), math.prod(shape) * dtype.itemsize
    sizes = {name: elements // 8 if name == "mask" else size for name in times}
    assert planned["read"] == sum(sizes[name] * reads for name, (reads, _) in times.items())
    assert planned["written"] == sum(sizes[name] * writes for name, (_, writes) in times.items())
    for name, (reads, writes) in times.items():
        moved = found[name]
        if name == "mask":
            assert moved["reads"] == [reads * size // 16, 0, 0, 0, 0]
            assert moved["writes"] == [writes * elements // 8, 0, 0, 0, 0]
        else:
            assert moved["reads"] == [0, 0, 0, 0, reads * size // 16], name
            assert moved["writes"] == [0, 0, 0, 0, writes * size // 16], name
    unused = {"input", "output", "residual", "mask", "grad_output", "grad_input", "grad_residual"} - set(times)
    assert all(found[name]["read"] == found[name]["written"] == 0 for name in unused & set(found))


@pytest.mark.parametrize("op", ["train", "backward"])
@pytest.mark.parametrize(("act", "adds"), [("relu", True), ("silu", True)])
def test_traffic_of_what_is_kept_in_part(act, adds, op):
    """What is planned is what is counted."""
    assert emulated.module is not None
    emulated.reset(**ONE)
    emulated.module.force("retained")
    x, residual = (values((32, 2, 40, 40), torch.bfloat16, "contiguous") for _ in range(2))
    found = traffic(op, x, residual, act, channel_arguments(2, torch.float32))
    planned = emulated.module.planned()
    assert planned["strategy"] == "retained"
    names = ("input", "residual", "mask", "grad_output", "output", "grad_input", "grad_residual")
    assert sum(found[name]["read"] for name in names if name in found) == planned["read"]
    assert sum(found[name]["written"] for name in names if name in found) == planned["written"]
    assert planned["read"] > (3 if op == "backward" and act == "silu" else 2) * x.numel() * 2
