"""The memory floor: torch's plainest kernels that move the bytes a batch norm cannot avoid.

Their ordinary stores make most machines read a line of memory before overwriting it. A kernel with streaming
stores saves that read, and can get below this floor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Inputs


def floor(inputs: Inputs, mode: str) -> Callable[[], Tensor]:
    """fwd and eval: read x, write a copy. bwd: read x and dy, write their sum. fwd_bwd: both. Nothing is allocated."""
    out = torch.zeros_like(inputs.x)

    def copy() -> Tensor:
        return out.copy_(inputs.x)

    def add() -> Tensor:
        return torch.add(inputs.x, inputs.dy, out=out)

    def both() -> Tensor:
        copy()
        return add()

    return {"bwd": add, "fwd_bwd": both}.get(mode, copy)
