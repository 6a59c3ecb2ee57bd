"""update_bn: running statistics of all that a model sees in a pass over data, as if it came in one batch."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from bnext.reference import Moments, batch_stats, combine

_CHUNK = 1 << 22  # elements that are copied to float64 at a time

_log = logging.getLogger("bnext")


def update_bn(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    num_batches: int | None = None,
    forward: Callable[[Any, Any], object] | None = None,
    progress: bool = False,
) -> None:
    """Sets running_mean and running_var [C] of model's batch norms to mean and unbiased variance of all that they see.

    As torch.optim.swa_utils.update_bn, which averages over batches, but exact: count, mean and M2 of the batches are
    merged in float64, whatever their sizes. num_batches_tracked becomes their number. Where torch.distributed is
    initialised the batches are those of all ranks: each has to call, and may have none.

    Meanwhile these layers normalise by the batch, as in training, and all else in the model is in evaluation, as when
    it predicts: without dropout, which torch's leaves on. Layers that are frozen (bnext.freeze_batchnorm) or do not
    track statistics belong to all else. Modes and momentum are restored, also after an error, which leaves the buffers
    as they were.

    loader: any iterable. The model is called with each batch, or the first item of a tuple or list; or, if given,
    forward(model, batch) is. device: where the tensors of a batch are moved to first. num_batches: after how many
    to stop. progress: whether to show a bar on standard error, for which rich has to be installed.

    Where a batch is one value per channel, which torch refuses in training, that is normalised to 0, as by itself.
    Layers that saw no values keep their statistics, and a warning of the "bnext" logger names them. Raises ValueError
    for no batches, for statistics that are not finite, for num_batches below 1 and for a lazy layer that knows no
    channels yet; TypeError for a batch that needs forward.
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"expected num_batches to be at least 1, or None for all, got {num_batches}")
    layers = {name or "(root)": layer for name, layer in model.named_modules() if _is_measured(layer)}
    if not layers:
        _log.warning("update_bn: the model has no batch norm that tracks statistics and is not frozen")
        return
    if lazy := [name for name, layer in layers.items() if is_lazy(layer.running_mean)]:
        raise ValueError(f"expected a model that has seen a batch, got lazy layers: {', '.join(lazy)}")
    seen = {name: _Seen() for name in layers}
    drawn: Iterable[Any] = islice(loader, num_batches)
    if progress:
        drawn = _with_bar(drawn, loader, num_batches)
    batches = 0
    # Compiled models run as they are: to compile this pass would take longer than the pass.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _measuring(model, layers, seen):
        for batch in drawn:
            if device is not None:
                batch = tree_map_only(Tensor, lambda t: t.to(device), batch)
            (forward or _forward)(model, batch)
            batches += 1
    if distributed.is_available() and distributed.is_initialized():
        batches, seen = _of_all_ranks(batches, seen)
    if batches == 0:
        raise ValueError("expected the loader to have at least one batch, got none")
    _write(layers, seen)


def _with_bar(batches: Iterable[Any], loader: Iterable[Any], num_batches: int | None) -> Iterable[Any]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        raise ImportError("progress=True needs rich: pip install rich") from None
    try:
        total = min(len(loader), num_batches or len(loader))  # type: ignore[arg-type]
    except TypeError:  # as of a generator, or of a DataLoader of an IterableDataset
        total = num_batches
    return track(batches, "update_bn", total, console=Console(stderr=True))


def _is_measured(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) or getattr(layer, "frozen_stats", False):
        return False
    return layer.track_running_stats and layer.running_mean is not None


