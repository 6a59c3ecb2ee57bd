"""The table on standard output: drawn by rich on a terminal where it is installed, plain text elsewhere."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bench.cases import Case, shape_text
from bench.cells import FIGURES, MEAN_COLUMNS, NUMBERS, figures, mean_cells, one_line
from bench.rows import FLOOR, OK, Mean, Row

_HEADER = ("mode", "layout", "threads", "backend", *FIGURES)
_WIDTHS = dict(zip(_HEADER, (7, 6, 7, 12, 9, 5, 6, 10, 7, 8, 6, 1), strict=True))
_MEAN_WIDTHS = dict(zip(MEAN_COLUMNS, (9, 11, 7, 6, 8, 7, 12, 6, 7, 10, 7, 13, 1), strict=True))


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
    return f"{case.suite}:{name} {shape_text(case.shape)} {case.dtype} {case.op}{often}"


def _named(row: Row) -> list[str]:
    """What comes before FIGURES."""
    return [row.case.mode, row.case.layout, str(row.case.threads), row.backend]


_MEANS_TITLE = "Geometric means by suite, each layer as often as its network has it"


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
            if row.status == OK:
                print(_line([*_named(row), *figures(row)], _WIDTHS))
            else:
                print(_line(_named(row), _WIDTHS), _why(row), sep="  ")
            if self._repro:
                print(f"    {row.repro}")
        sys.stdout.flush()

    def means(self, means: Sequence[Mean]) -> None:
        if means:
            print(f"\n{_MEANS_TITLE}\n{_line(MEAN_COLUMNS, _MEAN_WIDTHS)}")
        for mean in means:
            print(_line(mean_cells(mean), _MEAN_WIDTHS))


def _why(row: Row) -> str:
    """Status and detail of a row without figures."""
    return one_line(f"{row.status}: {row.detail}".removesuffix(": "))


def _line(cells: Sequence[str], widths: Mapping[str, int]) -> str:
    """As many columns as there are cells."""
    columns = zip(cells, widths.items(), strict=False)
    return "  ".join(f"{cell:{'>' if name in NUMBERS else '<'}{width}}" for cell, (name, width) in columns).rstrip()


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
            drawn = self._table(_MEANS_TITLE, MEAN_COLUMNS)
            for mean in means:
                drawn.add_row(*mean_cells(mean), style=_style(mean.backend))
            self._console.print(drawn)

    def _print(self) -> None:
        from rich.text import Text

        if not self._held:
            return
        drawn = self._table(_title(self._held[0].case), _HEADER)
        last, apart = None, []
        for row in self._held:
            case = (row.case.mode, row.case.layout, row.case.threads)
            if last not in (None, case):
                drawn.add_section()
            last = case
            cells = figures(row)
            if row.status != OK:
                apart.append(f"{' '.join(_named(row))}: {_why(row)}")
                cells[-1] = ""  # apart, in full width
            drawn.add_row(*map(Text, (*_named(row), *cells)), style="red" if row.status != OK else _style(row.backend))
        self._console.print(drawn)
        for line in apart:
            self._console.print(Text(line, style="red"))
        if self._repro:
            for row in self._held:
                self._console.print(Text(row.repro, style="dim"), soft_wrap=True)
        self._held = []

    def _table(self, title: str, header: Sequence[str]) -> Any:
        from rich import box
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in header:
            drawn.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
        return drawn


def _style(backend: str) -> str:
    return {"bnext": "bold green", FLOOR: "dim"}.get(backend, "")
