"""The batch norms under test, as callables that are first checked and then timed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import bnext
from bench.cases import EPS, MOMENTUM, Inputs

BNEXT_OPS = {
    "fwd": "bnext::batch_norm_train",
    "bwd": "bnext::batch_norm_backward",
    "eval": "bnext::batch_norm_eval",
}


def _native(*arguments: Tensor | float | bool | None) -> Tensor:
    """torch's own kernels where F.batch_norm would take cuDNN's."""
    with torch.backends.cudnn.flags(enabled=False):
        return F.batch_norm(*arguments)


def _compiled() -> Callable[..., Tensor]:
    """F.batch_norm through torch.compile, compiled anew for what it is called with first; so is its backward."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # a backward that frees what it reads could be timed only once
    return torch.compile(F.batch_norm, dynamic=False)


def batch_norms(device: str, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """By name: torch and bnext; on CUDA also torch without cuDNN and, where wanted, torch.compile of torch's."""
    found = {"torch": F.batch_norm, "bnext": bnext.batch_norm}
    if device == "cuda":
        found["native"] = _native
        if compiled:
            found["compile"] = _compiled()
    return found


@dataclass(frozen=True)
class Candidate:
    """call does the work that is timed; names are those of its results; buffers it may update in place."""

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def outputs(self) -> dict[str, Tensor]:
        """Everything that one call produced, by name."""
        result = self.call()
        returned = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self.names, returned, strict=True)) | self.buffers


def candidate(batch_norm: Callable[..., Tensor], inputs: Inputs, mode: str) -> Candidate:
    """The given batch norm in one mode, with running buffers of its own.

    fwd records a graph, as in training; eval does not; bwd walks one recorded beforehand.
    """
    x, weight, bias = (t.detach().requires_grad_(mode != "eval") for t in (inputs.x, inputs.weight, inputs.bias))
    if mode == "bwd":
        y = batch_norm(x, None, None, weight, bias, True, MOMENTUM, EPS)
        leaves = (x, weight, bias)
        return Candidate(lambda: torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True), ("dx", "dw", "db"))
    mean, var = inputs.running_mean.clone(), inputs.running_var.clone()
    return Candidate(
        lambda: batch_norm(x, mean, var, weight, bias, mode == "fwd", MOMENTUM, EPS),
        ("y",),
        {"running_mean": mean, "running_var": var},
    )
