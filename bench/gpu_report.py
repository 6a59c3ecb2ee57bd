"""The report of make gpu-check as Markdown: a pure function of what is in gpu-report.json."""

import math
from collections.abc import Sequence
from typing import Any

SCHEMA = 1  # of gpu-report.json: the keys environment, steps and rows, with times in seconds

_Row = dict[str, Any]

_UNITS = {"memory": (2**30, "GiB"), "l2_cache": (2**20, "MiB")}


def markdown(report: dict[str, Any]) -> str:
    """The whole page."""
    facts, steps, rows = report["environment"], report["steps"], report["rows"]
    measured = [row for row in rows if not row["fault"]]
    plain = [row for row in measured if "compile" not in row["seconds"]]
    compiled = [row for row in measured if "compile" in row["seconds"]]
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
    faults = [f"{_name(row)}: {row['fault']}" for row in rows if row["fault"]]
    if faults:
        parts += ["## Rows without figures", _list(faults)]
    parts += ["## Where bnext is slower than torch", _slower(measured)]
    parts += [
        "## Figures",
        "Median microseconds. torch: F.batch_norm as it comes; native: the same without cuDNN; floor: a copy of x "
        "(backward: x and dy read, their sum written). GB/s: of bnext, 2 passes over x (backward: 3). Nothing is in "
        "the L2 cache beforehand. Parameters and running buffers of half types are float32.",
    ]
    parts += _tables(plain, ("torch", "native"))
    parts += [
        "## Beside torch.compile",
        "torch.compile of F.batch_norm, and of its backward, for these shapes and this dtype only: "
        "it compiles for seconds in each row.",
    ]
    parts += _tables(compiled, ("torch", "native", "compile"))
    return "\n\n".join(parts) + "\n"


def _fact(name: str, value: Any) -> str:
    if name not in _UNITS:
        return str(value)
    size, unit = _UNITS[name]
    return f"{value / size:.0f} {unit}"


def _slower(rows: Sequence[_Row]) -> str:
    """The rows in which torch, with or without cuDNN, takes less time than bnext."""
    slower = []
    for row in rows:
        who = min(("torch", "native"), key=lambda name: row["seconds"][name]["median"])
        ratio = _ratio(row, who, "bnext")
        if ratio < 1:
            slower.append(f"{_name(row)}: {who} / bnext {ratio:.2f}")
    return f"{len(slower)} of {len(rows)} rows.\n\n{_list(slower)}".rstrip()


def _tables(rows: Sequence[_Row], others: Sequence[str]) -> list[str]:
    """A heading and a table for each dtype, layout and mode, in the order in which they come."""
    parts = []
    for group in dict.fromkeys((row["dtype"], row["layout"], row["mode"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["layout"], row["mode"]) == group]
        pairs = [*((name, "bnext") for name in others), ("bnext", "floor")]
        lines = [
            (
                row["shape"],
                *(f"{1e6 * row['seconds'][name]['median']:.1f}" for name in (*others, "bnext", "floor")),
                f"{row['bytes'] / row['seconds']['bnext']['median'] / 1e9:.0f}",
                *(f"{_ratio(row, *pair):.2f}" for pair in pairs),
            )
            for row in own
        ]
        means = (math.exp(sum(math.log(_ratio(row, *pair)) for row in own) / len(own)) for pair in pairs)
        lines.append(("geometric mean", *[""] * (len(others) + 3), *(f"{mean:.2f}" for mean in means)))
        header = ("shape", *others, "bnext", "floor", "GB/s", *(f"{a} / {b}" for a, b in pairs))
        parts += [f"### {', '.join(group)}, batch {own[0]['batch']}", _table(header, lines)]
    return parts or ["None measured."]


def _ratio(row: _Row, above: str, below: str) -> float:
    return row["seconds"][above]["median"] / row["seconds"][below]["median"]


def _name(row: _Row) -> str:
    return " ".join((row["dtype"], row["shape"], row["layout"], row["mode"]))


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
