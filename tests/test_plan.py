"""bnext.plan and python -m bnext plan: what they say of GPUs that are not there, and of this CPU."""

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bnext
from bnext import _C, _build
from bnext.__main__ import main
from bnext.gpus import GPUS
from bnext.plan import STRATEGIES, on_cpu

pytestmark = [pytest.mark.bnext("about bnext's planner"), pytest.mark.only("cpu", "needs no device")]

ROOT = Path(__file__).parent.parent


def meta(*shape, dtype=torch.bfloat16, layout="nchw"):
    format = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}[layout]
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format)


@pytest.mark.parametrize(
    ("sizes", "nchw", "nhwc"),
    [  # strategy and passes of memory: forward, backward
        ((64, 112, 112), "grid 2.00, grid 3.00", "retained 2.72, retained 4.72"),
        ((64, 56, 56), "cluster 2.00, grid 3.00", "retained 2.00, retained 3.88"),
        ((256, 56, 56), "cluster 2.00, grid 3.00", "retained 2.00, retained 3.88"),
        ((128, 56, 56), "cluster 2.00, cluster 3.00", "retained 2.00, retained 3.88"),
        ((128, 28, 28), "cluster 2.00, cluster 3.00", "grid 2.00, retained 3.00"),
        ((512, 28, 28), "cluster 2.00, cluster 3.00", "grid 2.00, retained 3.00"),
        ((256, 28, 28), "cluster 2.00, cluster 3.00", "grid 2.00, retained 3.00"),
        ((256, 14, 14), "cluster 2.00, cluster 3.00", "grid 2.00, grid 3.00"),
        ((1024, 14, 14), "cluster 2.00, cluster 3.00", "grid 2.00, grid 3.00"),
        ((512, 14, 14), "cluster 2.00, cluster 3.00", "grid 2.00, grid 3.00"),
        ((512, 7, 7), "cluster 2.00, cluster 3.00", "cluster 2.00, cluster 3.00"),
        ((2048, 7, 7), "cluster 2.00, cluster 3.00", "cluster 2.00, grid 3.00"),
    ],
    ids=str,
)
def test_resnet50_on_an_h200(sizes, nchw, nhwc):
    for layout, expected in (("nchw", nchw), ("nhwc", nhwc)):
        x = meta(256, *sizes, layout=layout)
        plans = [bnext.plan(x, backward=backward, gpu="h200") for backward in (False, True)]
        assert ", ".join(f"{p.strategy} {p.memory_passes:.2f}" for p in plans) == expected


def test_a_plan():
    """Clusters of 16 blocks run on 128 of an H200's 132 multiprocessors, and each of those has two."""
    p = bnext.plan(meta(256, 64, 56, 56), gpu="h200")
    assert (p.strategy, p.blocks, p.threads, p.cluster) == ("cluster", 256, 256, 16)
    assert (p.blocks_per_multiprocessor, p.occupancy, p.busy) == (2, 512 / 2048, 128 / 132)
    assert (p.launches, p.scratch) == (1, 0)
    assert 16 * 12 * 1024 * 8 < 16 * p.shared < 16 * 114 * 1024  # a channel, 1.6 MB, in 16 blocks
    assert (p.floor, p.passes, p.memory_passes) == (2, 2, 2)
    assert p.bandwidth_microseconds == pytest.approx(2 * 256 * 64 * 56 * 56 * 2 / 4.8e6)
    assert p.bandwidth_microseconds < p.estimated_microseconds < 1.5 * p.bandwidth_microseconds


def test_what_a_cache_has_is_no_pass_of_memory():
    p = bnext.plan(meta(256, 64, 56, 56, layout="nhwc"), gpu="a100")
    assert (p.strategy, p.floor) == ("retained", 2)
    assert 2 < p.memory_passes < p.passes < 3
    assert p.bandwidth_microseconds == pytest.approx(p.memory_passes * 256 * 64 * 56 * 56 * 2 / 2.039e6)


