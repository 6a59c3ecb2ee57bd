"""What is measured: the batch norm layers of ResNet-50, and the tensors that go in."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MODES = ("fwd", "bwd", "eval")  # training forward, training backward, inference forward
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOMENTUM, EPS = 0.1, 1e-5  # the defaults of torch.nn.BatchNorm2d


@dataclass(frozen=True)
class Case:
    """One layer: the shape C x H x W of an image, and how often the network has it."""

    channels: int
    height: int
    width: int
    count: int = 1

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


# He et al. 2016, table 1, for 224 x 224 images; v1.5: the stride of a bottleneck is in its 3x3 convolution.
RESNET50 = (
    Case(64, 112, 112, 1),
    Case(64, 56, 56, 6),
    Case(256, 56, 56, 4),
    Case(128, 56, 56, 1),
    Case(128, 28, 28, 7),
    Case(512, 28, 28, 5),
    Case(256, 28, 28, 1),
    Case(256, 14, 14, 11),
    Case(1024, 14, 14, 7),
    Case(512, 14, 14, 1),
    Case(512, 7, 7, 5),
    Case(2048, 7, 7, 4),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one layer: x and dy [N, C, H, W]; the others [C], in float32 for a half type as under autocast."""

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


def make_inputs(case: Case, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random inputs, the same in every run on a device; each channel of x has its own mean and spread."""
    rng = torch.Generator(device).manual_seed(0)
    channels = case.channels
    shape = (batch, channels, case.height, case.width)
    param_dtype = dtype if dtype.itemsize > 2 else torch.float32

    def normal(*size: int, dtype: torch.dtype = param_dtype) -> Tensor:
        return torch.randn(size, generator=rng, dtype=dtype, device=device)

    def positive() -> Tensor:
        return torch.rand(channels, generator=rng, dtype=param_dtype, device=device) + 0.5

    x = normal(*shape, dtype=dtype).mul_(positive().view(-1, 1, 1)).add_(normal(channels, 1, 1))
    dy = normal(*shape, dtype=dtype)
    return Inputs(x, dy, positive(), normal(channels), normal(channels), positive())
