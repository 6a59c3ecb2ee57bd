"""The run: every backend checked, then all timed in turn, case by case."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import backends, memory, options, plans, rows, timing, verify
from bench.backends import Backend, Candidate
from bench.cases import DTYPES, Case, Inputs, make_inputs, memory_format
from bench.floors import floor
from bench.peers import Unsupported
from bench.rows import Row

_Result = TypeVar("_Result")


class _Status(Exception):
    """Why a row has no figures: a status of bench.rows, and the detail."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail


def _attempt(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """What function returns; raises _Status for everything that it raises."""
    try:
        return function(*arguments)
    except _Status:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        torch.cuda.empty_cache()
        raise _Status(rows.OUT_OF_MEMORY, _first_line(error)) from None
    except (Unsupported, NotImplementedError) as error:
        raise _Status(rows.UNSUPPORTED, _first_line(error)) from None
    except (Exception, SystemExit) as error:  # whatever a backend does
        text = _first_line(error)
        if "can't allocate memory" in str(error):  # how torch's CPU allocator says it
            raise _Status(rows.OUT_OF_MEMORY, text) from None
        raise _Status(rows.FAILED, f"{type(error).__name__}: {text}") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def measured(args: argparse.Namespace, progress: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of each case, as they are measured: the floor's where there are figures, and one for each backend."""
    for group in options.groups(args):
        case = group[0]
        progress(f"{case.suite} {case.layer}: inputs")
        inputs = _or_status(make_inputs, case.shape, DTYPES[case.dtype], case.device, case.op)
        expected: dict[str, dict[str, Tensor] | _Status] = {}
        for case in group:
            where = f"{case.suite} {case.layer}, {case.op} {case.mode} {case.layout}"
            status = inputs if isinstance(inputs, _Status) else _refused(case)
            if status:
                yield _without_figures(case, status, args)
                continue
            if case.mode not in expected:
                progress(f"{where}: oracle")
                expected = {case.mode: _or_status(verify.oracle, inputs, case.mode)}  # of all layouts
            oracle = expected[case.mode]
            progress(where)
            found = oracle if isinstance(oracle, _Status) else _or_status(_rows_of, case, inputs, oracle, args)
            yield _without_figures(case, found, args) if isinstance(found, _Status) else found


def _refused(case: Case) -> _Status | None:
    """What torch does not have."""
    n, _, *spatial = case.shape
    if memory_format(case.layout, len(case.shape)) is None:
        return _Status(rows.UNSUPPORTED, f"torch has no channels-last format for {len(case.shape)} dimensions")
    if case.mode != "eval" and n * math.prod(spatial) == 1:
        return _Status(rows.UNSUPPORTED, "training needs more than 1 value per channel")
    return None


def _or_status(function: Callable[..., _Result], *arguments: Any) -> "_Result | _Status":
    try:
        return _attempt(function, *arguments)
    except _Status as status:
        return status


def _without_figures(case: Case, why: _Status, args: argparse.Namespace) -> list[Row]:
    return [
        Row(case, backend.name, why.status, why.detail, repro=options.repro(case, backend.name, args))
        for backend in args.backend
    ]


def _rows_of(case: Case, made: Inputs, expected: dict[str, Tensor], args: argparse.Namespace) -> list[Row]:
    """The rows of one case."""
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    inputs = made.to(memory_format(case.layout, len(case.shape)))
    checked: dict[str, Candidate | _Status] = {}
    check = _Check(case, inputs, expected, any(backend.name == "bnext" for backend in args.backend))
    calls = {rows.FLOOR: floor(inputs, case.mode)}
    peaks: dict[str, int] = {}
    for backend in args.backend:
        name = backend.name
        try:
            each = _attempt(check.candidate, backend)
            peaks[name] = _attempt(memory.peak_bytes, each.call, case.device)
            calls[name] = _attempt(timing.captured, each.call) if args.cuda_graph else each.call
            checked[name] = each
        except _Status as status:
            checked[name] = status
    with torch.cuda.profiler.profile() if args.run_once and case.device == "cuda" else nullcontext():
        samples = timing.interleaved(list(calls.values()), options.budget(args), case.device, not args.no_flush)
    times = dict(zip(calls, samples, strict=True))
    medians = {name: timing.Spread.of(taken).median for name, taken in times.items()}
    for name, each in checked.items():
        if isinstance(each, Candidate):
            checked[name] = _or_status(check.again, name, each)
    found = []
    for name in (rows.FLOOR, *checked):
        each = checked.get(name)
        repro = options.repro(case, name, args)
        if isinstance(each, _Status):
            found.append(Row(case, name, each.status, each.detail, repro=repro))
            continue
        compared = isinstance(checked[args.baseline], Candidate)
        plan, passes = plans.predicted(case) if name == "bnext" else ("", None)
        found.append(
            Row(
                case,
                name,
                samples=times[name],
                noisy=timing.Spread.of(times[name]).noise > args.max_noise,
                floor_share=medians[rows.FLOOR] / medians[name],
                speedup=medians[args.baseline] / medians[name] if compared else None,
                peak_bytes=peaks.get(name),
                plan=plan,
                passes=passes,
                repro=repro,
            )
        )
    return found


class _Check:
    """Checks the candidates of one case, before and after they are timed."""

    def __init__(self, case: Case, inputs: Inputs, expected: dict[str, Tensor], with_bnext: bool) -> None:
        self._case, self._inputs, self._expected = case, inputs, expected
        self._before = {name: t.clone() for name, t in vars(inputs).items() if isinstance(t, Tensor)}
        self._of_torch = _or_status(verify.errors_of_torch, expected, inputs, case.mode) if with_bnext else {}

    def candidate(self, backend: Backend) -> Candidate:
        """The backend's callable, whose first call has returned what it should; raises _Status."""
        if not backend.installed:
            raise _Status(rows.NOT_INSTALLED, f"there is no package {backend.package} here")
        each = backends.candidate(backend, self._inputs, self._case.mode)
        return self._judged(backend.name, each)

    def again(self, name: str, each: Candidate) -> Candidate:
        """The same after many calls."""
        for name_of, buffer in each.buffers.items():
            buffer.copy_(self._before[name_of])
        return self._judged(name, each)

    def _judged(self, name: str, each: Candidate) -> Candidate:
        of_torch = self._of_torch if name == "bnext" else {}
        if isinstance(of_torch, _Status):
            raise of_torch
        fault = verify.fault(name, each, self._expected, self._inputs, self._case.mode, of_torch)
        for tensor, before in self._before.items():
            if not torch.equal(getattr(self._inputs, tensor), before):
                getattr(self._inputs, tensor).data.copy_(before)  # for those that come after
                fault = f"changed its input {tensor}" + (f"; {fault}" if fault else "")
        if fault:
            raise _Status(rows.WRONG, fault)
        return each
