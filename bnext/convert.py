"""convert_batchnorm and revert_batchnorm: change which class a model's batch norms are of, and nothing else."""

import logging
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

_TO_BNEXT: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_BNEXT.items()}

_log = logging.getLogger("bnext")
_Module = TypeVar("_Module", bound=nn.Module)


def convert_batchnorm(module: _Module) -> _Module:
    """Makes every torch.nn.BatchNorm1d/2d/3d in module (itself included) the bnext class of the same name, in place.

    Each layer stays the same object, with the same Parameters, buffers, hooks, mode and name, so optimizers, ties and
    references to it stay valid. Only torch's exact classes are converted; other batch norms (subclasses, lazy,
    SyncBatchNorm) are left as they are and named in a warning of the "bnext" logger. Returns module.
    """
    return _reclass(module, _TO_BNEXT)


def revert_batchnorm(module: _Module) -> _Module:
    """Undoes convert_batchnorm: makes every bnext batch norm in module torch's own again, in place; returns module.

    Layers that skip_nonfinite=True guarded, which torch's cannot, are named in a warning of the "bnext" logger.
    """
    guarded = [n or "(root)" for n, m in module.named_modules() if type(m) in _TO_TORCH and m.skip_nonfinite]
    if guarded:
        _log.warning("running statistics no longer guarded, as by skip_nonfinite=True: %s", ", ".join(guarded))
    return _reclass(module, _TO_TORCH)


def _reclass(module: _Module, classes: dict[type, type]) -> _Module:
    done, skipped = 0, []
    for name, layer in module.named_modules():
        if type(layer) in classes:
            layer.__class__ = classes[type(layer)]
            done += 1
        elif isinstance(layer, _BatchNorm) and type(layer) not in classes.values():
            skipped.append(f"{name or '(root)'}: {type(layer).__module__}.{type(layer).__qualname__}")
    _log.info("%d batch norm layers changed to %s", done, next(iter(classes.values())).__module__)
    if skipped:
        _log.warning("left as they are, not exactly torch's or bnext's classes: %s", ", ".join(skipped))
    return module
