"""plan: how a batch norm is laid out on a GPU or CPU, and how often it moves the tensor: no measurement."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext import _C, ops
from bnext.gpus import GPUS

STRATEGIES = ("streaming", "block", "cluster", "grid", "retained")  # csrc/cuda/plan.h


@dataclass(frozen=True)
class Plan:
    """A pass is the tensor [N, C, *] read or written once."""

    floor: int  # passes that nothing can do without: inputs read, output written
    passes: float  # of the kernels
    memory_passes: float  # of them, those that main memory is expected to see: the others find the tensor in a cache


@dataclass(frozen=True)
class CpuPlan(Plan):
    """On the CPU."""

    group: int  # channels read, kept in the caches and written together; 0: all of them, step by step
    streaming: bool  # whether results are written past the caches


@dataclass(frozen=True)
class GpuPlan(Plan):
    """On a GPU."""

    strategy: str  # where the tensor is kept between statistics and normalisation: see STRATEGIES
    blocks: int
    threads: int  # of a block
    cluster: int  # blocks in a cluster; 1: no clusters
    blocks_per_multiprocessor: int  # at once, on those that have blocks
    occupancy: float  # their threads, of those that a multiprocessor can have
    busy: float  # share of the multiprocessors that have blocks
    shared: int  # bytes of shared memory of a block
    scratch: int  # bytes of global memory for partial results
    launches: int
    bandwidth_microseconds: float  # a bound: memory_passes at the GPU's bandwidth, and nothing else
    estimated_microseconds: float  # what the planner chooses by: barriers and uneven work are in it


def plan(x: Tensor, *, backward: bool = False, training: bool = True, gpu: str | None = None) -> CpuPlan | GpuPlan:
    """How bnext computes the batch norm of x [N, C, *], or its backward with all gradients, in training or evaluation.

    Where x is, on the CPU or a CUDA device; with the name of a gpu (bnext.gpus.GPUS) as if it were there, meta tensors
    included. Of x only shape, strides, offset and dtype matter; a copy that strides make necessary is not counted.
    BNEXT_CUDA_STRATEGY forces a strategy wherever it is possible, as it does for the kernels.

    Raises TypeError for what is no tensor; NotImplementedError and RuntimeError for dtypes and shapes as
    bnext.batch_norm does; ValueError for a sparse or empty tensor, an unknown gpu or strategy, and other devices.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a Tensor, got {type(x).__name__}")
    ops.check(x)
    if x.layout is not torch.strided or x.numel() == 0:
        raise ValueError(f"expected x to be strided and to have elements, got {x.layout} of shape {tuple(x.shape)}")
    if gpu is not None:
        if gpu not in GPUS:
            raise ValueError(f"expected gpu to be one of {', '.join(GPUS)}, got {gpu!r}")
        return on_gpu(x, GPUS[gpu], backward=backward, training=training)
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            return on_gpu(x, _C.gpu(), backward=backward, training=training)
    if x.device.type != "cpu":
        raise ValueError(f"expected x on the CPU or a CUDA device, or the name of a gpu, got a {x.device.type} tensor")
    return on_cpu(x, torch.get_num_threads(), backward=backward, training=training)


def on_cpu(x: Tensor, threads: int, *, backward: bool, training: bool) -> CpuPlan:
    """As plan, for so many threads; x may be elsewhere."""
    problem = _problem(x, _format(x, backward))
    found = _C.cpu_plan(**problem, backward=backward, training=training, threads=threads)
    c, inputs = x.shape[1], 2 if backward else 1
    group, floor, again = min(found["group"], c), inputs + 1, inputs * training
    kept = inputs * x.nbytes * (group or c) / c <= found["cache"] / 2
    return CpuPlan(floor, floor + again, floor if kept else floor + again, group, found["streaming"])


def on_gpu(x: Tensor, gpu: Mapping[str, Any], *, backward: bool, training: bool, strategy: str = "") -> GpuPlan | None:
    """As plan, on a GPU with these properties; with a strategy, of that one, or None where it is not possible."""
    format = _format(x, backward)
    copied = not x.is_contiguous(memory_format=format)
    found = _C.plan(
        **_problem(x, format),
        backward=backward,
        training=training,
        reduces=training or backward,
        applies=True,
        cumulative=False,
        aligned=copied or x.storage_offset() * x.itemsize % 16 == 0,  # allocations are, by far larger multiples
        gpu=gpu,
        strategy=strategy,
    )
    if found is None:
        return None
    moved, most = found["read"] + found["written"], gpu["multiprocessors"]
    if found["cluster"] > 1:
        most = gpu["clustered"][found["cluster"].bit_length() - 2]
    resident = -(-found["blocks"] // most)
    return GpuPlan(
        floor=3 if backward else 2,
        passes=moved / x.nbytes,
        memory_passes=(moved - found["cached"]) / x.nbytes,
        **{name: found[name] for name in ("strategy", "blocks", "threads", "cluster", "shared", "scratch", "launches")},
        blocks_per_multiprocessor=resident,
        occupancy=resident * found["threads"] / gpu["threads_per_multiprocessor"],
        busy=min(found["blocks"], most) / gpu["multiprocessors"],
        bandwidth_microseconds=(moved - found["cached"]) / gpu["bandwidth"] * 1e6,
        estimated_microseconds=found["microseconds"],
    )


def _format(x: Tensor, backward: bool) -> torch.memory_format:
    """In which csrc/host.h takes x, which it copies if it is in another."""
    return suggest_memory_format(x) if backward else ops.output_format(x)


def _problem(x: Tensor, format: torch.memory_format) -> dict[str, Any]:
    n, c, *spatial = x.shape
    s = math.prod(spatial)
    channels_last = format != torch.contiguous_format or s == 1
    return {"N": n, "C": c, "S": s, "channels_last": channels_last, "dtype": str(x.dtype).removeprefix("torch.")}
