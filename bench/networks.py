"""The networks that are trained: residual ones, with torch's batch norm; sums and ReLUs in place, as torchvision's."""

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out)]


def _conv_relu(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [*_conv(c_in, c_out, kernel, stride), nn.ReLU(inplace=True)]


class _Residual(nn.Module):
    """A block of He et al. 2016: a body, and beside it a shortcut, a projection where the shape changes."""

    def __init__(self, body: list[nn.Module], c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*(_conv(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else ()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def _basic(c_in: int, c_out: int, stride: int) -> _Residual:
    body = [*_conv_relu(c_in, c_out, 3, stride), *_conv(c_out, c_out, 3)]
    return _Residual(body, c_in, c_out, stride)


def _bottleneck(c_in: int, width: int, stride: int) -> _Residual:
    c_out = 4 * width
    body = [*_conv_relu(c_in, width, 1), *_conv_relu(width, width, 3, stride), *_conv(width, c_out, 1)]
    return _Residual(body, c_in, c_out, stride)


def _classifier(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def small_resnet() -> nn.Sequential:
    """Images [N, 1, 8, 8] to scores [N, 10]; nine batch norm layers, two of them in shortcuts."""
    blocks = [_basic(16, 16, 1), _basic(16, 32, 2), _basic(32, 64, 2)]
    return nn.Sequential(*_conv_relu(1, 16, 3), *blocks, *_classifier(64, 10))


def resnet50() -> nn.Sequential:
    """Images [N, 3, H, W] to scores [N, 1000]; 53 batch norm layers. As torchvision's: v1.5, the 3x3 has the stride.

    Each block begins as its shortcut (Goyal et al. 2017, arXiv:1706.02677); otherwise the first gradients are so large
    that they turn a rounding into another loss within two steps.
    """
    blocks, c_in = [], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            blocks.append(_bottleneck(c_in, width, stride if i == 0 else 1))
            nn.init.zeros_(blocks[-1].body[-1].weight)
            c_in = 4 * width
    return nn.Sequential(*_conv_relu(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks, *_classifier(c_in, 1000))
