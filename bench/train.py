"""Trains a network twice from the same start, with torch's batch norm and with bnext's, which take turns at each step,
and compares losses, step times and peak memory; on digits, accuracies too. The exit code is 1 if the two disagree or
recognise too few digits. With --fused bnext's batch norms do the sums and ReLUs behind them too.

Floating-point trajectories drift apart: the two batch norms round differently, and SGD amplifies that step by
step, as it would if torch's own initial weights were changed by 1e-7. So the losses have to agree closely only
at first, where a wrong gradient shows and the drift is still small; the accuracies on digits, after the last epoch.
"""

import argparse
import copy
import statistics
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from bench import digits, environment, memory, networks, timing
from bench.opcount import OpCounter
from bench.options import positive

_BATCH = {"digits": 64, "resnet50": 32}
_EPOCHS, _STEPS = 8, 20
_MIN_ACCURACY = 0.95
_ACCURACY_TOLERANCE = 0.01
_LOSS_TOLERANCE = 1e-3  # relative
_FIRST_STEPS = 3  # of resnet50, whose losses are compared: the first is of the forward, the others of the backward too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of run."""
    parser.add_argument(
        "--network",
        choices=tuple(_BATCH),
        default="digits",
        help="digits is a small ResNet on scikit-learn's handwritten digits; resnet50 sees one batch of random "
        "224 x 224 images again and again (default: digits)",
    )
    parser.add_argument("--fused", action="store_true", help="bnext.fuse_batchnorm_act on bnext's model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    batches = " and ".join(f"{batch} for {network}" for network, batch in _BATCH.items())
    parser.add_argument("--batch", type=positive, metavar="N", help=f"images in a step (default: {batches})")
    parser.add_argument(
        "--epochs", type=positive, metavar="N", help=f"passes over the data, for digits alone (default: {_EPOCHS})"
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help=f"steps to time, for resnet50 alone (default: {_STEPS})"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads to use (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the data and of the first weights (default: 0)"
    )


class _Trainee:
    """A model with its optimizer; the seconds and the loss of every step."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One SGD step, timed; the loss is the one before it."""
        loss, seconds = timing.timed(partial(self._step, images, labels))
        self.seconds.append(seconds)
        self.losses.append(loss)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()  # waits for all that a GPU was given

    def peak(self, images: Tensor, labels: Tensor) -> int:
        """The bytes that one more step has allocated at its peak: activations, gradients and temporaries."""
        self.optimizer.zero_grad()
        return memory.peak_bytes(partial(self._step, images, labels), images.device.type)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images recognised, in eval mode."""
        self.model.eval()
        correct = self.model(images).argmax(1) == labels
        self.model.train()
        return correct.double().mean().item()


class _Pair:
    """The same model with torch's batch norm and with bnext's, fused or not; device is the model's."""

    def __init__(self, model: nn.Module, steps: int, fused: bool) -> None:
        converted = bnext.convert_batchnorm(copy.deepcopy(model))
        self.ours = _Trainee(bnext.fuse_batchnorm_act(converted) if fused else converted, steps)
        self.theirs = _Trainee(model, steps)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of each; they take turns at going first."""
        even = len(self.ours.losses) % 2 == 0
        for trainee in (self.theirs, self.ours) if even else (self.ours, self.theirs):
            trainee.step(images, labels)

    def losses(self, steps: int = 1) -> tuple[float, float]:
        """The mean loss of the last steps, of torch and of bnext."""
        return statistics.fmean(self.theirs.losses[-steps:]), statistics.fmean(self.ours.losses[-steps:])

    def summary(self, images: Tensor, labels: Tensor) -> str:
        """What a step takes; the first one, which warms up, is left out of the times where there are others."""
        times = [each.seconds[1:] or each.seconds for each in (self.theirs, self.ours)]
        theirs, ours = (1e3 * statistics.median(seconds) for seconds in times)
        peaks = [each.peak(images, labels) / 2**20 for each in (self.theirs, self.ours)]
        return (
            f"median step: torch {theirs:.2f} ms, bnext {ours:.2f} ms, speedup {theirs / ours:.2f}x\n"
            f"peak memory of a step, beside weights and momenta: torch {peaks[0]:.2f} MiB, bnext {peaks[1]:.2f} MiB, "
            f"{peaks[1] / peaks[0]:.2f} of torch's"
        )


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 1 if a training fell short or the two disagree, 2 for options that cannot be."""
    if problem := _problem(args):
        print(f"python -m bench train: {problem}", file=sys.stderr)
        return 2
    timing.keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batch = args.batch or _BATCH[args.network]
    facts = environment.facts(args.device)
    versions = f"bnext {facts['bnext']}, torch {facts['torch']} on {facts['device']}"
    print(f"{versions}; {args.network}, batch {batch}, {args.threads} thread{'s' if args.threads > 1 else ''}")
    if args.network == "digits":
        faults = train_digits(args.device, batch, args.epochs or _EPOCHS, args.seed, args.fused)
    else:
        faults = train_resnet50(args.device, batch, args.steps or _STEPS, args.fused)
    for fault in faults:
        print(f"WRONG  {fault}")
    return 1 if faults else 0


def _problem(args: argparse.Namespace) -> str:
    """Why these options cannot be; empty if they can."""
    for name, network in (("epochs", "digits"), ("steps", "resnet50")):
        if getattr(args, name) is not None and args.network != network:
            return f"--{name}: expected --network {network}, got --network {args.network}"
    if args.network == "digits" and (args.batch or 0) > digits.TRAIN_IMAGES:
        return f"--batch: expected at most the {digits.TRAIN_IMAGES} images to train on, got {args.batch}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no NVIDIA GPU here"
    if not 0 <= args.seed < 2**63:
        return f"--seed: expected a number from 0 to 2^63 - 1, got {args.seed}"
    return ""


def train_digits(device: str, batch: int, epochs: int, seed: int, fused: bool) -> list[str]:
    """A small ResNet on scikit-learn's digits, an epoch a line; the faults found."""
    rng = torch.Generator().manual_seed(seed)
    train, test = (tuple(t.to(device) for t in part) for part in digits.load(rng))
    batches = len(train[0]) // batch
    pair = _Pair(networks.small_resnet().to(device), epochs * batches, fused)
    first = [t[:batch] for t in train]
    faults = _conversion_faults(pair.ours.model, *first, fused)
    losses, accuracies = [], []
    print("\nepoch  loss: torch     bnext   test accuracy: torch    bnext")
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train[0]), generator=rng).to(device)
        for chosen in order[: batches * batch].split(batch):
            pair.step(*(t[chosen] for t in train))
        losses.append(pair.losses(batches))
        accuracies = [each.accuracy(*test) for each in (pair.theirs, pair.ours)]
        print("{:5}{:13.6f}{:10.6f}{:23.2%}{:9.2%}".format(epoch, *losses[-1], *accuracies), flush=True)
    apart = max(abs(theirs - ours) / theirs for theirs, ours in losses)
    print(f"\nper-epoch losses differ by at most {apart:.1e}, relative to torch's\n{pair.summary(*first)}")
    return faults + _loss_faults("epoch", losses[:1]) + _accuracy_faults(accuracies)


