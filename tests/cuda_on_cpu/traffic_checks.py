"""What the CUDA kernels move: every byte that goes through global memory, and how wide the accesses are.

pytest tests/cuda_on_cpu/traffic_checks.py --cuda-on-cpu checked
"""

import math
from typing import Any

import pytest
import torch
from cuda_on_cpu import emulated
from cuda_on_cpu.cases import ALL, EACH, ONE, SIXTEEN, by_strategy, on_a_small_gpu, train
from helpers import by_dtypes, by_layout, channel_arguments, values
from torch import Tensor

import bnext

_gpu = pytest.fixture(autouse=True)(on_a_small_gpu)

TRAFFIC = [
    # op, strategy, tensors: times read and written
    ("train", "streaming", {"input": (2, 0), "output": (0, 1)}),
    ("train", "block", {"input": (1, 0), "output": (0, 1)}),
    ("train", "cluster", {"input": (1, 0), "output": (0, 1)}),
    ("train", "grid", {"input": (1, 0), "output": (0, 1)}),
    ("eval", "", {"input": (1, 0), "output": (0, 1)}),
    ("backward", "streaming", {"grad_output": (2, 0), "input": (2, 0), "grad_input": (0, 1)}),
    ("backward", "block", {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1)}),
    ("backward", "cluster", {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1)}),
    ("backward", "grid", {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1)}),
    ("backward of weight and bias", "streaming", {"grad_output": (1, 0), "input": (1, 0)}),
    ("eval backward", "", {"grad_output": (1, 0), "input": (1, 0), "grad_input": (0, 1)}),
    ("eval backward of input", "", {"grad_output": (1, 0), "input": (0, 0), "grad_input": (0, 1)}),
]


def traffic(op: str, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What one op moved, by buffer."""
    assert emulated.module is not None
    arguments = channel_arguments(x.shape[1], dtype)
    weight, bias, mean, var = arguments.values()
    if op == "train":
        train(x, arguments)
    elif op == "eval":
        bnext.ops.batch_norm_eval(x, weight, bias, mean, var, 1e-5)
    else:
        saved = bnext.ops.batch_norm_train(x, weight, bias, None, None, None, 0.1, 1e-5)[1:]
        mask = {"backward of weight and bias": [False, True, True], "eval backward of input": [True, False, False]}
        bnext.ops.batch_norm_backward(x, x.clone(), weight, *saved, "eval" not in op, mask.get(op, ALL))
    return emulated.module.traffic()


@by_dtypes
@by_layout
@pytest.mark.parametrize(("op", "strategy", "times"), TRAFFIC, ids=lambda v: v if isinstance(v, str) else "")
def test_traffic(op, strategy, times, layout, dtypes):
    """Every tensor moves so often and no oftener, 16 bytes at a time."""
    assert emulated.module is not None
    emulated.reset(**SIXTEEN)
    emulated.module.force(strategy)
    shape = EACH[strategy or "streaming"]
    x = values(shape, dtypes[0], layout)
    size = math.prod(shape) * {torch.float64: 8, torch.float32: 4}.get(dtypes[0], 2)
    found = traffic(op, x, dtypes[1])
    planned = emulated.module.planned()
    assert planned["strategy"] == (strategy or "streaming")
    assert planned["read"] == size * sum(reads for reads, _ in times.values())
    assert planned["written"] == size * sum(writes for _, writes in times.values())
    for name, (reads, writes) in times.items():
        assert (found[name]["read"], found[name]["written"]) == (reads * size, writes * size), name
        assert found[name]["reads"] == [0, 0, 0, 0, reads * size // 16], name
        assert found[name]["writes"] == [0, 0, 0, 0, writes * size // 16], name


@by_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_of_ragged_planes(strategy, dtype):
    """Planes of 98 or 196 bytes in odd images: written once, and read with at most 14 bytes more at either end."""
    assert emulated.module is not None
    emulated.module.force(strategy)
    itemsize = 4 if dtype == torch.float32 else 2
    size, ends = 12 * 25 * 49 * itemsize, 12 * 25 * 2 * (16 - itemsize)
    times = 2 if strategy == "streaming" else 1
    found = traffic("train", values((12, 25, 7, 7), dtype), dtype)
    assert found["output"]["written"] == size
    assert times * size <= found["input"]["read"] <= times * (size + ends)


@pytest.mark.parametrize("op", ["train", "backward"])
@pytest.mark.parametrize("side", [7, 14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_traffic_of_small_planes(op, side, dtype):
    """Planes of 7x7 and 14x14 whose images are whole packs: nothing but these, read once and written once."""
    assert emulated.module is not None
    found = traffic(op, values((12, 24, side, side), dtype), dtype)
    planned = emulated.module.planned()
    assert planned["planes"] == (side == 7 or dtype == torch.bfloat16)  # others are whole packs by themselves
    assert planned["strategy"] in ("block", "cluster", "grid")
    packs = 12 * 24 * side * side * {torch.float64: 8, torch.float32: 4}.get(dtype, 2) // 16
    for name in ("input", "grad_output") if op == "backward" else ("input",):
        assert found[name]["reads"] == [0, 0, 0, 0, packs], name
    assert found["grad_input" if op == "backward" else "output"]["writes"] == [0, 0, 0, 0, packs]


@pytest.mark.parametrize(("shape", "layout", "op", "again"), [
    # Slots of 16 bytes; two blocks, of 256 threads that keep four of them, or two of each tensor.
    ((32, 2, 40, 40), "contiguous", "train", 2 * (6400 - 2 * 2 * 4 * 256)),
    ((32, 2, 40, 40), "contiguous", "backward", 2 * 2 * (6400 - 2 * 1 * 4 * 256)),
    ((120, 8, 7, 7), "contiguous", "train", 120 * 49 - 2 * 4 * 245),
    ((8, 8, 40, 40), "channels_last", "train", 8 * 1600 - 2 * 4 * 256),
])  # fmt: skip
def test_traffic_of_what_is_kept_in_part(shape, layout, op, again):
    """Read once more: what has no room in the blocks' shared memory."""
    assert emulated.module is not None
    emulated.reset(**ONE)
    emulated.module.force("retained")
    x = values(shape, torch.bfloat16, layout)
    found = traffic(op, x, torch.float32)
    planned, inputs = emulated.module.planned(), ("input", "grad_output") if op == "backward" else ("input",)
    assert planned["strategy"] == "retained"
    read = sum(found[name]["read"] for name in inputs)
    assert read == planned["read"]
    assert read == len(inputs) * x.numel() * 2 + again * 16
    assert found["grad_input" if op == "backward" else "output"]["written"] == x.numel() * 2
