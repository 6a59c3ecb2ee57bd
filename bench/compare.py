"""python -m bench compare OLD.json NEW.json: what became slower or faster between two runs on one device."""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import shape_text
from bench.options import percentage
from bench.rows import FLOOR, OK, SCHEMA
from bench.timing import Spread

_NAMED = 3  # of the rows that only one file has


class _Refusal(Exception):
    """Why two files cannot be compared, in a sentence."""


@dataclass(frozen=True)
class _Key:
    """What a row is matched by. repeat: 0, or how many rows like it came before in the same file, in other suites."""

    shape: tuple[int, ...]
    op: str
    mode: str
    layout: str
    dtype: str
    device: str
    threads: int
    backend: str
    repeat: int

    def cells(self) -> list[str]:
        """For the first columns of the table."""
        return [
            shape_text(self.shape),
            self.op,
            self.mode,
            self.layout,
            self.dtype,
            f"{self.device} {self.threads}",
            self.backend,
        ]


@dataclass(frozen=True)
class _Figures:
    """Of a row in one file: seconds, or None and why."""

    seconds: Spread | None
    fault: str


_Rows = dict[_Key, _Figures]


@dataclass(frozen=True)
class _Pair:
    """A row of both files."""

    key: _Key
    old: _Figures
    new: _Figures

    @property
    def ratio(self) -> float | None:
        """The new median over the old one; None without both."""
        return self.new.seconds.median / self.old.seconds.median if self.old.seconds and self.new.seconds else None

    @property
    def noise(self) -> float:
        """Of the ratio, relative: that of both files together; infinite where a file has one timing alone."""
        spreads = [each.seconds for each in (self.old, self.new) if each.seconds]
        return math.hypot(*(spread.noise if spread.count > 1 else math.inf for spread in spreads))

    @property
    def lost(self) -> bool:
        """Whether there were figures, and there are none now."""
        return self.old.seconds is not None and self.new.seconds is None

    def slower_than(self, limit: float) -> bool:
        """Whether it got slower by more than limit, 0.05 for 5 %, and by more than the noise."""
        return self.ratio is not None and self.ratio - 1 > max(limit, self.noise)

    def verdict(self) -> str:
        """In a word or a few."""
        if self.ratio is None:
            return "gained" if self.new.seconds else f"{'lost' if self.lost else 'none'}: {self.new.fault}"
        if self.slower_than(0.0):
            return "slower"
        return "faster" if 1 - self.ratio > self.noise else "same"

    def cells(self) -> list[str]:
        """A line of the table."""
        times = [f"{each.seconds.median * 1e6:.1f}" if each.seconds else "-" for each in (self.old, self.new)]
        change = ["-", "-"] if self.ratio is None else [f"{self.ratio:.3f}", f"{self.noise:.1%}"]
        return [*self.key.cells(), *times, *change, self.verdict()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `python -m bench compare`."""
    parser.add_argument("old", type=Path, metavar="OLD.json", help="what --json wrote before the change")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="what --json wrote after it, on the same device")
    parser.add_argument(
        "--fail-above",
        type=percentage,
        metavar="P%",
        help="exit with 1 if a batch norm got slower by more than this percentage, such as 5%%, and by more than the "
        "noise of both files, or has no figures any more",
    )
    parser.add_argument(
        "--backend", type=_names, metavar="NAME,...", help="compare these alone (default: all but the floor)"
    )


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 1 for what --fail-above is about, 2 for files that cannot be compared."""
    try:
        old, new = _document("OLD", args.old), _document("NEW", args.new)
        devices = [document["environment"]["device"] for document in (old, new)]
        if devices[0] != devices[1]:
            raise _Refusal(f"expected files of one device, got OLD of {devices[0]!r} and NEW of {devices[1]!r}")
        old_rows, new_rows = _rows("OLD", args.old, old), _rows("NEW", args.new, new)
        backends = _chosen(args.backend, [key.backend for key in (*old_rows, *new_rows)])
        pairs = _pairs(old_rows, new_rows, backends)
        if not pairs:
            raise _Refusal(f"expected rows in common, got {len(old_rows)} in OLD, {len(new_rows)} in NEW, none in both")
    except _Refusal as refusal:
        print(f"compare: {refusal}", file=sys.stderr)
        return 2
    for line in _changed_facts(old, new):
        print(line)
    print(_table(pairs))
    for name, mine, other in (("OLD", old_rows, new_rows), ("NEW", new_rows, old_rows)):
        alone = [key for key in mine if key not in other and key.backend in backends]
        if alone:
            print(f"rows only in {name}: {_listed(alone)}")
    print(_means(pairs, _pairs(old_rows, new_rows, [FLOOR])))
    return 0 if args.fail_above is None else _judged(pairs, args.fail_above)


def _names(text: str) -> list[str]:
    return text.split(",")


def _document(name: str, path: Path) -> dict[str, Any]:
    """What `python -m bench --json` wrote to path, of this schema."""
    expected = f"{name} {path}: expected a document that python -m bench --json wrote"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Refusal(f"{expected}, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"{expected}, got no JSON ({error})") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise _Refusal(f"{expected}, got JSON without a schema")
    if document["schema"] != SCHEMA:
        raise _Refusal(f"{name} {path}: expected schema {SCHEMA}, got {document['schema']!r}")
    parts = {"environment": dict, "settings": dict, "rows": list}
    lacking = [part for part, kind in parts.items() if not isinstance(document.get(part), kind)]
    if lacking or "device" not in document["environment"]:
        raise _Refusal(f"{expected}, got one without {', '.join(lacking) or 'environment.device'}")
    return document


def _rows(name: str, path: Path, document: dict[str, Any]) -> _Rows:
    """By key, in the order of the file."""
    rows: _Rows = {}
    repeats: Counter[tuple[Any, ...]] = Counter()
    for number, row in enumerate(document["rows"]):
        try:
            fields = (
                tuple(row["shape"]),
                row.get("op", "bn"),  # which files from before there were others do not have
                *(row[n] for n in ("mode", "layout", "dtype", "device", "threads", "backend")),
            )
            measured = row["status"] == OK and row["seconds"] is not None
            figures = _Figures(Spread(**row["seconds"]), "") if measured else _Figures(None, _fault(row))
            spread = figures.seconds
            if spread and not 0 < spread.median < math.inf:
                raise ValueError(f"a median of {spread.median} s")
            if spread and not 0 < spread.p20 <= spread.median <= spread.p80 < math.inf:
                raise ValueError(f"percentiles {spread.p20} and {spread.p80} s about a median of {spread.median} s")
            wanted = (tuple, str, str, str, str, str, int, str)
            if not all(map(isinstance, fields, wanted)) or not isinstance(spread.count if spread else 1, int):
                raise ValueError("a field of another type")
            rows[_Key(*fields, repeats[fields])] = figures
            repeats[fields] += 1
        except (KeyError, TypeError, ValueError) as error:
            raise _Refusal(f"{name} {path}: expected figures of a benchmark in row {number}, got {error!r}") from error
    return rows


def _fault(row: dict[str, Any]) -> str:
    return ", ".join(filter(None, (row["status"], row["detail"])))


def _chosen(asked: list[str] | None, found: Sequence[str]) -> list[str]:
    """The backends to compare."""
    known = list(dict.fromkeys(found))
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise _Refusal(f"--backend: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return asked or [name for name in known if name != FLOOR]


def _pairs(old: _Rows, new: _Rows, backends: Sequence[str]) -> list[_Pair]:
    return [_Pair(key, old[key], new[key]) for key in old if key in new and key.backend in backends]


def _changed_facts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each version or setting that is not the same in both, since it may be why a time is not."""
    lines = []
    for part in ("environment", "settings"):
        for fact in dict.fromkeys((*old[part], *new[part])):
            before, after = old[part].get(fact), new[part].get(fact)
            if before != after and fact != "collect_env":
                lines.append(f"{fact}: {before} in OLD, {after} in NEW")
    return lines


def _table(pairs: Sequence[_Pair]) -> str:
    """Aligned text, a line for each pair."""
    named = ["shape", "op", "mode", "layout", "dtype", "threads", "backend"]
    figures = ["old us", "new us", "ratio", "+-"]
    head = [*named, *figures, "verdict"]
    lines = [head, *(pair.cells() for pair in pairs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<"] * len(named) + [">"] * len(figures) + ["<"]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


def _listed(keys: Sequence[_Key]) -> str:
    """How many, and which, if not too many."""
    named = "; ".join(" ".join(key.cells()) for key in keys[:_NAMED])
    return f"{len(keys)}, {named}{'; ...' if len(keys) > _NAMED else ''}"


def _means(pairs: Sequence[_Pair], floors: Sequence[_Pair]) -> str:
    """Geometric means of the ratios: of each backend, and of the floor, which no change of a batch norm can move."""
    ratios: dict[str, list[float]] = {}
    for pair in (*(p for p in pairs if p.key.backend != FLOOR), *floors):
        if pair.ratio is not None:
            ratios.setdefault(pair.key.backend, []).append(pair.ratio)
    lines = ["geometric means of new/old:"]
    for backend, found in ratios.items():
        mean = math.exp(math.fsum(map(math.log, found)) / len(found))
        note = ", the control: what the machine itself changed by" if backend == FLOOR else ""
        lines.append(f"  {backend}: {mean:.3f}, rows: {len(found)}{note}")
    return "\n".join(lines)


def _judged(pairs: Sequence[_Pair], limit: float) -> int:
    """The exit code, after a line that says why."""
    judged = [pair for pair in pairs if pair.key.backend != FLOOR]
    slower, lost = sum(pair.slower_than(limit) for pair in judged), sum(pair.lost for pair in judged)
    print(f"rows slower by more than {limit * 100:g}% and their noise: {slower}, lost: {lost}")
    return int(slower + lost > 0)
