"""The training run: one model trained twice from the same start, with torch's batch norm and with bnext's.

Floating-point trajectories drift apart: the two batch norms round differently, and SGD amplifies that step by
step, as it would if torch's own initial weights were changed by 1e-7. So the losses have to agree closely only
in the first epoch, where a wrong gradient shows and the drift is still small; the accuracies, after the last.
"""

import argparse
import copy
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from bench import digits, report, timing
from bench.opcount import OpCounter

_BATCH = 64
_MIN_ACCURACY = 0.95
_ACCURACY_TOLERANCE = 0.01
_FIRST_LOSS_TOLERANCE = 1e-3  # relative


class _Trainee:
    """A model with its optimizer; the seconds of every step, the mean loss of every epoch."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One SGD step, timed; the loss before it."""
        loss, seconds = timing.timed(partial(self._step, images, labels))
        self.seconds.append(seconds)
        return loss

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images recognised, in eval mode."""
        self.model.eval()
        correct = self.model(images).argmax(1) == labels
        self.model.train()
        return correct.double().mean().item()


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, or 1 if a training fell short or the two disagree."""
    timing.keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    train, test = digits.load(rng)
    model = digits.resnet()
    steps = args.epochs * (len(train[0]) // _BATCH)
    ours = _Trainee(bnext.convert_batchnorm(copy.deepcopy(model)), steps)
    theirs = _Trainee(model, steps)
    layers = sum(isinstance(layer, _BatchNorm) for layer in ours.model.modules())
    print(f"ResNet with {layers} batch norms on 8x8 digits, batch {_BATCH}, {report.versions(args.threads)}")
    print(f"on {report.machine()}\n")
    faults = _conversion_faults(ours.model, *(t[:_BATCH] for t in train))
    print("epoch  loss: torch     bnext   test accuracy: torch    bnext")
    for epoch in range(1, args.epochs + 1):
        _epoch(theirs, ours, train, rng)
        accuracies = [each.accuracy(*test) for each in (theirs, ours)]
        print(
            f"{epoch:5}{theirs.losses[-1]:13.6f}{ours.losses[-1]:10.6f}{accuracies[0]:23.2%}{accuracies[1]:9.2%}",
            flush=True,
        )
    print(_summary(theirs, ours))
    faults += _result_faults([each.losses[0] for each in (theirs, ours)], accuracies)
    for fault in faults:
        print(f"WRONG  {fault}")
    return 1 if faults else 0


def _epoch(theirs: _Trainee, ours: _Trainee, train: tuple[Tensor, Tensor], rng: torch.Generator) -> None:
    """One pass over the full batches of train: both make each step, taking turns at going first."""
    order = torch.randperm(len(train[0]), generator=rng)
    batches = order[: len(order) - len(order) % _BATCH].split(_BATCH)
    totals = {theirs: 0.0, ours: 0.0}
    for i, batch in enumerate(batches):
        for trainee in (theirs, ours) if i % 2 == 0 else (ours, theirs):
            totals[trainee] += trainee.step(*(t[batch] for t in train))
    for trainee, total in totals.items():
        trainee.losses.append(total / len(batches))


def _summary(theirs: _Trainee, ours: _Trainee) -> str:
    """How far the loss curves are apart, and what a step takes."""
    apart = max(abs(a - b) / a for a, b in zip(theirs.losses, ours.losses, strict=True))
    times = [1e3 * statistics.median(each.seconds) for each in (theirs, ours)]
    return (
        f"\nper-epoch losses differ by at most {apart:.1e}, relative to torch's\n"
        f"median step: torch {times[0]:.2f} ms, bnext {times[1]:.2f} ms, speedup {times[0] / times[1]:.2f}x"
    )


def _conversion_faults(model: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    """What shows that model does not run on bnext: a layer's class, or an op that a trial did not call."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    faults = [f"{type(layer)} was not converted" for layer in layers if type(layer) is not bnext.BatchNorm2d]
    trial = _Trainee(copy.deepcopy(model), steps=1)
    with OpCounter() as ops:
        trial.step(images, labels)
        trial.accuracy(images, labels)
    for op in ("bnext::batch_norm_train", "bnext::batch_norm_backward", "bnext::batch_norm_eval"):
        if ops.count[op] != len(layers):
            faults.append(f"{op} was called {ops.count[op]} times for {len(layers)} layers")
    return faults


def _result_faults(first_losses: list[float], accuracies: list[float]) -> list[str]:
    """What is wrong with the losses of the first epoch and the last accuracies, of torch and of bnext."""
    faults = []
    if not abs(first_losses[0] - first_losses[1]) <= _FIRST_LOSS_TOLERANCE * first_losses[0]:
        faults.append(f"losses of the first epoch differ by more than {_FIRST_LOSS_TOLERANCE:.1%}")
    for name, accuracy in zip(("torch", "bnext"), accuracies, strict=True):
        if accuracy <= _MIN_ACCURACY:
            faults.append(f"{name} recognised no more than {_MIN_ACCURACY:.0%} of the test images")
    if abs(accuracies[0] - accuracies[1]) > _ACCURACY_TOLERANCE:
        faults.append("accuracies differ by more than a percentage point")
    return faults
