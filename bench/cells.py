"""The text in the tables of a run, on a terminal and in files alike."""

from collections.abc import Sequence
from typing import Any

from bench.cases import Case, shape_text
from bench.rows import OK, Mean, Row

FIGURES = ("us", "+-%", "GB/s", "% of floor", "speedup", "peak MiB", "passes", "plan")
COLUMNS = ("layer", "shape", "backend", *FIGURES)
MEAN_COLUMNS = (
    *("suite", "op", "mode", "layout", "dtype", "threads", "backend", "layers", "speedup", "% of floor", "scaling"),
    *("least speedup", "at"),
)
NUMBERS = {*FIGURES, "threads", "layers", "scaling", "least speedup"} - {"plan"}


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one suite, op, mode, layout, dtype and number of threads, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        case = row.case
        found.setdefault((case.suite, case.op, case.mode, case.layout, case.dtype, case.threads), []).append(row)
    return list(found.values())


def group_title(case: Case) -> str:
    """What groups() groups by."""
    plural = "s" if case.threads > 1 else ""
    return f"{case.suite}: {case.op}, {case.mode}, {case.layout}, {case.dtype}, {case.threads} thread{plural}"


def cells(row: Row) -> list[str]:
    """The text below each of COLUMNS."""
    return [row.case.layer, shape_text(row.case.shape), row.backend, *figures(row)]


def figures(row: Row) -> list[str]:
    """The text below each of FIGURES; of a row without figures its status is the first, its detail the last."""
    spread = row.spread
    return [
        "~" * row.noisy + digits(1e6 * spread.median) if spread else row.status,
        ("once" if spread.count == 1 else f"{100 * spread.noise:.1f}") if spread else "",
        digits(row.gb_per_s),
        digits(row.floor_share, 100),
        f"{row.speedup:.2f}" if row.speedup is not None else "",
        digits(row.peak_bytes, 2**-20),
        f"{row.passes:g}" if row.passes is not None else "",
        row.plan if row.status == OK else one_line(row.detail),
    ]


def mean_cells(mean: Mean) -> list[str]:
    """The text below each of MEAN_COLUMNS."""
    ratios = (mean.speedup, mean.scaling, _least(mean))
    speedup, scaling, least = (f"{value:.2f}" if value is not None else "" for value in ratios)
    where = _place(mean.worst.case) if mean.worst else ""
    named = [mean.suite, mean.op, mean.mode, mean.layout, mean.dtype, str(mean.threads), mean.backend]
    return [*named, str(mean.layers), speedup, digits(mean.floor_share, 100), scaling, least, where]


def _least(mean: Mean) -> float | None:
    return mean.worst.speedup if mean.worst else None


def _place(case: Case) -> str:
    """Layer and shape; a layer that is named by its shape, once."""
    return " ".join(dict.fromkeys((case.layer, shape_text(case.shape))))


def digits(value: float | None, scale: float = 1) -> str:
    """Three significant ones of value * scale, or all before the point: 12345, 12.3, 0.123; "" for None."""
    if value is None:
        return ""
    scaled = value * scale
    return f"{scaled:.0f}" if scaled >= 99.95 else f"{scaled:#.3g}"


def one_line(text: str) -> str:
    """Without line ends."""
    return " ".join(text.split())
