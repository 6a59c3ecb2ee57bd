"""What bnext chooses for a case, and how often it then moves the tensor [N, C, ...] through memory: no measurement."""

import math

import torch

from bench.cases import PASSES, Case
from bnext import _C


def predicted(case: Case) -> tuple[str, float]:
    """The plan in a few words, and passes: 1 is the tensor read or written once. fwd_bwd: those of fwd and bwd."""
    if case.mode == "fwd_bwd":
        forward, backward = _of_mode(case, "fwd"), _of_mode(case, "bwd")
        return f"{forward[0]}; {backward[0]}", forward[1] + backward[1]
    return _of_mode(case, case.mode)


def _of_mode(case: Case, mode: str) -> tuple[str, float]:
    return _on_cuda(case, mode) if case.device == "cuda" else _on_cpu(case, mode)


def _on_cpu(case: Case, mode: str) -> tuple[str, float]:
    """Passes count what the kernels read again as free where half the last-level cache holds it."""
    if mode == "eval":
        return "one step", PASSES[mode]
    n, c, *spatial = case.shape
    plan = _C.cpu_plan(
        n, c, math.prod(spatial),
        channels_last=case.layout == "nhwc",
        dtype=case.dtype,
        backward=mode == "bwd",
        threads=case.threads,
    )  # fmt: skip
    inputs = 2 if mode == "bwd" else 1
    group = min(plan["group"], c)
    held = inputs * case.tensor_bytes * (group / c if group else 1)
    passes = PASSES[mode] + (0 if held <= plan["cache"] / 2 else inputs)
    return (f"by {group} channels" if group else "two steps") + ", streaming" * plan["streaming"], passes


def _on_cuda(case: Case, mode: str) -> tuple[str, float]:
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    n, c, *spatial = case.shape
    plan = _C.plan(
        n, c, math.prod(spatial),
        channels_last=case.layout == "nhwc" or not spatial,
        dtype=case.dtype,
        backward=mode == "bwd",
        training=mode != "eval",
        reduces=mode != "eval",
        applies=True,
        cumulative=False,
        aligned=True,
        gpu={
            "multiprocessors": gpu.multi_processor_count,
            "shared_per_block": gpu.shared_memory_per_block_optin,
            "shared_per_multiprocessor": gpu.shared_memory_per_multiprocessor,
            "threads_per_multiprocessor": gpu.max_threads_per_multi_processor,
            "l2": gpu.L2_cache_size,
            "cooperative": True,  # as all that torch 2.11 supports are
        },
    )  # fmt: skip
    passes = (plan["read"] + plan["written"]) / case.tensor_bytes
    return f"{plan['strategy']} {plan['blocks']}x{plan['threads']}", passes
