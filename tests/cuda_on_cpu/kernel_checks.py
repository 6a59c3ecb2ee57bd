"""What can be known of the CUDA kernels beyond their results: races, launches, the same bits in any order.

    pytest tests/cuda_on_cpu/kernel_checks.py --cuda-on-cpu checked

In this build a race, an access outside a buffer and a read of what nobody wrote make an op raise.
"""

import pytest
import torch
from cuda_on_cpu import emulated
from cuda_on_cpu.cases import ALL, EACH, ONE, SIXTEEN, TEN, TWO, by_strategy, on_a_small_gpu, train
from helpers import DTYPES, LAYOUTS, by_dtypes, by_layout, channel_arguments, check, in_layout, values
from torch import Tensor

import bnext

SCHEDULES = [("fwd", 0), ("rev", 0), ("rand", 1), ("warp", 2)]

# Planes and rows that are whole packs of 16 bytes and that are not; splits and slabs of several blocks; the degenerate.
SHAPES = [
    (4, 8, 8, 8),
    (5, 16, 7, 7),
    (3, 5, 13, 11),
    (2, 9, 28, 28),
    (1, 2, 51, 50),
    (2, 1, 40, 41),
    (300, 24),
    (37, 3),
    (2, 21, 3),
    (2, 134),
    (1, 1, 2, 1),
]

# Slabs that several blocks have: strategy, GPU, shape, layout.
SHARED = [
    *((strategy, {}, shape, layout) for strategy in ("cluster", "grid") for layout in LAYOUTS for shape in (
        (48, 8, 7, 7),  # contiguous: slabs of several planes
        (8, 3, 31, 33),  # packs that reach into other planes, rows of single elements
        (6, 2, 40, 40),
    )),
    ("cluster", SIXTEEN, (5, 1, 80, 80), "contiguous"),
    ("cluster", SIXTEEN, (7, 32, 20, 20), "channels_last"),
    ("cluster", TWO, (8, 5, 31, 33), "contiguous"),
    ("grid", TEN, (16, 7, 40, 40), "contiguous"),
    ("retained", ONE, (32, 2, 40, 40), "contiguous"),
    ("retained", ONE, (120, 8, 7, 7), "contiguous"),
    ("retained", ONE, (32, 2, 40, 40), "channels_last"),
    ("retained", ONE, (8, 8, 40, 40), "channels_last"),
]  # fmt: skip

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_shared = pytest.mark.parametrize(("strategy", "gpu", "shape", "layout"), SHARED)

_gpu = pytest.fixture(autouse=True)(on_a_small_gpu)


def everything(x: Tensor, dy: Tensor, arguments: dict[str, Tensor]) -> list[Tensor | None]:
    """The results of each op, in training and in evaluation, of all gradients and of some."""
    found: list[Tensor | None] = [*train(x, arguments), *train(x, arguments, None)]
    weight, bias, mean, var = arguments.values()
    batch, running = found[1:3], bnext.ops.batch_norm_eval(x, weight, bias, mean, var, 1e-5)
    found += running
    for mask in (ALL, [True, False, False], [False, True, True], [False, False, False]):
        for training, saved in ((True, batch), (False, running[1:])):
            found += bnext.ops.batch_norm_backward(dy, x, weight, *saved, training, mask)
    return found


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((s is None and t is None) or torch.equal(s, t) for s, t in zip(a, b, strict=True))


