"""A training task of seconds: a small ResNet and the handwritten digits of scikit-learn."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TEST_IMAGES = 360  # a fifth


class _Block(nn.Module):
    """The basic block of He et al. 2016: two 3x3 convolutions, and a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.shortcut = nn.Sequential()
        if c_in != c_out:
            self.shortcut.append(nn.Conv2d(c_in, c_out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Images [N, 1, 8, 8] to scores [N, 10]; nine batch norm layers, two of them in shortcuts."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _Block(16, 16, 1),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def load(rng: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N] to train on, then to test on: 1797 scans, split by rng."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("python -m bench train needs the digits of scikit-learn: pip install scikit-learn")
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=rng)
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    return (images[train], labels[train]), (images[test], labels[test])
