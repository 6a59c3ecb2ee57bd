"""The table on standard output: drawn by rich on a terminal where it is installed, plain text elsewhere."""

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from bench.cases import Case, shape_text
from bench.rows import FLOOR, OK, Mean, Row

_HEADER = ("mode", "layout", "thr", "backend", "us", "+-", "GB/s", "floor", "speedup", "peak MiB", "passes", "plan")
_WIDTHS = (-7, -6, 3, -12, 11, 6, 8, 6, 8, 9, 6, -1)  # negative: to the left
_MEANS = ("suite", "mode", "layout", "dtype", "thr", "backend", "layers", "floor", "speedup", "least", "in")
_MEAN_WIDTHS = (-9, -7, -6, -8, 3, -12, 6, 6, 8, 8, -1)


class Table(Protocol):
    """What is printed as the run goes."""

    def rows(self, rows: Sequence[Row]) -> None:
        """The rows of a case, measured just now."""

    def means(self, means: Sequence[Mean]) -> None:
        """After the last case, also where the run was interrupted."""


def table(repro: bool) -> Table:
    """The one that suits standard output; repro: with the command for each row."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return _Rich(repro)
    return _Plain(repro)


def _title(case: Case) -> str:
    often = f", {case.count} times in the network" if case.count > 1 else ""
    name = "" if case.layer == shape_text(case.shape) else f" {case.layer},"
    return f"{case.suite}:{name} {shape_text(case.shape)} {case.dtype}{often}"


def _cells(row: Row) -> list[str]:
    """Of _HEADER; for a row without figures its status and detail in place of all from us on."""
    case = row.case
    start = [case.mode, case.layout, str(case.threads), row.backend]
    spread = row.spread
    if row.status != OK or spread is None:
        return [*start, f"{row.status}: {row.detail}" if row.detail else row.status]
    return [
        *start,
        f"{1e6 * spread.median:.1f}",
        "once" if spread.count == 1 else f"{'~' if row.noisy else ''}{spread.noise:.1%}",
        f"{row.gb_per_s:.1f}",
        f"{row.floor_share:.0%}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.2f}",
        "" if row.passes is None else f"{row.passes:g}",
        row.plan,
    ]


def _mean_cells(mean: Mean) -> list[str]:
    """Of _MEANS."""
    worst = mean.worst
    return [
        *(mean.suite, mean.mode, mean.layout, mean.dtype, str(mean.threads), mean.backend, str(mean.layers)),
        "" if mean.floor_share is None else f"{mean.floor_share:.0%}",
        "" if mean.speedup is None else f"{mean.speedup:.2f}x",
        "" if worst is None else f"{worst.speedup:.2f}x",
        "" if worst is None else shape_text(worst.case.shape),
    ]


_MEANS_TITLE = (
    "Geometric means by suite, each layer as often as its network has it; least: the layer with the least speedup"
)


class _Plain:
    def __init__(self, repro: bool) -> None:
        self._repro = repro
        self._title = ""

    def rows(self, rows: Sequence[Row]) -> None:
        title = _title(rows[0].case)
        if title != self._title:
            self._title = title
            print(f"\n{title}\n{_line(_HEADER, _WIDTHS)}")
        for row in rows:
            print(_line(_cells(row), _WIDTHS if row.status == OK else (*_WIDTHS[:4], -1)))
            if self._repro:
                print(f"    {row.repro}")
        sys.stdout.flush()

    def means(self, means: Sequence[Mean]) -> None:
        if means:
            print(f"\n{_MEANS_TITLE}\n{_line(_MEANS, _MEAN_WIDTHS)}")
        for mean in means:
            print(_line(_mean_cells(mean), _MEAN_WIDTHS))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    fields = (
        f"{cell:>{width}}" if width > 0 else f"{cell:<{-width}}" for cell, width in zip(cells, widths, strict=True)
    )
    return "  ".join(fields).rstrip()


class _Rich:
    """A table for the rows of a shape, printed when the next one begins."""

    def __init__(self, repro: bool) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._repro = repro
        self._held: list[Row] = []

    def rows(self, rows: Sequence[Row]) -> None:
        if self._held and _title(self._held[0].case) != _title(rows[0].case):
            self._print()
        self._held += rows

    def means(self, means: Sequence[Mean]) -> None:
        self._print()
        if means:
            drawn = self._table(_MEANS_TITLE, _MEANS, _MEAN_WIDTHS)
            for mean in means:
                drawn.add_row(*_mean_cells(mean), style=_style(mean.backend))
            self._console.print(drawn)

    def _print(self) -> None:
        from rich.text import Text

        if not self._held:
            return
        drawn = self._table(_title(self._held[0].case), _HEADER, _WIDTHS)
        last, apart = None, []
        for row in self._held:
            case = (row.case.mode, row.case.layout, row.case.threads)
            if last not in (None, case):
                drawn.add_section()
            last = case
            cells = _cells(row)
            if row.status != OK:
                apart.append(f"{' '.join(cells[:4])}: {cells[4]}")
                cells = [*cells[:4], row.status, *[""] * (len(_HEADER) - 5)]
            drawn.add_row(*map(Text, cells), style="red" if row.status != OK else _style(row.backend))
        self._console.print(drawn)
        for line in apart:
            self._console.print(Text(line, style="red"))
        if self._repro:
            for row in self._held:
                self._console.print(Text(row.repro, style="dim"), soft_wrap=True)
        self._held = []

    def _table(self, title: str, header: Sequence[str], widths: Sequence[int]) -> Any:
        from rich import box
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, width in zip(header, widths, strict=True):
            drawn.add_column(name, justify="right" if width > 0 else "left", no_wrap=name != "plan")
        return drawn


def _style(backend: str) -> str:
    return {"bnext": "bold green", FLOOR: "dim"}.get(backend, "")