@pytest.mark.parametrize(("asked", "passes"), [
    ({}, 2),
    ({"backward": True}, 3),
    ({"training": False}, 2),
    ({"training": False, "backward": True}, 3),
])  # fmt: skip
def test_floors(asked, passes):
    p = bnext.plan(meta(64, 8, 7, 7), gpu="h200", **asked)
    assert (p.strategy == "streaming") == ("training" in asked)  # evaluation has no statistics to wait for
    assert (p.floor, p.passes, p.launches) == (passes, passes, 1)
    assert (p.scratch > 0) == (asked == {"training": False, "backward": True})  # sums, for the gradients of [C]


def test_strides_dtype_and_offset_are_read_off_the_tensor():
    def plan(x):
        return bnext.plan(x, gpu="h200")

    x = plan(meta(256, 64, 56, 56))
    assert plan(meta(256, 64, 56, 56, layout="nhwc")).strategy == "retained" != x.strategy
    assert plan(meta(256, 64, 56 * 56)) == plan(meta(256, 64, 4, 4, 196, dtype=torch.float16)) == x
    assert plan(meta(256, 64, 56, 56, dtype=torch.float32)).strategy == "grid"
    assert plan(meta(512, 12)) == plan(meta(512, 12, 1, 1)) == plan(meta(2, 12, 16, 16, layout="nhwc"))  # rows of 12
    assert plan(meta(256, 1, 8, 8)) == plan(meta(256, 1, 8, 8, layout="nhwc"))
    elements = 256 * 64 * 56 * 56
    offset = [meta(elements + 8)[i : i + elements].view(256, 64, 56, 56) for i in (8, 1)]
    assert plan(offset[0]) == x != plan(offset[1])  # 16 bytes, and 2
    assert plan(meta(256, 64, 56, 57)[..., 1:]) == x  # is copied


def test_every_gpu_has_a_plan():
    x = meta(8, 64, 7, 7)
    assert {bnext.plan(x, gpu=name).launches for name in GPUS} == {1}
    assert bnext.plan(torch.empty_like(x, device="cpu"), gpu="t4") == bnext.plan(x, gpu="t4")


def test_on_this_cpu(one_thread):
    p = bnext.plan(torch.empty(4, 8, 5, 3))
    assert (p.floor, p.passes, p.memory_passes, p.group, p.streaming) == (2, 3, 2, 8, False)
    p = bnext.plan(torch.empty(4, 3, 5, 3), backward=True)  # too few channels to take them one by one
    assert (p.floor, p.passes, p.memory_passes, p.group) == (3, 5, 3, 0)
    p = bnext.plan(torch.empty(4, 8, 5, 3), training=False)
    assert (p.floor, p.passes, p.memory_passes, p.group) == (2, 2, 2, 0)
    x = meta(2**20, 8, 16, 16, dtype=torch.float32)
    assert on_cpu(x, 1, backward=False, training=True).memory_passes == 3  # a channel is 1 GiB
    assert not on_cpu(x, 1, backward=False, training=True).streaming  # in runs of 256 elements
    assert on_cpu(x, 1, backward=False, training=False).streaming  # planes are one behind the other
    torch.set_num_threads(2)
    assert bnext.plan(torch.empty(4, 7, 5, 3)).group == 0


@pytest.mark.parametrize(("backward", "training", "passes"), [(False, False, 2), (False, True, 3), (True, True, 5)])
def test_past_the_caches_of_this_cpu(backward, training, passes):
    problem = {"channels_last": True, "dtype": "float32", "backward": backward, "training": training, "threads": 1}
    rows = _C.cpu_plan(1, 64, 1, **problem)["cache"] // (2 * passes * 64 * 4)
    for n, past in ((rows, False), (rows + 1, True)):
        x = meta(n, 64, 1, 1, dtype=torch.float32, layout="nhwc")
        assert on_cpu(x, 1, backward=backward, training=training).streaming == past


