"""The report of make gpu-check as Markdown: a pure function of what is in gpu-report.json."""

import math
from collections.abc import Sequence
from typing import Any

from bench.cases import shape_text
from bench.rows import FLOOR, OK

SCHEMA = 2  # of gpu-report.json: the keys environment, steps and rows; rows as in the benchmark's JSON, but no samples
OURS = "bnext"

_Row = dict[str, Any]
_Case = dict[str, _Row]  # the rows of a case that have figures, by backend

_TORCHS, _COMPILE = ("torch", "torch-native"), "compile"
_UNITS = {"memory": (2**30, "GiB"), "l2_cache": (2**20, "MiB")}


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    facts, steps = report["environment"], report["steps"]
    rows = [row for row in report["rows"] if "strategy" not in row]
    forced = [row for row in report["rows"] if "strategy" in row]
    cases = _cases(rows)
    fused = [case for key, case in cases.items() if key[0] != "bn"]
    plain = {key: case for key, case in cases.items() if key[0] == "bn"}
    compiled = {_key(row) for row in rows if row["backend"] == _COMPILE}
    parts = [
        f"# bnext on {facts['device']}, {facts['date']}",
        "\n".join(f"- {name.replace('_', ' ')}: {_fact(name, value)}" for name, value in facts.items()),
        "## Steps",
        _table(
            ("step", "status", "seconds", ""),
            [(step["name"], step["status"], f"{step['seconds']:.0f}", step["detail"]) for step in steps],
        ),
    ]
    failed = [test for step in steps for test in step["failed_tests"]]
    if failed:
        parts += ["## Tests that failed", _list(failed)]
    faults = [f"{_name(row)} {row['backend']}: {row['status']}: {row['detail']}" for row in rows if row["status"] != OK]
    if faults:
        parts += ["## Rows without figures", _list(faults)]
    parts += ["## Where bnext is slower than torch", _slower(list(cases.values()))]
    parts += [
        "## Figures",
        "Median microseconds. torch: F.batch_norm as it comes; torch-native: the same without cuDNN; floor: a copy of "
        "x (backward: x and dy read, their sum written). GB/s: of bnext, 2 passes over x (backward: 3). passes and "
        "plan: how often bnext expects to move x, and how. Nothing is in the L2 cache beforehand. Parameters and "
        "running buffers of half types are float32.",
    ]
    parts += _tables([case for key, case in plain.items() if key not in compiled], _TORCHS)
    parts += [
        "## Beside torch.compile",
        "torch.compile of F.batch_norm, and of its backward, for these shapes and this dtype only: "
        "it compiles for seconds in each case.",
    ]
    parts += _tables([case for key, case in plain.items() if key in compiled], (*_TORCHS, _COMPILE))
    if fused:
        parts += [
            "## Fused",
            "bnext.batch_norm_act beside F.batch_norm with torch's sum and ReLU, in place, and torch.compile of that. "
            "bn+add+relu has one pass more than the batch norm alone, and a mask of one bit an element; the floor too.",
            _list(_verdicts(fused)),
            *_tables(fused, ("torch", _COMPILE)),
        ]
    if forced:
        parts += [
            "## Strategies",
            "Microseconds of each strategy, where it is possible; the planner's choice and, of that, the microseconds "
            "that the floor takes over its own. Figures of different runs.",
            *_strategies(forced, cases),
        ]
    return "\n\n".join(parts) + "\n"


