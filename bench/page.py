"""A run as one HTML page that needs no other file and no network."""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from bench import plots
from bench.cells import COLUMNS, MEAN_COLUMNS, NUMBERS, cells, mean_cells
from bench.files import Report, about, reading
from bench.rows import means

_CASE_COLUMNS = ("suite", "op", "mode", "layout", "dtype", "threads")

_STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --head: #f2f2f2; --bnext: #fdf0e7; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --head: #2a2a2a; --bnext: #3a2a1e; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 100rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
thead th { background: var(--head); white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bnext { background: var(--bnext); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
img { max-width: 100%; background: #fff; border-radius: 6px; margin-bottom: 1rem; }
pre { white-space: pre-wrap; margin: 0; }
"""

# a cell without a number stays last, whichever way a column of numbers is sorted
_SCRIPT = """
for (const head of document.querySelectorAll("thead th")) {
  const label = document.createElement("button");
  label.append(...head.childNodes);
  head.append(label);
  label.onclick = () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = row => row.cells[head.cellIndex].textContent.replace("~", "");
    const order = (a, b) => {
      const sign = up ? 1 : -1;
      if (!head.classList.contains("number")) return sign * text(a).localeCompare(text(b), "en", {numeric: true});
      const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
    };
    const body = head.closest("table").tBodies[0];
    body.append(...[...body.rows].sort(order));
  };
}
"""


def html(report: Report) -> str:
    """Means, pictures where matplotlib is installed, every row in a table that a click on a column sorts, environment.

    All that the report says is escaped.
    """
    title = escape(report.title)
    flat = {name: value for name, value in report.environment.items() if name != "collect_env"}
    rows = [(*(str(getattr(row.case, name)) for name in _CASE_COLUMNS), *cells(row)) for row in report.rows]
    return "\n".join(
        (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>{escape(about(report))}</p>",
            f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in reading(report))}</ul>",
            "<h2>Geometric means</h2>",
            _table("means", MEAN_COLUMNS, [mean_cells(mean) for mean in means(report.rows)]),
            "<h2>Pictures</h2>",
            *_pictures(report),
            "<h2>Rows</h2>",
            _table("rows", (*_CASE_COLUMNS, *COLUMNS), rows),
            "<h2>Environment</h2>",
            _facts({**flat, "argv": json.dumps(list(report.argv))}),
            f"<details><summary>collect_env</summary>{_facts(report.environment.get('collect_env', {}))}</details>",
            f"<script>{_SCRIPT}</script></body></html>\n",
        )
    )


def _table(name: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    kinds = [' class="number"' if column in NUMBERS else "" for column in columns]
    backend = columns.index("backend")

    def joined(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    body = "\n".join(f"<tr{' class=bnext' * (line[backend] == 'bnext')}>{joined('td', line)}</tr>" for line in lines)
    head = joined("th", columns)
    return f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _pictures(report: Report) -> Iterable[str]:
    if not plots.available():
        return ["<p>matplotlib is not installed where this page was made, so it has no pictures.</p>"]
    return [
        f'<p><img alt="{escape(suite)}: % of the memory floor, and GB/s, of each layer" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></p>'
        for suite, picture in plots.pictures(report.rows, report.environment).items()
    ]


def _facts(facts: dict[str, Any]) -> str:
    """A line per fact; line ends in it are kept."""
    lines = (
        f"<tr><th>{escape(name)}</th><td><pre>{escape(str(value))}</pre></td></tr>" for name, value in facts.items()
    )
    return f"<table>{''.join(lines)}</table>"