@by_shape
@by_dtypes
@by_layout
@by_strategy
def test_every_order_gives_the_same_bits(shape, dtypes, layout, strategy):
    """Clean of races, of accesses out of bounds and of reads of nothing, whatever thread and block runs first."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    x, dy = (values(shape, dtypes[0], layout) for _ in range(2))
    arguments = channel_arguments(shape[1], dtypes[1])
    found = []
    for schedule, seed in SCHEDULES:
        emulated.module.configure(schedule, seed, True)
        found.append(everything(x, dy, arguments))
    assert all(equal(found[0], other) for other in found[1:])


@by_shared
@by_dtypes
def test_every_order_gives_the_same_bits_of_shared_slabs(strategy, gpu, shape, layout, dtypes):
    assert emulated.module is not None
    emulated.reset(**gpu)
    emulated.module.force(strategy)
    x, dy = (values(shape, dtypes[0], layout) for _ in range(2))
    arguments = channel_arguments(shape[1], dtypes[1])
    found = []
    for schedule, seed in SCHEDULES:
        emulated.module.configure(schedule, seed, True)
        *results, counter = train(x, arguments)
        assert emulated.module.planned()["strategy"] == strategy
        assert counter == 5
        results += bnext.ops.batch_norm_backward(dy, x, arguments["weight"], *results[1:3], True, ALL)
        assert emulated.module.planned()["strategy"] == strategy
        found.append(results)
    assert all(equal(found[0], other) for other in found[1:])


@by_shared
@by_dtypes
def test_results_of_shared_slabs(strategy, gpu, shape, layout, dtypes):
    assert emulated.module is not None
    emulated.reset(**gpu)
    emulated.module.force(strategy)
    x, dy = (values(shape, dtypes[0], layout) for _ in range(2))
    check(x, grad_output=dy, **channel_arguments(shape[1], dtypes[1]))


@by_shape
@by_dtypes
@by_layout
@by_strategy
def test_results(shape, dtypes, layout, strategy):
    assert emulated.module is not None
    emulated.module.force(strategy)
    x, dy = (values(shape, dtypes[0], layout) for _ in range(2))
    arguments = channel_arguments(shape[1], dtypes[1])
    check(x, grad_output=dy, **arguments)
    check(x, grad_output=dy, training=False, **arguments)


@by_layout
@by_strategy
def test_large_means(layout, strategy):
    """The variance of values whose spread is ten times their rounding."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    x = in_layout((torch.randn(8, 6, 20, 20, dtype=torch.float64) * 1e-2 + 1e4).float(), layout)
    var = train(x, channel_arguments(6, torch.float32), momentum=1.0)[4]
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@by_layout
@pytest.mark.parametrize("strategy", EACH)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("cooperative", [True, False], ids=["cooperative", "not"])
def test_launches(layout, strategy, momentum, cooperative):
    """One for a forward and one for its backward wherever launches may be cooperative."""
    assert emulated.module is not None
    emulated.reset(**SIXTEEN, cooperative=cooperative)
    emulated.module.force(strategy)
    x = values(EACH[strategy], torch.float32, layout)
    arguments = channel_arguments(x.shape[1], torch.float32)
    before = emulated.module.launches()
    *saved, mean, _, counter = train(x, arguments, momentum)
    planned = emulated.module.planned()
    # Clusters do not wait for the counter; nothing but a cooperative launch does.
    possible = {"cluster": bool(momentum), "grid": cooperative, "block": cooperative or bool(momentum)}
    assert (planned["strategy"] == strategy) == possible.get(strategy, True)
    barrier = planned["strategy"] in ("streaming", "grid") or momentum is None
    assert planned["cooperative"] == (barrier and cooperative)
    assert emulated.module.launches() - before == (1 if cooperative or not barrier else 2)
    assert counter == 5
    factor = 0.1 if momentum else 0.2
    expected = arguments["running_mean"] * (1 - factor) + x.double().mean((0, 2, 3)) * factor
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    before = emulated.module.launches()
    bnext.ops.batch_norm_backward(x, x, arguments["weight"], *saved[1:], True, ALL)
    streams = emulated.module.planned()["strategy"] == "streaming"
    assert emulated.module.launches() - before == (2 if streams and not cooperative else 1)


@by_layout
@pytest.mark.parametrize("strategy", EACH)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_a_skipped_channel_is_counted_once(layout, strategy, momentum):
    assert emulated.module is not None
    emulated.reset(**SIXTEEN)
    emulated.module.force(strategy)
    x = values(EACH[strategy], torch.float32, layout)
    arguments, channels = channel_arguments(x.shape[1], torch.float32), x.shape[1]
    x[2, 3, 5, 7] = torch.nan
    skipped, before = torch.zeros(channels, dtype=torch.int64), emulated.module.launches()
    found = []
    for schedule, seed in SCHEDULES:
        emulated.module.configure(schedule, seed, True)
        found.append(list(train(x, arguments, momentum, skipped)[3:]))
    assert emulated.module.launches() - before == len(SCHEDULES)
    assert skipped.tolist() == [len(SCHEDULES) * (c == 3) for c in range(channels)]
    assert all(equal(found[0], other) for other in found[1:])
    assert found[0][0][3] == arguments["running_mean"][3]
    assert found[0][1][3] == arguments["running_var"][3]


