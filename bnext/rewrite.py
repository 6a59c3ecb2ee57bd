"""What a model is made of where batch norms apply the activations that followed them, and the way back."""

import functools
from typing import Any

from torch import nn
from torch.fx.graph_module import _forward_from_src

from bnext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)

WITH_ACT: dict[type, type] = {
    BatchNorm1d: BatchNormAct1d,
    BatchNorm2d: BatchNormAct2d,
    BatchNorm3d: BatchNormAct3d,
}
_WITHOUT_ACT = {fused: plain for plain, fused in WITH_ACT.items()}


class FusedActivation(nn.Identity):
    """An activation module that passes on what it gets: the batch norm before it applies it.

    An activation becomes one by absorb(), and stays the same object, with its attributes.
    """

    def extra_repr(self) -> str:
        return f"{self.was.__name__} of the batch norm before"


class Rewritten(nn.Module):
    """A module whose forward was written anew; its class is a subclass of what it was, of the same name.

    Such a class is made when needed, of what it was, _bnext_source and _bnext_norms, and pickled as these.
    """

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (type(self).__bases__[1], self._bnext_source, self._bnext_norms), *state)


def absorb(activation: nn.Module, norm: nn.Module) -> None:
    """Makes activation a FusedActivation of norm."""
    activation.was, activation.norm = type(activation), (norm,)  # a tuple: no child of it
    activation.__class__ = FusedActivation


def rewrite(module: nn.Module, source: str, norms: list[str]) -> None:
    """Gives module the forward that source defines, in which the batch norms of these names apply activations."""
    module.__class__ = _rewritten(type(module), source, tuple(norms))


@functools.cache
def _rewritten(cls: type, source: str, norms: tuple[str, ...]) -> type:
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward": _forward_from_src(source, {}),
        "_bnext_source": source,
        "_bnext_norms": norms,
    }
    return type(cls.__name__, (Rewritten, cls), members)


def _new(cls: type, source: str, norms: tuple[str, ...]) -> nn.Module:
    rewritten = _rewritten(cls, source, norms)
    return rewritten.__new__(rewritten)


def fused_norms(module: nn.Module) -> set[nn.Module]:
    """The batch norms that fuse_batchnorm_act gave activations; ValueError where part of what it did lies outside."""
    inside, norms = set(module.modules()), set()
    for m in inside:
        if isinstance(m, FusedActivation):
            norms.update(m.norm)
        elif isinstance(m, Rewritten):
            norms.update(map(m.get_submodule, m._bnext_norms))
    if any(norm not in inside or type(norm) not in _WITHOUT_ACT for norm in norms):
        raise ValueError("expected all that was fused together, batch norms and activations, got a part of it")
    return norms


def unfuse(module: nn.Module) -> None:
    """Undoes what fuse_batchnorm_act did in module; raises, and changes nothing, where fused_norms() does."""
    for norm in fused_norms(module):
        norm.__class__ = _WITHOUT_ACT[type(norm)]
        del norm.act
    for m in module.modules():
        if isinstance(m, FusedActivation):
            m.__class__ = m.was
            del m.was, m.norm
        elif isinstance(m, Rewritten):
            m.__class__ = type(m).__bases__[1]
