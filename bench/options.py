"""The options of `python -m bench`, and the cases that they ask for."""

import argparse
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from bench import backends, timing
from bench.cases import DTYPES, LAYOUTS, MODES, OPS, Case, memory_format, shape_text
from bench.suites import SUITES

CUSTOM = "custom"  # the suite of shapes given by --shape
_SECONDS = {"cpu": (0.5, 2.0), "cuda": (0.25, 1.0)}  # --min-time and --timeout
_MAX_NOISE = 0.05
_ALLOCATOR = "warm"

_ABOUT = """\
Times batch norm, bnext beside others. Everything that is timed is first checked against a float64 oracle: a wrong
result gets a status and no figures, and the exit code is then 1."""
_READING = """\
other commands:
  %(prog)s train            train a network with torch's batch norm and with bnext's
  %(prog)s compare OLD.json NEW.json --fail-above 5%%
                                  two runs, row by row; an exit code for CI

the columns:
  us          microseconds: the median of all timings; ~ where it is noisier than --max-noise
  +-%%         half of what lies between the 20th and 80th percentiles of the timings
  GB/s        of the tensors that must move: 2 for fwd and eval, 3 for bwd, 5 for fwd_bwd; bn+add+relu has one more (in
              fwd_bwd two), and in training a mask of one bit an element
  %% of floor  how close that is to plain copies of these tensors, as many read and written, timed in the same rounds;
              streaming stores can get beyond 100
  speedup     against --baseline
  peak MiB    what one call allocates, its results included
  passes      how often bnext expects to move the tensor through memory, by its plan; not a measurement
  scaling     of the means: the time with the fewest --threads over this one; cases are timed one after the other

exit code: 0, 1 if anything was wrong or failed, 2 for bad arguments, 130 after Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Whose errors are one sentence, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return value


def percentage(text: str) -> float:
    """0.05 of 5%; without a sign 0.05 could be meant for either."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not text.endswith("%") or not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a percentage from 0% up, with its sign, such as 5%, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    sizes = re.split("[,x]", text)
    if not 2 <= len(sizes) <= 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected N,C or N,C,L or N,C,H,W or N,C,D,H,W, all above 0, got {text!r}")
    return tuple(map(int, sizes))


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads one or several names, with commas between them."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {wrong[0]!r}")
        return list(dict.fromkeys(names))

    return read


def _threads(text: str) -> list[int]:
    found = [positive(part) for part in dict.fromkeys(text.split(","))]
    most = 4 * (os.cpu_count() or 1)
    if max(found) > most:
        raise argparse.ArgumentTypeError(f"expected at most {most} on this machine, got {max(found)}")
    return found