@by_layout
@by_dtypes
def test_two_launches_give_the_bits_of_one(layout, dtypes):
    assert emulated.module is not None
    emulated.module.force("streaming")
    shape = (3, 24, 9, 10)
    x, dy = (values(shape, dtypes[0], layout) for _ in range(2))
    arguments = channel_arguments(shape[1], dtypes[1])
    one = everything(x, dy, arguments)
    emulated.reset(cooperative=False)
    emulated.module.force("streaming")
    assert equal(one, everything(x, dy, arguments))


def test_a_grid_that_cannot_be_resident_falls_back():
    """As under MPS: the launch itself says that the device has fewer multiprocessors to give than it has."""
    assert emulated.module is not None
    emulated.module.force("streaming")
    x, arguments = values((64, 16, 28, 28), torch.float32), channel_arguments(16, torch.float32)
    one = train(x, arguments, None)
    emulated.module.take_multiprocessors(1)
    before = emulated.module.launches()
    assert equal(list(one), list(train(x, arguments, None)))
    assert emulated.module.planned()["launches"] == 2
    assert emulated.module.launches() - before == 3  # the refused one is counted


@by_layout
@pytest.mark.parametrize("strategy", ["cluster", "grid"])
def test_blocks_that_cannot_be_together_fall_back(strategy, layout):
    """As above; and where clusters are smaller than the device has said."""
    assert emulated.module is not None
    emulated.reset(**SIXTEEN)
    emulated.module.force(strategy)
    x, arguments = values((16, 8, 16, 32), torch.float32, layout), channel_arguments(8, torch.float32)
    expected = train(x, arguments)
    assert emulated.module.planned()["strategy"] == strategy
    emulated.module.take_multiprocessors(1), emulated.module.take_clusters(1)
    found = train(x, arguments)
    assert emulated.module.planned()["strategy"] in ("streaming", "block")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtypes", DTYPES)
@by_strategy
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_that_start_anywhere(dtypes, layout, strategy):
    """A view one element into its storage: no access may be 16 bytes wide."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    shape = (4, 8, 5, 8)
    whole = values(shape, dtypes[0], layout)
    x, dy = (torch.empty(whole.numel() + 1, dtype=dtypes[0])[1:].as_strided(shape, whole.stride()) for _ in range(2))
    x.copy_(whole), dy.copy_(values(shape, dtypes[0], layout))
    arguments = channel_arguments(8, dtypes[1])
    before = x.clone(memory_format=torch.preserve_format)
    check(x, grad_output=dy, **arguments)
    assert torch.equal(x, before)
    assert emulated.module.traffic()["input"]["reads"][4] == 0


@by_layout
@by_strategy
def test_many_images(layout, strategy):
    """N above 65535, which is all that a grid has in its second dimension."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    emulated.module.configure("fwd", 0, False)  # results only: shadow memory of so much is slow
    x = in_layout(values((70001, 3), torch.float32), layout)
    check(x, grad_output=values((70001, 3), torch.float32), **channel_arguments(3, torch.float32))


def test_bad_states_are_sentences():
    assert emulated.module is not None
    for code, sentence in {
        209: "bnext was built without code for this GPU",  # cudaErrorNoKernelImageForDevice
        98: "bnext was built without code for this GPU",  # cudaErrorInvalidDeviceFunction
        35: "newer CUDA than this machine's NVIDIA driver supports",  # cudaErrorInsufficientDriver
        700: "an earlier kernel of any library failed",
    }.items():
        message = emulated.module.explain(code)
        assert sentence in message
        assert "the runtime's words" in message