def train_resnet50(device: str, batch: int, steps: int, fused: bool, size: int = 224) -> list[str]:
    """ResNet-50 on one batch of random size x size images, a step a line; the faults found."""
    pair = _Pair(networks.resnet50().to(device), 1 + steps, fused)
    images, labels = torch.randn(batch, 3, size, size).to(device), torch.randint(1000, (batch,)).to(device)
    faults = _conversion_faults(pair.ours.model, images, labels, fused)
    losses = []
    print("\n step  loss: torch     bnext     ms: torch     bnext")
    for step in range(1, 2 + steps):
        pair.step(images, labels)
        losses.append(pair.losses())
        taken = [1e3 * each.seconds[-1] for each in (pair.theirs, pair.ours)]
        print("{:5}{:13.6f}{:10.6f}{:14.2f}{:10.2f}".format(step, *losses[-1], *taken), flush=True)
    print(f"\n{pair.summary(images, labels)}")
    return faults + _loss_faults("step", losses[:_FIRST_STEPS])


def _conversion_faults(model: nn.Module, images: Tensor, labels: Tensor, fused: bool) -> list[str]:
    """What shows that model does not run on bnext: a layer's class, or an op that a trial did not call.

    Says how many are fused.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    ours = (bnext.BatchNorm2d, bnext.BatchNormAct2d)
    faults = [f"{type(layer)} was not converted" for layer in layers if type(layer) not in ours]
    with_act = sum(type(layer) is bnext.BatchNormAct2d for layer in layers)
    if fused:
        print(f"fused: {with_act} of {len(layers)} batch norms")
        faults += ["no batch norm was fused"] * (with_act == 0)
    trial = _Trainee(copy.deepcopy(model), steps=1)
    with OpCounter() as ops:
        trial.step(images, labels)
        trial.accuracy(images, labels)
    for act, expected in (("", len(layers) - with_act), ("_act", with_act)):
        for op in (f"bnext::batch_norm{act}_{kind}" for kind in ("train", "backward", "eval")):
            if ops.count[op] != expected:
                faults.append(f"{op} was called {ops.count[op]} times for {expected} layers")
    return faults


def _loss_faults(unit: str, losses: list[tuple[float, float]]) -> list[str]:
    """Which of the first losses, of torch and of bnext, are too far apart; unit: what each is of."""
    return [
        f"losses of {unit} {i} differ by more than {_LOSS_TOLERANCE:.1%}: torch {theirs:.6f}, bnext {ours:.6f}"
        for i, (theirs, ours) in enumerate(losses, 1)
        if not abs(theirs - ours) <= _LOSS_TOLERANCE * theirs
    ]


def _accuracy_faults(accuracies: list[float]) -> list[str]:
    """What is wrong with the last accuracies, of torch and of bnext."""
    faults = []
    for name, accuracy in zip(("torch", "bnext"), accuracies, strict=True):
        if accuracy <= _MIN_ACCURACY:
            faults.append(f"{name} recognised no more than {_MIN_ACCURACY:.0%} of the test images")
    if abs(accuracies[0] - accuracies[1]) > _ACCURACY_TOLERANCE:
        faults.append("accuracies differ by more than a percentage point")
    return faults
