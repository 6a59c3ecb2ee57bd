"""What bnext chooses for a case, and how often it then moves the tensor [N, C, ...] through memory: no measurement."""

import math
from pathlib import Path

import torch

from bench.cases import PASSES, Case
from bnext import _C

_L2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_KIB = 1024
_DEFAULT_L2 = 1024 * _KIB


def predicted(case: Case) -> tuple[str, float]:
    """The plan in a few words, and passes: 1 is the tensor read or written once. fwd_bwd: those of fwd and bwd."""
    if case.mode == "fwd_bwd":
        forward, backward = _of_mode(case, "fwd"), _of_mode(case, "bwd")
        return f"{forward[0]}; {backward[0]}", forward[1] + backward[1]
    return _of_mode(case, case.mode)


def _of_mode(case: Case, mode: str) -> tuple[str, float]:
    return _on_cuda(case, mode) if case.device == "cuda" else _on_cpu(case, mode)


def _on_cpu(case: Case, mode: str) -> tuple[str, float]:
    """Passes count what the kernels read again as free where a core's second-level cache holds it."""
    if mode == "eval":
        return "one step", PASSES[mode]
    n, c, *spatial = case.shape
    group = _C.cpu_group(
        n, c, math.prod(spatial), channels_last=case.layout == "nhwc", dtype=case.dtype, threads=case.threads
    )
    inputs = 2 if mode == "bwd" else 1
    held = inputs * case.tensor_bytes * (min(group, c) / c if group else 1)
    passes = PASSES[mode] + (0 if held <= _second_level_cache() else inputs)
    return (f"by {min(group, c)} channels" if group else "two steps"), passes


def _second_level_cache() -> int:
    """Bytes of a core's; 1 MiB where Linux does not say."""
    try:
        return int(_L2.read_text().strip().removesuffix("K")) * _KIB
    except (OSError, ValueError):
        return _DEFAULT_L2


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
