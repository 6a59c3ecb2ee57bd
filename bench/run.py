"""`python -m bench`: prints and writes what bench/layers.py measures."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import environment, files, layers, options, page, plots, rows, table, timing
from bench.backends import BACKENDS
from bench.cases import shape_text
from bench.files import Report
from bench.rows import Row
from bench.suites import SUITES

_FAULTS = (rows.WRONG, rows.FAILED)
_TEXTS = {"csv": files.csv_text, "json": files.json_text, "md": files.markdown}


def run(prog: str, argv: list[str]) -> int:
    """The exit code: 0, 1 if a row was wrong or failed, 130 after Ctrl-C; ends the program with 2 for bad options."""
    args = options.parse(prog, argv)
    if args.list:
        print(listing(args.batch))
        return 0
    if args.plot and not plots.available():
        print(f"{prog}: {plots.MISSING}", file=sys.stderr)
        return 2
    settings = _settings(args)
    facts = environment.facts(args.device)
    if args.json or args.html:
        facts["collect_env"] = environment.report()
    quiet = "-" in (args.csv, args.json, args.md)
    shown = None if quiet else table.table(args.repro)
    found: list[Row] = []
    date = environment.now()

    def report(interrupted: bool) -> Report:
        return Report(date, ["python", "-m", "bench", *argv], interrupted, facts, settings, tuple(found))

    interrupted = False
    try:
        if shown:
            print(_heading(args, facts, settings), flush=True)
        for measured in layers.measured(args, _progress):
            found += measured
            _progress("")
            _write(args, report(interrupted=True))  # so that whoever ends this run early has what it measured
            if shown:
                shown.rows(measured)
    except (KeyboardInterrupt, BrokenPipeError):
        interrupted = True
    _progress("")
    final = report(interrupted)
    _write(args, final)
    if args.html:
        files.write(Path(args.html), page.html(final))
    if args.plot:
        plots.save(found, Path(args.plot), facts)
    if shown:
        shown.means(rows.means(found))
    for option, text in _TEXTS.items():
        if getattr(args, option) == "-":
            sys.stdout.write(text(final))
    return 130 if interrupted else int(any(row.status in _FAULTS for row in found))


def _progress(text: str) -> None:
    """Replaces the progress line on a terminal; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def _write(args: argparse.Namespace, report: Report) -> None:
    """The files that are text; - is for the end."""
    for option, text in _TEXTS.items():
        target = getattr(args, option)
        if target not in (None, "-"):
            files.write(Path(target), text(report))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures rest on; sets the allocator."""
    own = ("baseline", "min_time", "max_noise", "timeout", "run_once")
    found = {name: getattr(args, name) for name in own}
    if args.device == "cuda":
        return found | {"flush": not args.no_flush, "cuda_graph": args.cuda_graph}
    warm = args.allocator == "warm" and timing.keep_freed_memory()
    return found | {"threads": args.threads, "allocator": "warm" if warm else "default"}


def _heading(args: argparse.Namespace, facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """What is measured on what."""
    if args.device == "cuda":
        state = f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}; "
        state += "nothing in L2 beforehand" if not args.no_flush else "L2 as the call before left it"
        state += "; replays of CUDA graphs" if args.cuda_graph else ""
    else:
        threads = " and ".join(map(str, args.threads))
        plural = "" if args.threads == [1] else "s"
        warm = settings["allocator"] == "warm"
        memory = "warm pages (glibc keeps freed memory)" if warm else "the default allocator"
        state = f"{threads} thread{plural}; outputs come from {memory}"
    return (
        f"bnext {facts['bnext']}, torch {facts['torch']}, Python {facts['python']} on {facts['device']}\n"
        f"{state}; speedup against {args.baseline}"
    )


def listing(batch: int | None) -> str:
    """Suites with their shapes, then backends."""
    lines: list[str] = []
    for name, suite in SUITES.items():
        lines += [f"{name}: {suite.source}"]
        shapes: Sequence[Any] = suite.shapes(batch)
        lines += [f"    {shape_text(shape):<18} {layer.count:>2} x  {layer.name}" for layer, shape in shapes]
    lines += ["", "backends:"]
    for backend in BACKENDS.values():
        lines += [f"    {backend.name:<13} {backend.about}{'' if backend.installed else ' - not installed'}"]
    lines += [f"    {'MODULE:FUNCTION'} any function with the signature of F.batch_norm"]
    return "\n".join(lines)
