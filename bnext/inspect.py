"""bn_stats: what the batch norms of a model or of a checkpoint hold, layer by layer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

TENSORS = ("running_mean", "running_var", "weight", "bias")
_KEYS = (*TENSORS, "num_batches_tracked")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Round numbers, told from what they do to a channel:
DEAD_WEIGHT = 1e-3  # a thousandth of a new layer's; beside such channels, less than a rounding of bfloat16 (4e-3)
DEAD_VAR = 1e-7  # a hundredth of torch's eps, which then decides: the channel comes out with a tenth of weight, or less
EXPLODING_VAR = 1e6  # inputs deviate by 1000: a thousandth of the gradient passes, and float16 ends at 65 deviations


@dataclass(frozen=True)
class Range:
    """Of a tensor's finite values, nan where there are none; nonfinite: how many are infinite or nan."""

    min: float
    mean: float
    max: float
    nonfinite: int


@dataclass(frozen=True)
class LayerStats:
    """One batch norm. None is what it has not, or what a state dict does not tell.

    dead: channels with |weight| < DEAD_WEIGHT or running_var < DEAD_VAR, whose output hardly depends on the input.
    exploding: channels with running_var > EXPLODING_VAR.
    """

    name: str  # without what wrappers put before it (module., _orig_mod.); "" for a model that is a layer itself
    kind: str | None  # package and class, such as torch.BatchNorm2d
    channels: int | None
    running_mean: Range | None
    running_var: Range | None
    weight: Range | None
    bias: Range | None
    dead: int
    exploding: int
    num_batches_tracked: int | None
    frozen: bool | None  # by freeze_batchnorm

    @property
    def nonfinite(self) -> int:
        """How many values of the four tensors are infinite or nan."""
        ranges = (getattr(self, name) for name in TENSORS)
        return sum(found.nonfinite for found in ranges if found)


def bn_stats(module_or_state_dict: nn.Module | Mapping[str, Any]) -> list[LayerStats]:
    """A row for each batch norm, in the model's order.

    Of a module: torch's batch norms and their subclasses, and whatever else has a running_mean and a running_var. Of a
    state dict: each name with both; the four tensors may be of any floating dtype and device. InstanceNorm with running
    statistics has them too, and is among them. State dicts are also found inside of dicts, under whatever keys
    ("state_dict", "model", "model_ema", ...); where several hold batch norms, the keys come before the layers' names.

    Raises TypeError for what is neither, and ValueError for tensors without values (meta, lazy) or of different sizes
    in one layer.
    """
    if not isinstance(module_or_state_dict, nn.Module | Mapping):
        raise TypeError(f"expected an nn.Module or a state dict, got {type(module_or_state_dict).__name__}")
    found = list(_layers(module_or_state_dict, ""))
    several = len({path for path, *_ in found}) > 1
    return [_row((path if several else "") + _bare(name), *rest) for path, name, *rest in found]


def _layers(
    source: nn.Module | Mapping[Any, Any], path: str
) -> Iterator[tuple[str, str, Mapping[str, Any], nn.Module | None]]:
    """Path in nested dicts, name, tensors and, if there is one, module of each layer."""
    if isinstance(source, nn.Module):
        for name, layer in source.named_modules():
            tensors = _tensors({key: getattr(layer, key, None) for key in _KEYS}, "")
            if isinstance(layer, _BatchNorm) or _has_statistics(tensors):
                yield path, name, tensors, layer
        return
    for key, value in source.items():
        if isinstance(value, nn.Module | Mapping):
            yield from _layers(value, f"{path}{key}.")
        elif isinstance(key, str) and key.rpartition(".")[2] == "running_mean":
            prefix = key.removesuffix("running_mean")
            tensors = _tensors(source, prefix)
            if _has_statistics(tensors):
                yield path, prefix.removesuffix("."), tensors, None


def _tensors(source: Mapping[str, Any], prefix: str) -> dict[str, Tensor | None]:
    """Of one layer; None for what is something else: another class may have bias=True, another format an int."""
    found = {key: source.get(prefix + key) for key in _KEYS}
    return {key: value if isinstance(value, Tensor) else None for key, value in found.items()}


def _has_statistics(tensors: Mapping[str, Tensor | None]) -> bool:
    return tensors["running_mean"] is not None and tensors["running_var"] is not None


def _bare(name: str) -> str:
    """Without what torch.compile, FSDP, checkpoint_wrapper, DataParallel, DDP and AveragedModel put into names."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(dropwhile("module".__eq__, parts))


def _row(name: str, tensors: Mapping[str, Tensor | None], layer: nn.Module | None) -> LayerStats:
    for key, tensor in tensors.items():
        if tensor is not None and (is_lazy(tensor) or tensor.is_meta):
            raise ValueError(f"expected {key} of {name or 'the layer'} to have values, got a lazy or meta tensor")
    values = {key: _values(tensors[key]) for key in TENSORS}
    sizes = {len(v) for v in values.values() if v is not None}
    if len(sizes) > 1:
        raise ValueError(f"expected the tensors of {name or 'the layer'} to be of one size, got {sorted(sizes)}")
    weight, var, counter = values["weight"], values["running_var"], tensors["num_batches_tracked"]
    none = torch.zeros(max(sizes, default=0), dtype=torch.bool, device="cpu")
    dead = (none if weight is None else weight.abs() < DEAD_WEIGHT) | (none if var is None else var < DEAD_VAR)
    return LayerStats(
        name=name,
        kind=None if layer is None else f"{type(layer).__module__.partition('.')[0]}.{type(layer).__qualname__}",
        channels=max(sizes, default=getattr(layer, "num_features", None)),
        **{key: None if v is None else _range(v) for key, v in values.items()},
        dead=int(dead.sum()),
        exploding=0 if var is None else int((var > EXPLODING_VAR).sum()),
        num_batches_tracked=None if counter is None else int(counter),
        frozen=None if layer is None else getattr(layer, "frozen_stats", False),
    )


def _values(tensor: Tensor | None) -> Tensor | None:
    """Flat and in float64, on the CPU."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64).flatten()


def _range(values: Tensor) -> Range:
    finite = values[values.isfinite()]
    low, mean, high = (f().item() for f in (finite.min, finite.mean, finite.max)) if len(finite) else [math.nan] * 3
    return Range(low, mean, high, len(values) - len(finite))
