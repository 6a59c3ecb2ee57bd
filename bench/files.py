"""The files of a run: CSV, JSON and Markdown, each with every row; and how their columns are read."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import shape_text
from bench.cells import COLUMNS, MEAN_COLUMNS, NUMBERS, cells, group_title, groups, mean_cells, one_line
from bench.rows import SCHEMA, Row, means
from bnext.output import finite

CSV_COLUMNS = (
    *("suite", "layer", "shape", "count", "op", "mode", "layout", "dtype", "device", "threads", "backend", "status"),
    *("detail", "median_us", "p20_us", "p80_us", "samples", "noise", "noisy", "bytes", "gb_per_s", "floor_share"),
    *("speedup", "peak_bytes", "plan", "passes"),
)


@dataclass(frozen=True)
class Report:
    """A run. environment: flat facts, among them device, bnext and torch, and collect_env, a dict; settings: flat."""

    date: str
    argv: Sequence[str]
    interrupted: bool
    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Versions and device."""
        return "bnext {bnext}, torch {torch}, {device}".format_map(self.environment)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "argv": list(self.argv),
            "interrupted": self.interrupted,
            "environment": self.environment,
            "settings": self.settings,
            "rows": [row.as_dict() for row in self.rows],
        }


def write(path: Path, text: str) -> None:
    """All of the text or, where that fails, what was in the file before. A pipe or device is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def json_text(report: Report) -> str:
    """The document; null for what is no finite number. Lists of numbers stay on one line."""
    text = json.dumps(finite(report.as_dict()), indent=1, allow_nan=False, default=str)
    # a quote inside a string is escaped, so this finds keys alone
    return re.sub(r'"(samples|shape)": \[[^]]*\]', lambda found: " ".join(found[0].split()), text) + "\n"


def csv_text(report: Report) -> str:
    """A line per row below CSV_COLUMNS, nothing rounded; an empty cell is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite(_csv_row(row)) for row in report.rows)
    return text.getvalue()


def _csv_row(row: Row) -> dict[str, Any]:
    own = {name: getattr(row, name) for name in ("backend", "status", "gb_per_s", "floor_share", "speedup")}
    own |= {name: getattr(row, name) for name in ("peak_bytes", "plan", "passes")}
    figures = {}
    if spread := row.spread:
        figures = {f"{name}_us": 1e6 * getattr(spread, name) for name in ("median", "p20", "p80")}
        figures |= {"samples": spread.count, "noise": spread.noise, "noisy": row.noisy}
    return row.case.as_dict() | own | figures | {"shape": shape_text(row.case.shape), "detail": one_line(row.detail)}


def markdown(report: Report) -> str:
    """Title, settings, how to read it, a table per group of rows that differ in shape and backend, and the means."""
    parts = [f"# {report.title}", about(report), "\n".join(f"- {sentence}" for sentence in reading(report))]
    for group in groups(report.rows):
        parts += [f"## {group_title(group[0].case)}", _table(COLUMNS, [cells(row) for row in group])]
    parts += ["## Geometric means", _table(MEAN_COLUMNS, [mean_cells(mean) for mean in means(report.rows)])]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[re.sub(r"([|<])", r"\\\1", cell) for cell in line] for line in (columns, *lines)]
    widths = [max(2, *map(len, column)) for column in zip(*escaped, strict=True)]
    sides = [">" if name in NUMBERS else "<" for name in columns]
    padded = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in escaped
    ]
    rule = ["-" * (width - 1) + (":" if side == ">" else "-") for side, width in zip(sides, widths, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def about(report: Report) -> str:
    """When it was measured, with what settings, and whether to the end."""
    settings = [f"{name} {value}" for name, value in report.settings.items() if value is not None]
    end = " Interrupted: rows are missing." if report.interrupted else ""
    return f"Measured {'; '.join([report.date, *settings])}.{end}"


def reading(report: Report) -> tuple[str, ...]:
    """A sentence for each column that does not explain itself."""
    return (
        "us: the median of the microseconds that one call takes. +-%: half the distance between the 20th and the 80th "
        "percentile, relative to the median; ~ marks a row that stayed noisier than the limit.",
        "GB/s: 10^9 bytes that must move, per second of the median: the tensors [N, C, ...] alone, where fwd and eval "
        "read x and write y, bwd reads x and dy and writes dx, and fwd_bwd is the sum of fwd and bwd. bn+add+relu "
        "moves the residual or its gradient too, and in training a mask of one bit an element. What is read or written "
        "per channel is not counted.",
        "% of floor: the memory floor's median time over this one's; the floor moves the same bytes and computes "
        "nothing, so 100 is as fast as plain memory traffic.",
        f"speedup: the median time of {report.settings.get('baseline', 'the baseline')} over this one's.",
        "peak MiB: what one call has allocated at its peak, its results included.",
        "plan and passes: what bnext chose, and how often it expects to move the tensor. Where there are no figures, "
        "us says what happened and plan says why.",
    )
