"""What bnext chooses for a case, and how often it then moves the tensor [N, C, ...] through memory: no measurement."""

import torch

from bench.cases import DTYPES, Case, has_residual, memory_format
from bnext import _C
from bnext.plan import CpuPlan, GpuPlan, Plan, on_cpu, on_gpu


def predicted(case: Case) -> tuple[str, float]:
    """The plan in a few words, and passes, to two digits: 1 is the tensor read or written once.

    fwd_bwd: those of fwd and bwd.
    """
    if case.mode == "fwd_bwd":
        forward, backward = _of_mode(case, "fwd"), _of_mode(case, "bwd")
        return f"{forward[0]}; {backward[0]}", round(forward[1] + backward[1], 2)
    plan, passes = _of_mode(case, case.mode)
    return plan, round(passes, 2)


def _of_mode(case: Case, mode: str) -> tuple[str, float]:
    """Passes as main memory is expected to see them."""
    format = memory_format(case.layout, len(case.shape))
    x = torch.empty(case.shape, dtype=DTYPES[case.dtype], device="meta", memory_format=format)
    which = {"backward": mode == "bwd", "training": mode != "eval"}
    if case.device == "cuda":
        plan = on_gpu(x, _C.gpu(), **which)
        return _on_gpu(plan), _passes(plan, case, mode)
    plan = on_cpu(x, case.threads, **which)
    return _on_cpu(plan), _passes(plan, case, mode)


def _passes(plan: Plan, case: Case, mode: str) -> float:
    """Those of the plan, which is the batch norm's alone, and what the op moves besides.

    The residual or its gradient once; the mask with y, or whenever x is read.
    """
    moved = plan.memory_passes
    if has_residual(case.op):
        masks = {"fwd": 1, "bwd": (moved - 1) / 2, "eval": 0}[mode]
        moved += 1 + masks * case.mask_bytes / case.tensor_bytes
    return moved


def _on_cpu(plan: CpuPlan) -> str:
    steps = f"by {plan.group} channels" if plan.group else "one step" if plan.passes == plan.floor else "two steps"
    return steps + ", streaming" * plan.streaming


def _on_gpu(plan: GpuPlan) -> str:
    """Blocks x threads, and, in clusters, how many blocks each has."""
    return f"{plan.strategy} {plan.blocks}x{plan.threads}" + f"/{plan.cluster}" * (plan.cluster > 1)
