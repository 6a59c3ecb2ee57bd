"""What csrc/cuda/plan.h chooses, for several GPUs, without one."""

import math
from typing import Any

import pytest

from bench.suites import SUITES, Layer
from bnext import _C

RESNET50 = SUITES["resnet50"].layers

pytestmark = [pytest.mark.bnext("about bnext's CUDA kernels"), pytest.mark.only("cpu", "needs no device")]


def gpu(multiprocessors: int, shared_kib: tuple[int, int], threads: int, l2_mib: int) -> dict[str, Any]:
    """The properties that the CUDA programming guide and the vendor's data sheets give for a GPU."""
    return {
        "multiprocessors": multiprocessors,
        "shared_per_block": shared_kib[0] * 1024,
        "shared_per_multiprocessor": shared_kib[1] * 1024,
        "threads_per_multiprocessor": threads,
        "l2": l2_mib * 2**20,
        "cooperative": True,
    }


GPUS = {
    "t4": gpu(40, (64, 64), 1024, 4),
    "a100": gpu(108, (163, 164), 2048, 40),
    "l4": gpu(58, (99, 100), 1536, 48),
    "rtx4090": gpu(128, (99, 100), 1536, 72),
    "l40s": gpu(142, (99, 100), 1536, 96),
    "h100": gpu(132, (227, 228), 2048, 50),
    "h200": gpu(132, (227, 228), 2048, 60),
    "b200": gpu(148, (227, 228), 2048, 126),
}
WHOLE_STEP = {"training": True, "reduces": True, "applies": True, "cumulative": False, "aligned": True}
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def plan(n: int, c: int, s: int, device: str = "h200", **changed: Any) -> dict[str, Any]:
    given = {"channels_last": False, "dtype": "bfloat16", "backward": False, "gpu": GPUS[device]} | WHOLE_STEP
    return _C.plan(n, c, s, **(given | changed))


def of_layer(layer: Layer, device: str = "h200", **changed: Any) -> dict[str, Any]:
    channels, height, width = layer.sizes
    return plan(256, channels, height * width, device, **changed)


by_gpu = pytest.mark.parametrize("device", GPUS)
by_direction = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
by_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
by_dtype = pytest.mark.parametrize("dtype", ITEMSIZE)


@by_gpu
@by_direction
@by_layout
@by_dtype
@pytest.mark.parametrize("cumulative", [False, True], ids=["momentum", "cumulative"])
def test_resnet50_is_one_launch(device, backward, channels_last, dtype, cumulative):
    for layer in RESNET50:
        p = of_layer(layer, device, backward=backward, channels_last=channels_last, dtype=dtype, cumulative=cumulative)
        assert p["launches"] == 1
        assert p["cooperative"] == (p["strategy"] == "streaming" or cumulative)


