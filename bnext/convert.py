"""convert_batchnorm and revert_batchnorm: change which class a model's batch norms are of, and nothing else."""

import logging
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnext.rewrite import WITH_ACT, fused_norms, unfuse

TO_BNEXT: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_ACTS = tuple(WITH_ACT.values())
_TO_TORCH = {ours: theirs for theirs, ours in TO_BNEXT.items()}

_log = logging.getLogger("bnext")
_Module = TypeVar("_Module", bound=nn.Module)


def convert_batchnorm(module: _Module) -> _Module:
    """Makes every torch.nn.BatchNorm1d/2d/3d in module (itself included) the bnext class of the same name, in place.

    Each layer stays the same object, with the same Parameters, buffers, hooks, mode and name, so optimizers, ties and
    references to it stay valid. Only torch's exact classes are converted; other batch norms (subclasses, parametrized
    ones among them, lazy, SyncBatchNorm, scripted, or with a forward of their own set on them) are left as they are and
    named in a warning of the "bnext" logger. Returns module.
    """
    _warn(reclass(module, TO_BNEXT))
    return module


def revert_batchnorm(module: _Module) -> _Module:
    """Undoes convert_batchnorm: makes every bnext batch norm in module torch's own again, in place; returns module.

    Undoes fuse_batchnorm_act first. Raises ValueError, and changes nothing, where layers are frozen, since torch's
    classes would thaw them in training; where layers built as BatchNormAct1d/2d/3d have activations, which torch's have
    not; and where module holds but a part of what was fused. Layers that skip_nonfinite=True guarded, which torch's
    cannot, are named in a warning of the "bnext" logger.
    """
    fused = fused_norms(module)
    named = {name or "(root)": layer for name, layer in module.named_modules()}
    layers = {name: layer for name, layer in named.items() if type(layer) in _TO_TORCH or layer in fused}
    frozen = [name for name, layer in layers.items() if layer.frozen_stats or layer.frozen_affine]
    if frozen:
        raise ValueError(
            "revert_batchnorm: expected no frozen layers, since torch's classes do not stay frozen, got "
            f"{', '.join(frozen)}; unfreeze_batchnorm comes first"
        )
    built = [name for name, layer in named.items() if isinstance(layer, _ACTS) and layer not in fused]
    if built:
        raise ValueError(
            "revert_batchnorm: expected no layers with an activation, since torch's classes have none, got "
            f"{', '.join(built)}"
        )
    unfuse(module)
    guarded = [name for name, layer in layers.items() if layer.skip_nonfinite]
    if guarded:
        _log.warning("running statistics no longer guarded, as by skip_nonfinite=True: %s", ", ".join(guarded))
    _warn(reclass(module, _TO_TORCH))
    return module


def reclass(module: nn.Module, classes: dict[type, type]) -> dict[str, nn.Module]:
    """Makes layers of a class in classes of the class it maps to; returns what other batch norms there are, by name."""
    done, left = 0, {}
    for name, layer in module.named_modules():
        if type(layer) in classes and "forward" not in vars(layer):
            layer.__class__ = classes[type(layer)]
            done += 1
        elif _is_batch_norm(layer) and type(layer) not in (*classes.values(), *_ACTS):
            left[name] = layer
    _log.info("%d batch norm layers changed to %s", done, next(iter(classes.values())).__module__)
    return left


def _is_batch_norm(layer: nn.Module) -> bool:
    if isinstance(layer, torch.jit.ScriptModule):  # what it was made of has left its name
        return layer.original_name in {cls.__name__ for cls in TO_BNEXT}
    return isinstance(layer, _BatchNorm)


def described(layers: dict[str, nn.Module]) -> str:
    """Names and classes, for a warning."""
    return ", ".join(
        f"{name or '(root)'}: {type(layer).__module__}.{type(layer).__qualname__}" for name, layer in layers.items()
    )


def _warn(left: dict[str, nn.Module]) -> None:
    if left:
        _log.warning("left as they are, their class or forward not exactly torch's or bnext's: %s", described(left))
