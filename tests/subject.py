"""The batch norm under test: bnext's, or what `pytest tests --bn MODULE:CLASS --functional MODULE:FUNCTION` names.

Tests say subject.batch_norm and subject.BatchNorm1d/2d/3d. Of a CLASS with "2d" in its name, the classes of its module
named alike for 1d and 3d stand beside it. With --bn alone the function is made of the classes; with --functional alone
there are no classes, and their tests are skipped.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bnext

is_bnext = True
cuda_kernels = False  # whether bnext's CUDA kernels run, on a GPU or executed on the CPU
has_functional = True  # a function of its own, not one made of the classes
batch_norm: Callable[..., Tensor] = bnext.batch_norm
_classes: dict[str, type | None] = {}


def _find(target: str, option: str) -> Any:
    module, _, name = target.partition(":")
    if not module or not name:
        raise pytest.UsageError(f"{option}: expected MODULE:NAME, got {target!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"{option}: {error}") from error


def choose(bn: str | None, functional: str | None) -> None:
    """Takes the subject from the two options; without any it is bnext."""
    global is_bnext, has_functional, batch_norm
    bnexts = ("bnext:BatchNorm2d", "bnext:batch_norm")
    is_bnext = all(given in (None, own) for given, own in zip((bn, functional), bnexts, strict=True))
    if is_bnext:
        return
    for dim in ("1d", "2d", "3d"):
        _classes[f"BatchNorm{dim}"] = None
    if bn is not None:
        chosen = _find(bn, "--bn")
        names = {d: chosen.__name__.replace("2d", d) for d in ("1d", "3d")} if "2d" in chosen.__name__ else {}
        module = importlib.import_module(bn.partition(":")[0])
        for dim, name in {**names, "2d": chosen.__name__}.items():
            _classes[f"BatchNorm{dim}"] = getattr(module, name, None)
    has_functional = functional is not None
    batch_norm = _find(functional, "--functional") if has_functional else _through_the_module


def __getattr__(name: str) -> type:
    """BatchNorm1d, BatchNorm2d, BatchNorm3d."""
    if not name.startswith("BatchNorm"):
        raise AttributeError(name)
    found = getattr(bnext, name) if is_bnext else _classes[name]
    if found is None:
        pytest.skip(f"no {name} to test")
    return found


def _through_the_module(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The signature of F.batch_norm, by a module that is given these tensors."""
    if not 2 <= input.dim() <= 5:
        pytest.skip(f"no module takes {input.dim()} dimensions")
    cls = __getattr__(f"BatchNorm{max(input.dim() - 2, 1)}d")
    tracks = running_mean is not None
    layer = cls(input.shape[1], eps=eps, momentum=momentum, affine=True, track_running_stats=tracks).train(training)
    given = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name in [name for name, tensor in given.items() if tensor is None]:
        setattr(layer, name, None)
        del given[name]
    return torch.func.functional_call(layer, given, (input,))
