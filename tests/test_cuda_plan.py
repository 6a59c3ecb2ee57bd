"""What csrc/cuda/planner.h chooses, for several GPUs, without one."""

from typing import Any

import pytest

from bench.suites import SUITES, Layer
from bnext import _C
from bnext.gpus import GPUS
from bnext.plan import STRATEGIES

RESNET50 = SUITES["resnet50"].layers

pytestmark = [pytest.mark.bnext("about bnext's CUDA kernels"), pytest.mark.only("cpu", "needs no device")]


WHOLE_STEP = {"training": True, "reduces": True, "applies": True, "cumulative": False, "aligned": True}
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def plan(n: int, c: int, s: int, device: str = "h200", **changed: Any) -> dict[str, Any]:
    given = {"channels_last": False, "dtype": "bfloat16", "backward": False, "gpu": GPUS[device]} | WHOLE_STEP
    return _C.plan(n, c, s, **(given | changed))


def every(n: int, c: int, s: int, device: str = "h200", **changed: Any) -> list[dict[str, Any]]:
    """Of each strategy that is possible."""
    found = [plan(n, c, s, device, strategy=strategy, **changed) for strategy in STRATEGIES]
    return [p for p in found if p]


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
        assert p["cooperative"] == (p["strategy"] not in ("block", "cluster") or cumulative)


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
        for p in every(n, c, s, device, backward=backward, channels_last=channels_last, dtype=dtype):
            busy = properties["multiprocessors"]
            if p["cluster"] > 1:
                assert p["cluster"] == p["splits"] <= 16
                busy = properties["clustered"][p["cluster"].bit_length() - 2]
            each = -(-p["blocks"] // busy)  # blocks on the fullest multiprocessor
            assert 1 <= p["blocks"] <= p["slabs"] * p["splits"]
            assert p["shared"] <= properties["shared_per_block"]
            assert each * (p["shared"] + 1024) <= properties["shared_per_multiprocessor"]
            assert each * p["threads"] <= properties["threads_per_multiprocessor"]
            # Registers: 65536 of a multiprocessor, and at most 64 or 128 a thread by the kernels' launch bounds.
            planar = (not channels_last or c == 1) and not p["planes"]
            short = p["strategy"] == "streaming" and not backward and planar and p["whole"] and dtype != "float64"
            assert each * p["threads"] * (64 if short else 128) <= 65536


@by_gpu
@by_direction
@by_layout
def test_resnet50_keeps_the_device_busy(device, backward, channels_last):
    """But for what clusters leave over, and of the time of the fullest multiprocessor at least 7/8 of the average."""
    for layer in RESNET50:
        p = of_layer(layer, device, backward=backward, channels_last=channels_last)
        tasks = p["slabs"] * p["splits"]
        rounds = -(-tasks // p["blocks"])
        assert p["blocks"] >= 0.86 * GPUS[device]["multiprocessors"]  # 128 of a B200's 148, in clusters of 16
        assert tasks / (rounds * p["blocks"]) > 0.87, (layer, p)


@by_gpu
@by_direction
@by_layout
def test_the_least_estimate_is_chosen(device, backward, channels_last):
    for layer in RESNET50:
        channels, height, width = layer.sizes
        asked = {"backward": backward, "channels_last": channels_last}
        estimates = {p["strategy"]: p["microseconds"] for p in every(256, channels, height * width, device, **asked)}
        assert estimates[of_layer(layer, device, **asked)["strategy"]] == min(estimates.values())


@by_direction
@by_layout
def test_what_each_strategy_moves(backward, channels_last):
    """All write once. What holds a slab reads once; what holds nothing, twice."""
    inputs, seen = 2 if backward else 1, set()
    for c, s in ((64, 112 * 112), (64, 56 * 56), (256, 14 * 14), (64, 7 * 7), (2, 7 * 7), (2, 2**17)):
        tensor = 256 * c * s * 2
        for p in every(256, c, s, backward=backward, channels_last=channels_last):
            seen.add(p["strategy"])
            assert p["written"] == tensor
            once = inputs * tensor
            again = p["read"] - once
            assert 0 < again < once if p["strategy"] == "retained" else again == once * (p["strategy"] == "streaming")
            assert 0 <= p["cached"] <= again
    assert seen == set(STRATEGIES)


def test_what_the_cache_is_expected_to_have():
    """Half of it, of what has been read since: all of 16 MiB, 30 MiB of 64, of an H200's 60."""
    for mib, cached, past_cache in ((16, 16, False), (64, 30, True)):
        p = plan(mib * 2**20 // (64 * 512 * 2), 64, 512, strategy="streaming")
        assert (p["cached"], p["past_cache"]) == (cached * 2**20, past_cache)


def test_partial_results_in_global_memory():
    """16 bytes for each channel and split, and a counter for each group of blocks; a cluster's are on chip."""
    p = plan(256, 64, 56 * 56, strategy="grid")
    assert p["scratch"] == p["splits"] * 64 * 16 + p["blocks"] // p["splits"] * 4
    p = plan(256, 64, 112 * 112, strategy="streaming")
    assert p["scratch"] == p["splits"] * 64 * 16
    for strategy, s in (("block", 49), ("cluster", 56 * 56)):
        assert plan(256, 2, s, strategy=strategy)["scratch"] == 0


@pytest.mark.parametrize(("c", "s", "dtype", "whole", "planes"), [
    (64, 56 * 56, "bfloat16", True, False),
    (64, 14 * 14, "bfloat16", True, True),  # 24.5 packs a plane
    (64, 14 * 14, "float32", True, False),
    (64, 12 * 12, "bfloat16", True, True),  # 18 packs, but runs of 288 bytes are short
    (64, 7 * 7, "float32", True, True),
    (3, 7 * 7, "float32", False, False),  # nor does an image divide into packs
    (1, 7 * 7, "float32", False, False),
    (64, 2, "float64", True, True),
])  # fmt: skip
def test_planes_that_are_whole_packs(c, s, dtype, whole, planes):
    """By themselves, or several together."""
    p = plan(256, c, s, dtype=dtype)
    assert (p["whole"], p["planes"]) == (whole, planes)
    p = plan(256, c, s, dtype=dtype, aligned=False)
    assert (p["whole"], p["planes"]) == (False, False)


@pytest.mark.parametrize(
    ("c", "dtype", "whole"), [(64, "bfloat16", True), (12, "bfloat16", False), (12, "float32", True)]
)
def test_rows_that_are_whole_packs(c, dtype, whole):
    assert plan(256, c, 49, dtype=dtype, channels_last=True)["whole"] is whole
    assert plan(256, c, 49, dtype=dtype, channels_last=True, aligned=False)["whole"] is False


def test_without_cooperative_launches():
    """Streaming takes two launches; what a block or a cluster holds, one, but for a cumulative average."""
    old = {**GPUS["h200"], "cooperative": False}
    p = plan(256, 64, 112 * 112, gpu=old)
    assert (p["strategy"], p["launches"], p["cooperative"]) == ("streaming", 2, False)
    for c, strategies in ((2, {"streaming", "block", "cluster"}), (64, {"streaming", "cluster"})):
        s = 49 if c == 2 else 56 * 56
        assert {p["strategy"] for p in every(256, c, s, gpu=old)} == strategies
        assert {p["strategy"] for p in every(256, c, s, gpu=old, cumulative=True)} == {"streaming"}
    assert plan(256, 64, 56 * 56, gpu=old)["launches"] == 1


def test_clusters_where_there_are_some():
    """Not before compute capability 9.0, and not in a launch that is cooperative, as a cumulative average needs it."""
    for device, properties in GPUS.items():
        p = plan(256, 64, 28 * 28, device, strategy="cluster")
        assert (p is not None) == any(properties["clustered"]) == (device in ("h100", "h200", "b200"))
    assert plan(256, 64, 28 * 28, strategy="cluster", cumulative=True) is None
    small = {**GPUS["h200"], "clustered": (132, 132, 128, 0)}
    assert plan(256, 64, 56 * 56, strategy="cluster", backward=True)["cluster"] == 16
    assert plan(256, 64, 56 * 56, strategy="cluster", backward=True, gpu=small) is None


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
    p = plan(256, 64, 112 * 112, strategy="streaming")
    assert (p["slabs"], p["splits"], p["blocks"]) == (64, 8, 512)
    p = plan(256, 64, 112 * 112, strategy="streaming", channels_last=True)
    assert (p["slabs"], p["splits"], p["blocks"]) == (2, 132, 264)


@pytest.mark.parametrize("bad", [{"n": 0}, {"dtype": "int32"}, {"gpu": {}}, {"strategy": "fast"}])
def test_nonsense_is_an_error(bad):
    n = bad.pop("n", 4)
    with pytest.raises((ValueError, KeyError)):
        plan(n, 4, 4, **bad)
