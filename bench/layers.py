"""The layer run: every layer checked, then timed, in every layout and mode asked for."""

import argparse
import sys

import torch
from torch import Tensor

from bench import report, timing, verify
from bench.candidates import BATCH_NORMS, candidate
from bench.cases import DTYPES, LAYOUTS, MODES, RESNET50, Case, Inputs, make_inputs
from bench.floors import floor

_SECONDS = 0.6  # a row is repeated for so long, or for --reps rounds if those take longer


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 1 if any result was wrong, 130 after Ctrl-C."""
    warm = args.allocator == "warm" and timing.keep_freed_memory()
    torch.set_num_threads(args.threads)
    print(report.header(args.batch, args.threads, args.dtype, warm), flush=True)
    rows: list[report.Row] = []
    try:
        correct = _measure(args, rows)
        code = 0 if correct else 1
    except KeyboardInterrupt:
        code = 130
    _progress("")
    if rows:
        print(f"\n{report.means(rows)}", flush=True)
    return code


def _measure(args: argparse.Namespace, rows: list[report.Row]) -> bool:
    """Appends every row as it is measured, and prints it; whether all results were right."""
    cases = args.shape or RESNET50
    layouts = [args.layout] if args.layout else LAYOUTS
    modes = [args.mode] if args.mode else MODES
    correct = True
    for i, case in enumerate(cases, 1):
        _progress(f"layer {i}/{len(cases)} {case}: inputs")
        made = make_inputs(case, args.batch, DTYPES[args.dtype])
        inputs = {layout: made.to(LAYOUTS[layout]) for layout in layouts}
        for mode in modes:
            _progress(f"layer {i}/{len(cases)} {case}: oracle of {mode}")
            expected = verify.oracle(made, mode)  # the same for all layouts
            for layout in layouts:
                _progress(f"layer {i}/{len(cases)} {case}: {mode} {layout}")
                result = _row(case, layout, mode, inputs[layout], expected, args.reps)
                _progress("")
                if isinstance(result, report.Row):
                    rows.append(result)
                    print(report.row_line(result), flush=True)
                else:
                    correct = False
                    print(report.wrong_line(case, layout, mode, result), flush=True)
    return correct


def _row(
    case: Case, layout: str, mode: str, inputs: Inputs, expected: dict[str, Tensor], rounds: int
) -> report.Row | list[str]:
    """The timed row, or what is wrong with it."""
    candidates = {name: candidate(batch_norm, inputs, mode) for name, batch_norm in BATCH_NORMS.items()}
    faults = verify.faults(candidates, expected, inputs, mode)
    if faults:
        return faults
    calls = [*(each.call for each in candidates.values()), floor(inputs, mode)]
    return report.Row(case, layout, mode, *timing.interleaved(calls, rounds, _SECONDS))


def _progress(text: str) -> None:
    """Replaces the progress line on a terminal; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