class _Seen:
    """What a layer was given: how often, and the moments of it all, None of nothing. Gathers in the layer's hooks."""

    def __init__(self) -> None:
        self.calls = 0
        self.moments: Moments | None = None
        self.twice = False

    def before(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """One value per channel comes twice: torch refuses to normalise it alone, and it becomes 0 either way."""
        input = args[0] if args else keywords["input"]
        alone = input.dim() > 1 and input.shape[1] == input.numel() > 0
        self.twice = alone and not isinstance(layer, nn.SyncBatchNorm)  # beside which are other ranks' values
        if not self.twice:
            return None
        input = torch.cat([input, input])
        return ((input, *args[1:]), keywords) if args else ((), {**keywords, "input": input})

    def after(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Any:
        input = args[0] if args else keywords["input"]
        input = input[:1] if self.twice else input
        self.add(1, _moments(input) if input.numel() > 0 else None)
        return output[:1] if self.twice else None

    def add(self, calls: int, moments: Moments | None) -> None:
        self.calls += calls
        both = [m for m in (self.moments, moments) if m is not None]
        self.moments = reduce(combine, both) if both else None


def _moments(input: Tensor) -> Moments:
    """Of input [N, C, *], in float64, some samples at a time: a copy of all of it would be large."""
    found = []
    for part in input.split(max(1, _CHUNK // input[0].numel())):
        mean, var, _ = batch_stats(part.double(), eps=0.0)
        count = part.numel() // part.shape[1]
        found.append(Moments(count, mean, var * count))
    return reduce(combine, found)


@contextlib.contextmanager
def _measuring(model: nn.Module, layers: dict[str, _BatchNorm], seen: dict[str, _Seen]) -> Iterator[None]:
    """Layers normalise by the batch, leave their buffers alone and show their inputs; all else is in evaluation."""
    measured = set(layers.values())
    with_modes = [module for module in model.modules() if hasattr(module, "training")]  # torch.jit.freeze takes it away
    changes = [(module, "training", module in measured) for module in with_modes]
    changes += [(layer, "track_running_stats", False) for layer in measured]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    hooks = []
    for name, layer in layers.items():  # nearest to the layer's forward, on both sides
        hooks.append(layer.register_forward_pre_hook(seen[name].before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(seen[name].after, prepend=True, with_kwargs=True))
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for change in before:
            setattr(*change)


def _forward(model: nn.Module, batch: Any) -> None:
    input = batch[0] if isinstance(batch, (list, tuple)) else batch
    if isinstance(input, Mapping):
        raise TypeError(
            f"expected a batch to be a Tensor, or a tuple or list that begins with one, got {type(input).__name__}: "
            "say how to call the model by forward=, such as lambda model, batch: model(batch['image'])"
        )
    model(input)


def _of_all_ranks(batches: int, seen: dict[str, _Seen]) -> tuple[int, dict[str, _Seen]]:
    """The same merged over the ranks, in their order, so that each gets the same bits."""

    def on_cpu(m: Moments | None) -> Moments | None:
        return m and Moments(m.count, m.mean.cpu(), m.m2.cpu())

    mine = {name: (of_layer.calls, on_cpu(of_layer.moments)) for name, of_layer in seen.items()}
    ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(ranks, (batches, mine))
    merged = {name: _Seen() for name in seen}
    for _, found in ranks:
        for name, of_layer in found.items():
            merged[name].add(*of_layer)
    return sum(count for count, _ in ranks), merged


def _write(layers: dict[str, _BatchNorm], seen: dict[str, _Seen]) -> None:
    """Sets the buffers of the layers that saw something; raises before it has set any."""
    values: list[tuple[Tensor, Tensor]] = []
    for name, layer in layers.items():
        if (moments := seen[name].moments) is None:
            continue
        statistics = {"running_mean": moments.mean, "running_var": moments.m2 / (moments.count - 1)}
        for key, statistic in statistics.items():
            buffer = getattr(layer, key)
            value = statistic.to(buffer.dtype)
            if not value.isfinite().all():
                raise ValueError(f"expected finite statistics, got inf or NaN in {key} of {name}")
            values.append((buffer, value))
        if layer.num_batches_tracked is not None:
            values.append((layer.num_batches_tracked, torch.tensor(seen[name].calls)))
        if (skipped := getattr(layer, "skipped_batches", None)) is not None:
            values.append((skipped, torch.tensor(0)))
    for buffer, value in values:
        buffer.copy_(value)
    if unseen := [name for name in layers if seen[name].moments is None]:
        _log.warning("update_bn: left as they are, for they saw no values: %s", ", ".join(unseen))
