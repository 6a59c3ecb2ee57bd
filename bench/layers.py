"""The layer run: every layer checked, then timed, in every layout and mode asked for."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import report, timing, verify
from bench.candidates import batch_norms, candidate
from bench.cases import DTYPES, LAYOUTS, MODES, RESNET50, Inputs, make_inputs
from bench.floors import floor

_Result = TypeVar("_Result")

_SECONDS = {"cpu": 0.6, "cuda": 0.25}  # a row is repeated for so long, or for --reps rounds if those take longer


class _WrongResult(Exception):
    """What is wrong with the results of a row."""


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 1 if a row could not be measured or was wrong, 2 without a GPU, 130 after Ctrl-C."""
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("--device cuda: torch finds no NVIDIA GPU here", file=sys.stderr)
            return 2
        print(report.cuda_header(args.batch, args.dtype), flush=True)
    else:
        warm = args.allocator == "warm" and timing.keep_freed_memory()
        torch.set_num_threads(args.threads)
        print(report.header(args.batch, args.threads, args.dtype, warm), flush=True)
    rows: list[report.Row] = []
    interrupted = False
    try:
        for row in _rows(args):
            rows.append(row)
            _progress("")
            print(report.cuda_row_line(row) if args.device == "cuda" else report.row_line(row), flush=True)
            if args.json:
                part = args.json.with_suffix(".part")
                part.write_text(json.dumps([row.as_dict() for row in rows]))
                part.replace(args.json)  # whole at any time, for whoever ends this run early
    except KeyboardInterrupt:
        interrupted = True
    _progress("")
    measured = [row for row in rows if not row.fault]
    if measured:
        print(f"\n{report.means(measured)}", flush=True)
    return 130 if interrupted else int(len(measured) < len(rows))


def _rows(args: argparse.Namespace) -> Iterator[report.Row]:
    """Every row, as it is measured."""
    cases = args.shape or RESNET50
    layouts = [args.layout] if args.layout else list(LAYOUTS)
    modes = [args.mode] if args.mode else MODES
    for i, case in enumerate(cases, 1):
        _progress(f"layer {i}/{len(cases)} {case}: inputs")
        made, no_inputs = _attempt(make_inputs, case, args.batch, DTYPES[args.dtype], args.device)
        for mode in modes:
            _progress(f"layer {i}/{len(cases)} {case}: oracle of {mode}")
            expected, no_oracle = _attempt(verify.oracle, made, mode) if made else (None, no_inputs)  # of all layouts
            for layout in layouts:
                _progress(f"layer {i}/{len(cases)} {case}: {mode} {layout}")
                arguments = (made, expected, layout, mode, args)
                spreads, fault = _attempt(_measure, *arguments) if expected else (None, no_oracle)
                yield report.Row(case, layout, mode, args.dtype, args.batch, spreads or {}, fault)


def _attempt(function: Callable[..., _Result], *arguments: Any) -> tuple[_Result | None, str]:
    """What function returns and "", or None and why it could not."""
    try:
        return function(*arguments), ""
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, "out of GPU memory"
    except _WrongResult as wrong:
        return None, f"WRONG  {wrong}"
    except RuntimeError as error:
        return None, f"FAILED  {str(error).partition(chr(10))[0]}"


def _measure(
    made: Inputs, expected: dict[str, Tensor], layout: str, mode: str, args: argparse.Namespace
) -> dict[str, timing.Spread]:
    """The timings by name; raises _WrongResult."""
    inputs = made.to(LAYOUTS[layout])
    found = batch_norms(args.device, compiled=not args.no_compile)
    candidates = {name: candidate(batch_norm, inputs, mode) for name, batch_norm in found.items()}
    faults = verify.faults(candidates, expected, inputs, mode)
    if faults:
        raise _WrongResult("; ".join(faults))
    calls = {name: each.call for name, each in candidates.items()} | {"floor": floor(inputs, mode)}
    spreads = timing.interleaved(list(calls.values()), args.reps, _SECONDS[args.device], args.device)
    return dict(zip(calls, spreads, strict=True))


def _progress(text: str) -> None:
    """Replaces the progress line on a terminal; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
