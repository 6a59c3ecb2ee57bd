"""What is measured: a case, and the tensors that go in."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

MODES = ("fwd", "bwd", "fwd_bwd", "eval")  # training forward, its backward, both, inference forward
LAYOUTS = ("nchw", "nhwc")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOMENTUM, EPS = 0.1, 1e-5  # the defaults of torch.nn.BatchNorm2d

PASSES = {"fwd": 2, "bwd": 3, "fwd_bwd": 5, "eval": 2}


@dataclass(frozen=True)
class Case:
    """One layer in one mode: shape N, C and any spatial sizes; count is how often its network has the layer."""

    suite: str
    layer: str
    shape: tuple[int, ...]
    count: int
    mode: str
    layout: str
    dtype: str
    device: str
    threads: int

    @property
    def tensor_bytes(self) -> int:
        """Of one tensor [N, C, ...]."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        """What must move of the tensors [N, C, ...]: fwd and eval read x, write y; bwd reads x and dy, writes dx.

        fwd_bwd is the sum of fwd and bwd. What is read or written per channel is not counted.
        """
        return PASSES[self.mode] * self.tensor_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields, and bytes."""
        return asdict(self) | {"shape": list(self.shape), "bytes": self.bytes}


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
    """The tensors of one layer: x and dy [N, C, ...]; the others [C], in float32 for a half type as under autocast."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    memory_format: torch.memory_format = torch.contiguous_format

    def to(self, memory_format: torch.memory_format) -> "Inputs":
        """The same values with x and dy in memory_format."""
        x, dy = (t.contiguous(memory_format=memory_format) for t in (self.x, self.dy))
        return replace(self, x=x, dy=dy, memory_format=memory_format)


def make_inputs(shape: Sequence[int], dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs, the same in every run on a device; each channel of x has its own mean and spread."""
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
    return Inputs(x, dy, positive(), normal(channels), normal(channels), positive())