def test_on_a_cuda_device(monkeypatch):
    """With a stand-in for the device, which plan has to make the current one."""
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or nullcontext())
    monkeypatch.setattr(_C, "gpu", lambda: GPUS["a100"])
    with FakeTensorMode():
        x = torch.empty(256, 64, 28, 28, device="cuda:1", dtype=torch.bfloat16)
        assert bnext.plan(x) == bnext.plan(x, gpu="a100") != bnext.plan(x, gpu="h200")
    assert devices == [torch.device("cuda:1")]


@pytest.mark.skipif(_build.cuda_archs, reason="about builds without CUDA kernels")
def test_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with FakeTensorMode(), pytest.raises(NotImplementedError, match="bnext was built without CUDA kernels"):
        bnext.plan(torch.empty(2, 3, device="cuda:0"))


@pytest.mark.parametrize(
    ("x", "gpu", "error", "sentence"),
    [
        ([1.0], None, TypeError, "expected x to be a Tensor, got list"),
        (meta(2, 3, dtype=torch.int32), "h200", NotImplementedError, '"batch_norm" not implemented for torch.int32'),
        (meta(3), "h200", RuntimeError, "expected input to have at least 2 dimensions"),
        (meta(0, 3), "h200", ValueError, r"got torch.strided of shape \(0, 3\)"),
        (torch.eye(2).to_sparse(), None, ValueError, r"got torch.sparse_coo of shape \(2, 2\)"),
        (meta(2, 3), "h300", ValueError, "expected gpu to be one of t4, a100, .*, b200, got 'h300'"),
        (meta(2, 3), None, ValueError, "expected x on the CPU or a CUDA device, or the name of a gpu, got a meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(x, gpu, error, sentence):
    with pytest.raises(error, match=sentence):
        bnext.plan(x, gpu=gpu)


def command(*words):
    return main(["plan", *words])


def test_tables(capsys):
    assert command("256x64x56x56", "--dtype", "bfloat16", "--layout", "nhwc", "--gpu", "h200") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "256x64x56x56 bfloat16 nhwc, 102.8 MB, on h200, 4800 GB/s"
    assert (lines[2], lines[10]) == ("fwd: at least 2 passes, 42.8 us", "bwd: at least 3 passes, 64.2 us")
    titles = (
        "strategy blocks threads cluster per SM occupancy busy shared launches passes memory bandwidth us estimate us"
    )
    assert lines[3].split() == lines[11].split() == titles.split()
    assert len({len(line) for line in lines[3:9]}) == 1
    for first, strategies in ((4, lines[4:9]), (12, lines[12:])):
        assert [line[2:].split()[0] for line in strategies] == list(STRATEGIES)
        assert [line[0] for line in strategies] == [" "] * 4 + ["*"]
        assert lines[first + 1].split()[1:] == ["-"] * 12
    shared = bnext.plan(meta(256, 64, 56, 56, layout="nhwc"), gpu="h200").shared
    assert " ".join(lines[8].split()) == f"* retained 132 512 1 1 25% 100% {shared} 1 2.49 2.00 42.8 55.6"
    assert callable(bnext.plan)  # and not its module


def test_json(capsys):
    words = ["--mode", "bwd,eval", "--layout", "nhwc", "--gpu", "b200", "--json"]
    assert command("32x64x8x8x8", "--dtype", "float16", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shape"], found["dtype"], found["layout"]) == ([32, 64, 8, 8, 8], "float16", "nhwc")
    assert found["gpu"] == {**GPUS["b200"], "clustered": list(GPUS["b200"]["clustered"])}
    x = torch.empty(32, 64, 8, 8, 8, dtype=torch.float16, device="meta", memory_format=torch.channels_last_3d)
    for mode, asked in (("bwd", {"backward": True}), ("eval", {"training": False})):
        plan, strategies = bnext.plan(x, gpu="b200", **asked), found["modes"][mode]["strategies"]
        assert strategies[found["modes"][mode]["chosen"]] == asdict(plan)
        assert list(strategies) == list(STRATEGIES)
        assert (strategies["grid"] is None) == (mode == "eval")
    assert list(found["modes"]) == ["bwd", "eval"]


def test_bandwidth(capsys):
    """Of a GPU's memory: times are by it."""
    found = []
    for words in ((), ("--bandwidth", "2400")):
        assert command("64x64x32x32", "--gpu", "h200", "--mode", "fwd", "--json", *words) == 0
        printed = json.loads(capsys.readouterr().out)
        found.append((printed["gpu"]["bandwidth"], printed["modes"]["fwd"]["strategies"]["grid"]))
    (of_data_sheet, fast), (given, slow) = found
    assert (of_data_sheet, given) == (4.8e12, 2.4e12)
    assert slow["bandwidth_microseconds"] == pytest.approx(2 * fast["bandwidth_microseconds"])
    assert fast["estimated_microseconds"] < slow["estimated_microseconds"]
    assert GPUS["h200"]["bandwidth"] == 4.8e12


@pytest.mark.parametrize("shape", ["8x4", "8x4x5", "8x4x5x6", "8x4x5x6x7"])
def test_shapes(shape, capsys):
    assert command(shape, "--gpu", "a100") == 0
    size = math.prod(map(int, shape.split("x"))) * 4 / 1e6
    assert capsys.readouterr().out.startswith(f"{shape} float32 nchw, {size:.1f} MB, on a100, 2039 GB/s")


def test_the_gpu_at_hand(capsys, monkeypatch):
    monkeypatch.setattr(_C, "gpu", lambda: GPUS["l4"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert command("8x4x5x6") == 0
    assert capsys.readouterr().out.startswith("8x4x5x6 float32 nchw, 0.0 MB, on NVIDIA L4, 300 GB/s")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "required: NxCxHxW"),
        (["8"], "expected NxC, NxCxL, NxCxHxW or NxCxDxHxW, all above 0, got '8'"),
        (["8x4x5x6x7x8"], "all above 0, got '8x4x5x6x7x8'"),
        (["8x0"], "got '8x0'"),
        (["8,4"], "got '8,4'"),
        (["8xfour"], "got '8xfour'"),
        ([f"{2**49}x2"], f"expected fewer than 2^50 elements, got {2**49}x2"),
        (["8x4", "--layout", "nhwc", "--gpu", "h200"], "--layout: expected nchw for 8x4"),
        (["8x4", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["8x4", "--mode", "fwd,fwd_bwd"], "--mode: expected some of fwd,bwd,eval, got 'fwd_bwd'"),
        (["8x4", "--gpu", "h300"], "--gpu: invalid choice: 'h300'"),
        (["8x4", "--bandwidth", "4.8TB"], "expected GB/s from 1 to 1000000, got '4.8TB'"),
        (["8x4", "--bandwidth", "nan"], "got 'nan'"),
    ],
)
def test_arguments(words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*words)
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err


@pytest.mark.skipif(_build.cuda_archs, reason="about builds without CUDA kernels")
def test_no_gpu_is_a_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        command("8x4")
    sentence = "error: this bnext was built without CUDA kernels: expected --gpu with one of t4, a100"
    assert sentence in capsys.readouterr().err


def test_a_strategy_can_be_forced():
    """In a process of its own: the variable is read once."""

    def chosen(strategy):
        words = [sys.executable, "-m", "bnext", "plan", "256x64x56x56", "--gpu", "h200", "--mode", "fwd,eval"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "BNEXT_CUDA_STRATEGY": strategy}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("*")], done.stderr

    assert chosen("cluster") == (["cluster", "streaming"], "")
    found, error = chosen("fast")
    assert found == []
    assert error.splitlines()[-1].endswith(
        "BNEXT_CUDA_STRATEGY: expected the strategy to be streaming, block, cluster, grid or retained, got fast"
    )
