"""The data of a training of seconds: the handwritten digits of scikit-learn."""

import sys

import torch
from torch import Tensor

TEST_IMAGES, TRAIN_IMAGES = 360, 1437  # a fifth to test on


def load(rng: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N] to train on, then to test on: 1797 scans, split by rng."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("python -m bench train needs the digits of scikit-learn: pip install scikit-learn")
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=rng)
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return (images[train], labels[train]), (images[test], labels[test])
