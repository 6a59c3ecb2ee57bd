"""The memory floor: torch's plainest kernels that move the bytes a batch norm cannot avoid.

Their ordinary stores make most machines read a line of memory before overwriting it. A kernel with streaming
stores saves that read, and can get below this floor.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.cases import Inputs


def floor(inputs: Inputs, mode: str) -> Callable[[], None]:
    """fwd and eval: read x, write a copy. bwd: read x and dy, write their sum. fwd_bwd: both. Nothing is allocated.

    With a residual, fwd and eval: read x and residual, write their sum. bwd: read x and dy, write a copy of each. And a
    mask of one bit an element is written by fwd, and read by bwd.
    """
    x, dy, residual = inputs.x, inputs.dy, inputs.residual
    out = torch.zeros_like(x)
    if residual is None:
        evaluation = forward = [partial(out.copy_, x)]
        backward = [partial(torch.add, x, dy, out=out)]
    else:
        other = torch.zeros_like(x)
        mask, most = (torch.zeros(size, dtype=torch.uint8, device=x.device) for size in (-(-x.numel() // 8), ()))
        evaluation = [partial(torch.add, x, residual, out=out)]
        forward = [*evaluation, mask.zero_]
        backward = [partial(torch.amax, mask, 0, out=most), partial(out.copy_, x), partial(other.copy_, dy)]
    calls = {"fwd": forward, "bwd": backward, "fwd_bwd": [*forward, *backward], "eval": evaluation}[mode]

    def call() -> None:
        for each in calls:
            each()

    return call