def _strategies(rows: Sequence[_Row], cases: dict[tuple[Any, ...], _Case]) -> list[str]:
    """A heading and a table for each dtype, layout and mode."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    groups: dict[tuple[str, ...], dict[tuple[Any, ...], dict[str, float]]] = {}
    for row in rows:
        # Where a strategy is not possible, the planner's choice has run.
        if row["status"] == OK and row["backend"] == OURS and row["plan"].startswith(row["strategy"]):
            group = groups.setdefault((row["dtype"], row["layout"], row["mode"]), {})
            group.setdefault(_key(row), {})[row["strategy"]] = 1e6 * row["seconds"]["median"]
    parts = []
    for group, found in groups.items():
        lines = []
        for key, microseconds in found.items():
            case = cases.get(key, {})
            chosen = case[OURS]["plan"].split()[0] if OURS in case else ""
            share = f"{_ratio(case, FLOOR, OURS):.2f}" if {OURS, FLOOR} <= case.keys() else ""
            each = [f"{microseconds[name]:.1f}" if name in microseconds else "" for name in names]
            lines.append((shape_text(key[5:]), *each, chosen, share))
        parts += [f"### {', '.join(group)}", _table(("shape", *names, "chosen", f"{FLOOR} / {OURS}"), lines)]
    return parts


def _key(row: _Row) -> tuple[Any, ...]:
    """What the rows of a case have in common."""
    return (*(row[name] for name in ("op", "suite", "dtype", "layout", "mode")), *row["shape"])


def _cases(rows: Sequence[_Row]) -> dict[tuple[Any, ...], _Case]:
    """The cases that have figures."""
    found: dict[tuple[Any, ...], _Case] = {}
    for row in rows:
        if row["status"] == OK:
            found.setdefault(_key(row), {})[row["backend"]] = row
    return found


def _fact(name: str, value: Any) -> str:
    if name not in _UNITS:
        return str(value)
    size, unit = _UNITS[name]
    return f"{value / size:.0f} {unit}"


def _slower(cases: Sequence[_Case]) -> str:
    """The cases in which torch, with or without cuDNN, takes less time than bnext."""
    compared = [case for case in cases if OURS in case and any(name in case for name in _TORCHS)]
    slower = []
    for case in compared:
        who = min((name for name in _TORCHS if name in case), key=lambda name: case[name]["seconds"]["median"])
        ratio = _ratio(case, who, OURS)
        if ratio < 1:
            slower.append(f"{_name(case[OURS])}: {who} / bnext {ratio:.2f}")
    return f"{len(slower)} of {len(compared)} cases.\n\n{_list(slower)}".rstrip()


def _verdicts(cases: Sequence[_Case]) -> list[str]:
    """Of each op and dtype: whether bnext is twice as fast as eager torch, and nowhere slower than torch.compile."""
    groups: dict[tuple[str, ...], list[_Case]] = {}
    for case in cases:
        row = next(iter(case.values()))
        groups.setdefault((row["op"], row["dtype"]), []).append(case)
    found = []
    for group, own in groups.items():
        eager = [_ratio(case, "torch", OURS) for case in own if {"torch", OURS} <= case.keys()]
        compiled = {_name(case[OURS]): _ratio(case, _COMPILE, OURS) for case in own if {_COMPILE, OURS} <= case.keys()}
        slower = [f"{name} {ratio:.2f}" for name, ratio in compiled.items() if ratio < 1]
        met = eager and _geometric(eager) >= 2 and compiled and not slower
        found.append(
            f"{', '.join(group)}: {'met' if met else 'missed'}. torch / bnext {_mean(eager)}, where 2 is wanted, the "
            f"geometric mean of {len(eager)} cases; slower than torch.compile in {len(slower)} of {len(compiled)}"
            + "".join(f"\n  - {each}" for each in slower)
        )
    return found


def _tables(cases: Sequence[_Case], others: Sequence[str]) -> list[str]:
    """A heading and a table for each dtype, layout and mode, in the order in which they come; "" is not known."""
    parts = []
    backends = (*others, OURS, FLOOR)
    pairs = [*((name, OURS) for name in others), (OURS, FLOOR)]
    header = ("shape", *backends, "GB/s", *(f"{a} / {b}" for a, b in pairs), "passes", "plan")
    groups: dict[tuple[str, ...], list[_Case]] = {}
    for case in cases:
        row = next(iter(case.values()))
        groups.setdefault((row["op"], row["dtype"], row["layout"], row["mode"]), []).append(case)
    for group, own in groups.items():
        lines = [_line(case, backends, pairs) for case in own]
        means = [_mean([_ratio(case, *pair) for case in own if case.keys() >= set(pair)]) for pair in pairs]
        lines.append(("geometric mean", *[""] * (len(backends) + 1), *means, "", ""))
        parts += [f"### {', '.join(group)}", _table(header, lines)]
    return parts or ["None measured."]


def _line(case: _Case, backends: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A case's line of its table."""
    ours = case.get(OURS)
    return (
        shape_text(next(iter(case.values()))["shape"]),
        *(f"{1e6 * case[name]['seconds']['median']:.1f}" if name in case else "" for name in backends),
        f"{ours['gb_per_s']:.0f}" if ours else "",
        *(f"{_ratio(case, *pair):.2f}" if case.keys() >= set(pair) else "" for pair in pairs),
        f"{ours['passes']:g}" if ours else "",
        ours["plan"] if ours else "",
    )


def _mean(ratios: Sequence[float]) -> str:
    """The geometric mean, "" of none."""
    return f"{_geometric(ratios):.2f}" if ratios else ""


def _geometric(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _ratio(case: _Case, above: str, below: str) -> float:
    return case[above]["seconds"]["median"] / case[below]["seconds"]["median"]


def _name(row: _Row) -> str:
    return " ".join((row["op"], row["dtype"], shape_text(row["shape"]), row["layout"], row["mode"]))


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
