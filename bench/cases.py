"""What is measured: a case, and the tensors that go in."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

OPS = ("bn", "bn+relu", "bn+add+relu")  # batch norm, and what follows it: a residual is added, then ReLU
MODES = ("fwd", "bwd", "fwd_bwd", "eval")  # training forward, its backward, both, inference forward
LAYOUTS = ("nchw", "nhwc")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOMENTUM, EPS = 0.1, 1e-5  # the defaults of torch.nn.BatchNorm2d

# Tensors [N, C, ...] read or written; how many more with a residual, and masks of one bit an element.
_MOVED = {"fwd": (2, 1, 1), "bwd": (3, 1, 1), "fwd_bwd": (5, 2, 2), "eval": (2, 1, 0)}

# What a plausible result may be off by, as a share of the largest value.
PLAUSIBLE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One op on a layer in one mode: shape N, C and any spatial sizes; count is how often its network has the layer."""

    suite: str
    layer: str
    shape: tuple[int, ...]
    count: int
    mode: str
    layout: str
    dtype: str
    device: str
    threads: int
    op: str = "bn"

    @property
    def tensor_bytes(self) -> int:
        """Of one tensor [N, C, ...]."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def mask_bytes(self) -> int:
        """Of one bit an element."""
        return -(-math.prod(self.shape) // 8)

    @property
    def bytes(self) -> int:
        """What must move of the tensors [N, C, ...]: fwd and eval read x, write y; bwd reads x and dy, writes dx.

        With a residual fwd and eval read it too, and bwd writes its gradient; fwd writes, and bwd reads, one bit an
        element that tells what the ReLU passes, which without a residual x tells. fwd_bwd is the sum of fwd and bwd.
        What is read or written per channel is not counted.
        """
        tensors, more, masks = _MOVED[self.mode]
        if not has_residual(self.op):
            return tensors * self.tensor_bytes
        return (tensors + more) * self.tensor_bytes + masks * self.mask_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields, and bytes."""
        return asdict(self) | {"shape": list(self.shape), "bytes": self.bytes}


def has_residual(op: str) -> bool:
    """Whether op adds a residual."""
    return op == "bn+add+relu"


def shape_text(shape: Sequence[int]) -> str:
    """32x64x56x56."""
    return "x".join(map(str, shape))


def memory_format(layout: str, dims: int) -> torch.memory_format | None:
    """torch's name of a layout for so many dimensions; None where torch has no such format."""
    if layout == "nchw":
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dims)


@dataclass(frozen=True)
class Inputs:
    """The tensors of op on one layer: x, dy and, where op adds one, residual [N, C, ...]; the others [C].

    Those are in float32 for a half type, as under autocast.
    """

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None
    op: str
    memory_format: torch.memory_format = torch.contiguous_format

    def to(self, memory_format: torch.memory_format) -> "Inputs":
        """The same values with x, dy and residual in memory_format."""
        large = {name: t for name, t in vars(self).items() if isinstance(t, Tensor) and t.dim() > 1}
        moved = {name: t.contiguous(memory_format=memory_format) for name, t in large.items()}
        return replace(self, **moved, memory_format=memory_format)


def make_inputs(shape: Sequence[int], dtype: torch.dtype, device: str, op: str = "bn") -> Inputs:
    """Random inputs, the same in every run on a device; each channel of x has its own mean and spread.

    dy is 0 where the argument of a ReLU, in training, is so near to 0 that a plausible error decides what passes.
    """
    rng = torch.Generator(device).manual_seed(0)
    channels = shape[1]
    per_channel = (channels, *[1] * (len(shape) - 2))
    param_dtype = dtype if dtype.itemsize > 2 else torch.float32

    def normal(*size: int, dtype: torch.dtype = param_dtype) -> Tensor:
        return torch.randn(size, generator=rng, dtype=dtype, device=device)

    def positive() -> Tensor:
        return torch.rand(channels, generator=rng, dtype=param_dtype, device=device) + 0.5

    x = normal(*shape, dtype=dtype).mul_(positive().view(per_channel)).add_(normal(*per_channel))
    dy = normal(*shape, dtype=dtype)
    weight, bias, mean, var = positive(), normal(channels), normal(channels), positive()
    residual = normal(*shape, dtype=dtype) if has_residual(op) else None
    if op != "bn":
        z = torch.batch_norm(x.to(param_dtype), weight, bias, None, None, True, MOMENTUM, EPS, False)
        if residual is not None:
            z += residual
        dy.masked_fill_(z.abs_() < PLAUSIBLE[dtype] * z.max(), 0)
    return Inputs(x, dy, weight, bias, mean, var, residual, op)