@by_gpu
@by_direction
@by_layout
@by_dtype
def test_blocks_are_resident_at_once(device, backward, channels_last, dtype):
    for n, c, s in [(256, c, h * w) for c, h, w in (layer.sizes for layer in RESNET50)] + [
        (1, 1, 2**33),
        (2, 3, 4097),
        (70000, 5, 1),
        (2, 100003, 1),
        (1, 2, 1),
        (64, 8, 49),
    ]:
        properties = GPUS[device]
        p = plan(n, c, s, device, backward=backward, channels_last=channels_last, dtype=dtype)
        each = -(-p["blocks"] // properties["multiprocessors"])  # blocks on the fullest multiprocessor
        assert 1 <= p["blocks"] <= p["slabs"] * p["splits"]
        assert p["shared"] <= properties["shared_per_block"]
        assert each * (p["shared"] + 1024) <= properties["shared_per_multiprocessor"]
        assert each * p["threads"] <= properties["threads_per_multiprocessor"]
        # Registers: 65536 of a multiprocessor, and at most 64 or 128 a thread by the kernels' launch bounds.
        short = not backward and (not channels_last or c == 1) and p["whole"] and dtype != "float64"
        assert each * p["threads"] * (64 if short else 128) <= 65536


@by_gpu
@by_direction
@by_layout
def test_resnet50_keeps_the_device_busy(device, backward, channels_last):
    """Every multiprocessor has work, and of the time of the fullest at least three quarters of the average."""
    for layer in RESNET50:
        p = of_layer(layer, device, backward=backward, channels_last=channels_last)
        tasks = p["slabs"] * p["splits"]
        rounds = -(-tasks // p["blocks"])
        assert p["blocks"] >= GPUS[device]["multiprocessors"]
        assert tasks / (rounds * p["blocks"]) > 0.75, (layer, p)


def test_what_fits_a_block_is_read_once():
    small = [layer for layer in RESNET50 if layer.sizes[1] <= 14]
    assert len(small) == 5
    for layer in RESNET50:
        for backward, passes in ((False, 1), (True, 2)):
            p = of_layer(layer, backward=backward)
            tensor = 256 * math.prod(layer.sizes) * 2
            expected = ("resident", passes) if layer in small else ("streaming", 2 * passes)
            assert (p["strategy"], p["read"] / tensor) == expected
            assert p["written"] == tensor


@pytest.mark.parametrize(("c", "s", "dtype", "whole"), [
    (64, 56 * 56, "bfloat16", True),
    (64, 14 * 14, "bfloat16", False),  # 24.5 packs
    (64, 14 * 14, "float32", True),
    (64, 7 * 7, "float32", False),
    (64, 2, "float64", True),
])  # fmt: skip
def test_planes_that_are_whole_packs(c, s, dtype, whole):
    assert plan(256, c, s, dtype=dtype)["whole"] is whole
    assert plan(256, c, s, dtype=dtype, aligned=False)["whole"] is False


@pytest.mark.parametrize(
    ("c", "dtype", "whole"), [(64, "bfloat16", True), (12, "bfloat16", False), (12, "float32", True)]
)
def test_rows_that_are_whole_packs(c, dtype, whole):
    assert plan(256, c, 49, dtype=dtype, channels_last=True)["whole"] is whole
    assert plan(256, c, 49, dtype=dtype, channels_last=True, aligned=False)["whole"] is False


def test_without_cooperative_launches():
    """Two launches of the streaming kernel; a resident one needs none but for a cumulative average."""
    old = {**GPUS["t4"], "cooperative": False}
    assert plan(256, 64, 56 * 56, gpu=old)["launches"] == 2
    assert plan(256, 64, 56 * 56, gpu=old)["cooperative"] is False
    small = plan(16, 640, 49, gpu=old)
    assert (small["strategy"], small["launches"], small["cooperative"]) == ("resident", 1, False)
    assert plan(16, 640, 49, gpu=old, cumulative=True)["launches"] == 2


def test_evaluation_is_one_ordinary_launch():
    forward = plan(256, 64, 56 * 56, training=False, reduces=False)
    assert (forward["launches"], forward["cooperative"], forward["scratch"]) == (1, False, 0)
    tensor = 256 * 64 * 56 * 56 * 2
    assert (forward["read"], forward["written"]) == (tensor, tensor)
    for reduces, passes in ((False, 1), (True, 2)):
        backward = plan(256, 64, 56 * 56, backward=True, training=False, reduces=reduces)
        assert (backward["read"], backward["written"]) == (passes * tensor, tensor)


def test_huge_problems_count_slots_in_32_bits():
    """A task has at most 2^30 packs, or rows."""
    for channels_last in (False, True):
        for c in (1, 2, 3):
            n = 2**36 // c
            p = plan(n, c, 1, "t4", channels_last=channels_last)
            assert -(-n // p["splits"]) <= 2**30


def test_splits_of_one_slab_fill_whole_waves():
    p = plan(256, 64, 112 * 112)
    assert (p["slabs"], p["splits"], p["blocks"]) == (64, 8, 512)
    p = plan(256, 64, 112 * 112, channels_last=True)
    assert (p["slabs"], p["splits"], p["blocks"]) == (1, 264, 264)


@pytest.mark.parametrize("bad", [{"n": 0}, {"dtype": "int32"}, {"gpu": {}}])
def test_nonsense_is_an_error(bad):
    n = bad.pop("n", 4)
    with pytest.raises((ValueError, KeyError)):
        plan(n, 4, 4, **bad)
