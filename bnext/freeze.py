"""freeze_batchnorm and unfreeze_batchnorm: batch norms that stay what they are while the rest of a model trains."""

import logging
from typing import TypeVar

from torch import nn

from bnext.convert import TO_BNEXT, described, reclass
from bnext.modules import _Forward

_log = logging.getLogger("bnext")
_Module = TypeVar("_Module", bound=nn.Module)


def freeze_batchnorm(module: _Module, stats: bool = True, affine: bool = True) -> _Module:
    """Freezes every batch norm in module (itself included), in place, until unfreeze_batchnorm; returns module.

    stats: a layer normalises by its running buffers, and leaves them and num_batches_tracked alone, as in evaluation,
    whatever train() makes of its training flag. reset_running_stats() leaves them too; load_state_dict() does not.
    affine: its parameters have requires_grad=False, and lose the gradient that they may have, which an optimizer would
    still apply. Freezing again adds to what is frozen.

    Layers of torch's exact classes become bnext's, as by convert_batchnorm. A warning of the "bnext" logger names what
    is not frozen: batch norms of other classes (subclasses of torch's, lazy, SyncBatchNorm), and the statistics of
    layers that have no running buffers.
    """
    left = {name: layer for name, layer in reclass(module, TO_BNEXT).items() if not isinstance(layer, _Forward)}
    if left:
        _log.warning("not frozen, their class or forward not bnext's: %s", described(left))
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _Forward)}
    if stats:
        _freeze_stats(layers)
    if affine:
        _freeze_affine(layers)
    return module


def _freeze_stats(layers: dict[str, _Forward]) -> None:
    without = {}
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            without[name] = layer
        else:
            layer.frozen_stats = True
    if without:
        _log.warning("statistics not frozen, for want of running_mean and running_var: %s", described(without))


def _freeze_affine(layers: dict[str, _Forward]) -> None:
    for layer in layers.values():  # all, before any parameter is switched off: it may belong to two layers
        layer.frozen_affine = tuple(
            name for name, p in layer.named_parameters() if p.requires_grad or name in layer.frozen_affine
        )
    for layer in layers.values():
        for p in layer.parameters():
            p.requires_grad_(False).grad = None


def unfreeze_batchnorm(module: _Module) -> _Module:
    """Undoes freeze_batchnorm, however often and with what arguments it was called, in place; returns module.

    Parameters that it switched off require a gradient again, those of the same name that took their place too; others
    are left alone.
    """
    for layer in module.modules():
        if isinstance(layer, _Forward):
            for name, p in layer.named_parameters():
                if name in layer.frozen_affine:
                    p.requires_grad_()
            vars(layer).pop("frozen_stats", None)
            vars(layer).pop("frozen_affine", None)
    return module
