"""What the checks of the CUDA kernels share: small GPUs, strategies, one training step."""

from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu import emulated
from torch import Tensor

import bnext

STRATEGIES = ["streaming", "block"]
ALL = [True, True, True]

# GPUs of one multiprocessor, and of sixteen.
ONE = {"multiprocessors": 1, "shared_per_block": 44 * 1024, "shared_per_multiprocessor": 90 * 1024}
SIXTEEN = {"multiprocessors": 16, "clustered": (16, 16, 16, 16)}
# With several slabs for each group of blocks.
TWO = {"multiprocessors": 2, "clustered": (2, 0, 0, 0)}
TEN = {"multiprocessors": 10, "shared_per_block": 24 * 1024, "shared_per_multiprocessor": 52 * 1024}
# One that each strategy can take whatever the dtype, on a GPU of sixteen.
EACH = {"streaming": (4, 16, 16, 16), "block": (4, 16, 16, 16), "cluster": (16, 8, 16, 32), "grid": (16, 8, 16, 32)}

by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def on_a_small_gpu(one_thread: None) -> Iterator[None]:
    """A fixture, once a file says so."""
    if emulated.module is None:
        pytest.skip("needs --cuda-on-cpu checked")
    emulated.reset()
    yield
    emulated.reset()


def train(
    x: Tensor, arguments: dict[str, Tensor], momentum: float | None = 0.1, skipped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Output, mean, invstd, running_mean, running_var and counter of one batch, on copies of the buffers."""
    buffers = [arguments["running_mean"].clone(), arguments["running_var"].clone(), torch.tensor(4)]
    saved = bnext.ops.batch_norm_train(x, arguments["weight"], arguments["bias"], *buffers, momentum, 1e-5, skipped)
    return (*saved, *buffers)
