"""A row: what one backend did on one case; and the means over the rows of a suite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from bench.cases import Case
from bench.timing import Spread

SCHEMA = 1  # of the JSON document: schema, date, argv, interrupted, environment, settings and rows

OK, WRONG, FAILED = "ok", "wrong", "failed"
OUT_OF_MEMORY, UNSUPPORTED, NOT_INSTALLED = "out of memory", "unsupported", "not installed"
_MOST_SAMPLES = 1000
FLOOR = "floor"  # the backend that is no batch norm: see bench/floors.py


@dataclass(frozen=True)
class Row:
    """One backend on one case: figures where status is "ok", and detail, why there are none, where it is not.

    samples: seconds of each timing. floor_share: the floor's median time over this one's, so 1 is at the floor.
    speedup: the baseline's median time over this one's. peak_bytes: what one call has allocated at its peak, its
    results included. plan and passes: what bnext chose, and how often it expects to move the tensor.
    """

    case: Case
    backend: str
    status: str = OK
    detail: str = ""
    samples: tuple[float, ...] = ()
    noisy: bool = False
    floor_share: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    plan: str = ""
    passes: float | None = None
    repro: str = ""

    @cached_property
    def spread(self) -> Spread | None:
        """Of the samples, in seconds; None without any."""
        return Spread.of(self.samples) if self.samples else None

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes that the case must move, per second of the median."""
        return self.case.bytes / self.spread.median / 1e9 if self.spread else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the case's fields and the row's beside each other; seconds is the spread as a dict, or None.

        samples: every one, or every second, third, ... in order where there are more than 1000.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("case", "samples")}
        spread, count = self.spread, len(self.samples)
        figures = {
            "seconds": spread.as_dict() if spread else None,
            "noise": spread.noise if spread else None,
            "gb_per_s": self.gb_per_s,
            "samples": [self.samples[i] for i in range(0, count, -(-count // _MOST_SAMPLES) or 1)],
        }
        return self.case.as_dict() | own | figures


@dataclass(frozen=True)
class Mean:
    """Geometric means of a backend over the rows of a suite that differ in shape alone.

    weighted by how often a layer occurs; layers: how many rows have figures; worst: the row with the least speedup.
    scaling: the median time with the fewest threads over that with these; None where these are the fewest.
    """

    suite: str
    op: str
    mode: str
    layout: str
    dtype: str
    threads: int
    backend: str
    layers: int
    speedup: float | None
    floor_share: float | None
    scaling: float | None
    worst: Row | None


def means(rows: Sequence[Row]) -> list[Mean]:
    """For every suite, op, mode, layout, dtype, number of threads and backend, in the order in which they come."""
    found = []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.status == OK:
            case = row.case
            key = (case.suite, case.op, case.mode, case.layout, case.dtype, case.threads, row.backend)
            groups.setdefault(key, []).append(row)
    fewest: dict[tuple[Any, ...], Row] = {}
    for row in sorted((row for group in groups.values() for row in group), key=lambda row: row.case.threads):
        fewest.setdefault(_but_threads(row), row)
    for key, group in groups.items():
        compared = [row for row in group if row.speedup is not None]
        worst = min(compared, key=lambda row: row.speedup or 0.0, default=None)
        shares = [row for row in group if row.floor_share is not None]
        found.append(
            Mean(
                *key,
                len(group),
                _geometric([(row.speedup, row.case.count) for row in compared]),
                _geometric([(row.floor_share, row.case.count) for row in shares]),
                _geometric([scaled for row in group if (scaled := _scaling(row, fewest[_but_threads(row)]))]),
                worst,
            )
        )
    return found


def _but_threads(row: Row) -> tuple[Any, ...]:
    """What rows that differ in threads alone have in common."""
    return replace(row.case, threads=0), row.backend


def _scaling(row: Row, fewest: Row) -> tuple[float, int] | None:
    """How often as fast as with the fewest threads, and the weight."""
    if row.case.threads == fewest.case.threads or row.spread is None or fewest.spread is None:
        return None
    return fewest.spread.median / row.spread.median, row.case.count


def _geometric(weighted: Sequence[tuple[float | None, int]]) -> float | None:
    """The geometric mean of (value, weight) pairs; None of none."""
    if not weighted:
        return None
    total = sum(weight for _, weight in weighted)
    return math.exp(sum(weight * math.log(value or math.nan) for value, weight in weighted) / total)
