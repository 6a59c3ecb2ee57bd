"""Command line: python -m bench [layers|train]; without a subcommand both run, with their defaults."""

import argparse
import sys
from pathlib import Path

from bench import layers, train
from bench.cases import DTYPES, LAYOUTS, MODES, Case


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _case(text: str) -> Case:
    try:
        channels, height, width = (_positive(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not three numbers C,H,W") from None
    return Case(channels, height, width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compares bnext with torch's own batch norm. Without a subcommand, runs both.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{layers,train}")

    sub = commands.add_parser(
        "layers",
        help="time the batch norm layers of ResNet-50",
        description="Times the batch norm layers of ResNet-50 against torch and against a copy of the same "
        "bytes. Every result is first checked against a float64 oracle; a wrong one is shown as WRONG, not "
        "timed, and the exit code is then 1.",
    )
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    sub.add_argument("--batch", type=_positive, default=32, metavar="N", help="images per batch (default: 32)")
    sub.add_argument("--threads", type=_positive, default=1, metavar="N", help="threads to use (default: 1)")
    sub.add_argument("--layout", choices=LAYOUTS, help="measure only this memory layout (default: both)")
    sub.add_argument("--mode", choices=MODES, help="measure only this mode (default: all three)")
    sub.add_argument(
        "--shape",
        type=_case,
        action="append",
        metavar="C,H,W",
        help="measure this shape instead of ResNet-50's layers; may be repeated",
    )
    sub.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of all tensors; beside a half type, parameters and buffers are float32 (default: float32)",
    )
    sub.add_argument(
        "--no-compile",
        action="store_true",
        help="on CUDA, leave out torch.compile, which takes seconds in each row before it is timed",
    )
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help="write a list of the rows so far to FILE after each, in seconds"
    )
    sub.add_argument(
        "--reps", type=_positive, default=5, metavar="N", help="time each row at least N times (default: 5)"
    )
    sub.add_argument(
        "--allocator",
        choices=("warm", "default"),
        default="warm",
        help="warm makes glibc keep freed memory, so that no timing depends on how fast the kernel hands out "
        "fresh pages; default leaves malloc as it is (default: warm)",
    )
    sub.set_defaults(run=layers.run)

    sub = commands.add_parser(
        "train",
        help="train a small ResNet with each",
        description="Trains a small ResNet on scikit-learn's handwritten digits twice from the same start, "
        "with torch's batch norm and with bnext's, and compares losses, accuracies and step times. The exit "
        "code is 1 if a training falls short or the two disagree.",
    )
    sub.add_argument("--epochs", type=_positive, default=8, metavar="N", help="passes over the data (default: 8)")
    sub.add_argument("--threads", type=_positive, default=1, metavar="N", help="threads to use (default: 1)")
    sub.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the split, the batches and the first weights (default: 0)",
    )
    sub.set_defaults(run=train.run)
    return parser


def main() -> int:
    """The exit code: 0, 1 if any result was wrong, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args()
    runs = [args] if args.command else [parser.parse_args([command]) for command in ("layers", "train")]
    worst = 0
    for run in runs:
        if run is not runs[0]:
            print()
        try:
            code = run.run(run)
        except KeyboardInterrupt:
            code = 130
        worst = max(worst, code)
        if code == 130:
            break
    return worst


if __name__ == "__main__":
    sys.exit(main())