def _backends(text: str) -> list[backends.Backend]:
    try:
        return [backends.find(name) for name in dict.fromkeys(text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser(prog: str) -> Parser:
    """Of the command without a name."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [options]   or   %(prog)s train|compare --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_ABOUT,
        epilog=_READING,
    )
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    names = ",".join(SUITES)
    add("--suite", type=_some_of(SUITES), action="extend", metavar="S", help=f"of {names} (default: resnet50)")
    add("--shape", type=_shape, action="append", metavar="N,C,H,W", help="this shape; may be repeated")
    add("--batch", type=positive, metavar="N", help="images in a batch, for suites of networks (default: see --list)")
    add(
        "--op",
        type=_some_of(OPS),
        default=["bn"],
        metavar="O",
        help="of bn,bn+relu,bn+add+relu; bnext has each in one, torch the sum and the ReLU, in place, behind its batch "
        "norm (default: bn)",
    )
    add("--mode", type=_some_of(MODES), metavar="M", help="of fwd,bwd,fwd_bwd,eval (default: fwd,bwd,eval)")
    add("--layout", type=_some_of(LAYOUTS), metavar="L", help="of nchw,nhwc (default: those that the shape has)")
    add(
        "--dtype",
        type=_some_of(DTYPES),
        default=["float32"],
        metavar="T",
        help="of float32,float64,bfloat16,float16; parameters and buffers are float32 beside a half type "
        "(default: float32)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add("--threads", type=_threads, default=[1], metavar="N", help="on the CPU; may be several: 1,2 (default: 1)")
    add(
        "--backend",
        type=_backends,
        metavar="B",
        help="names of --list, or MODULE:FUNCTION with F.batch_norm's signature, followed by torch's sum and ReLU for "
        "--op (default: bnext,torch; CUDA with torch-native too)",
    )
    add("--baseline", metavar="B", help="the backend that speedups are against (default: torch, else the first)")
    add("--list", action="store_true", help="list suites with their shapes, and backends; measure nothing")

    how = parser.add_argument_group("how long and how")
    add = how.add_argument
    add("--min-time", type=_seconds, metavar="S", help="seconds for each case at least (default: 0.5; CUDA 0.25)")
    add(
        "--max-noise",
        type=percentage,
        default=_MAX_NOISE,
        metavar="P",
        help="go on while a row has more (default: 5%%)",
    )
    add("--timeout", type=_seconds, metavar="S", help="but no longer than that (default: 2; CUDA 1)")
    add("--run-once", action="store_true", help="after the check one call each, between cudaProfilerStart and Stop")
    add("--no-flush", action="store_true", help="CUDA: leave in the L2 cache what the call before left there")
    add("--cuda-graph", action="store_true", help="CUDA: time replays of a captured graph")
    add(
        "--allocator",
        choices=("warm", "default"),
        default=_ALLOCATOR,
        help="CPU: warm lets glibc keep freed memory, so that no timing depends on how fast fresh pages are; "
        "default leaves malloc as it is (default: warm)",
    )

    out = parser.add_argument_group(
        "output, beside the table; of --csv, --json and --md one FILE may be -, standard output"
    )
    add = out.add_argument
    add("--csv", metavar="FILE", help="a line for each row")
    add("--json", metavar="FILE", help="everything: rows, all timings, the environment")
    add("--md", metavar="FILE", help="tables in Markdown")
    add("--html", metavar="FILE", help="one page with table, plots and environment")
    add("--plot", metavar="DIR", help="a PNG for each suite (needs matplotlib)")
    add("--repro", action="store_true", help="print the command that repeats each row alone")
    return parser


def parse(prog: str, argv: list[str]) -> argparse.Namespace:
    """The options with every default filled in; ends the program where they contradict each other."""
    found = parser(prog)
    args = found.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        found.error("--device cuda: torch finds no NVIDIA GPU here")
    for option in ("cuda_graph", "no_flush"):
        if getattr(args, option) and args.device != "cuda":
            found.error(f"--{option.replace('_', '-')} is for --device cuda")
    if args.device == "cuda" and args.threads != [1]:
        found.error("--threads is for --device cpu")
    if [args.csv, args.json, args.md].count("-") > 1:
        found.error("only one of --csv, --json and --md can be - at a time")
    targets = {option: getattr(args, option) for option in ("csv", "json", "md", "html")}
    for option, target in targets.items():
        if target is None or (target == "-" and option != "html"):
            continue
        folder = Path(target).resolve().parent
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        if target in ("", "-") or Path(target).is_dir() or not writable:
            found.error(f"--{option}: expected a file in a folder that can be written to, got {target!r}")
        if list(targets.values()).count(target) > 1:
            found.error(f"--{option}: {target} is the file of another option too")
    if args.plot is not None and (not args.plot or (Path(args.plot).exists() and not Path(args.plot).is_dir())):
        found.error(f"--plot: expected a folder, got {args.plot!r}")
    args.backend = args.backend or [backends.find(name) for name in backends.DEFAULT[args.device]]
    names = [backend.name for backend in args.backend]
    if args.baseline is None:
        args.baseline = "torch" if "torch" in names else names[0]
    if args.baseline not in names:
        found.error(f"--baseline: expected one of --backend ({', '.join(names)}), got {args.baseline!r}")
    args.mode = args.mode or ["fwd", "bwd", "eval"]
    args.suite = list(dict.fromkeys(args.suite or ())) or ([] if args.shape else ["resnet50"])
    min_time, timeout = _SECONDS[args.device]
    args.min_time = min_time if args.min_time is None else args.min_time
    args.timeout = max(timeout, args.min_time) if args.timeout is None else args.timeout
    if args.min_time > args.timeout:
        found.error(f"--timeout: expected at least --min-time ({args.min_time:g}), got {args.timeout:g}")
    return args


def budget(args: argparse.Namespace) -> timing.Budget:
    """Of one case."""
    return timing.Budget(args.min_time, args.max_noise, args.timeout, args.run_once)


def groups(args: argparse.Namespace) -> Iterator[list[Case]]:
    """The cases, those with the same tensors together, and among them those of a mode."""
    shapes = [(name, layer, shape) for name in args.suite for layer, shape in SUITES[name].shapes(args.batch)]
    named = [(suite, layer.name, shape, layer.count) for suite, layer, shape in shapes]
    named += [(CUSTOM, shape_text(shape), shape, 1) for shape in dict.fromkeys(args.shape or ())]
    for suite, layer, shape, count in named:
        layouts = args.layout or [layout for layout in LAYOUTS if memory_format(layout, len(shape))]
        for dtype, op in itertools.product(args.dtype, args.op):
            yield [
                Case(suite, layer, shape, count, mode, layout, dtype, args.device, threads, op)
                for mode in args.mode
                for layout in layouts
                for threads in args.threads
            ]


def repro(case: Case, backend: str, args: argparse.Namespace) -> str:
    """The command that repeats one row, beside its baseline."""
    names = list(dict.fromkeys([backend, args.baseline])) if backend != "floor" else [args.baseline]
    words = ["python -m bench", "--shape", ",".join(map(str, case.shape))]
    words += ["--op", case.op] if case.op != "bn" else []
    words += ["--mode", case.mode]
    words += ["--layout", case.layout, "--dtype", case.dtype, "--device", case.device]
    if case.device == "cpu":
        words += ["--threads", str(case.threads)]
    words += ["--backend", ",".join(names)]
    if args.baseline != "torch":
        words += ["--baseline", args.baseline]
    min_time, timeout = _SECONDS[args.device]
    words += ["--min-time", f"{args.min_time:g}"] if args.min_time != min_time else []
    words += ["--timeout", f"{args.timeout:g}"] if args.timeout != timeout else []
    words += ["--max-noise", f"{100 * args.max_noise:g}%"] if args.max_noise != _MAX_NOISE else []
    for option in ("run_once", "no_flush", "cuda_graph"):
        words += [f"--{option.replace('_', '-')}"] if getattr(args, option) else []
    words += ["--allocator", args.allocator] if args.allocator != _ALLOCATOR else []
    return " ".join(words)
