"""The picture of python -m bnext stats --plot; matplotlib draws it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnext.inspect import DEAD_VAR, TENSORS, LayerStats, Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR, _WARNING = "#0072B2", "#D55E00"  # of Okabe and Ito, told apart by colour-blind readers


def save(rows: Sequence[LayerStats], title: str, path: Path) -> None:
    """Writes path, in the format of its suffix: a panel for each of the four tensors, over the layers in order.

    A line for the mean, a band from the least to the greatest value; a cross on top where not all values are finite.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [row.name or "(root)" for row in rows]
    shown = range(0, len(rows), math.ceil(len(rows) / 120))
    width = min(24, max(6, 1.5 + 0.2 * len(rows)))  # inches
    figure = Figure(figsize=(width, 9 + 0.07 * max(map(len, names))), dpi=100, layout="constrained")
    panels = figure.subplots(len(TENSORS), sharex=True)
    for axes, name in zip(panels, TENSORS, strict=True):
        _curves(axes, name, [getattr(row, name) for row in rows])
    beside = 0.1 * sum(map(len, names)) < width
    panels[-1].set_xticks(shown, [names[i] for i in shown], rotation=0 if beside else 90, fontsize=8, parse_math=False)
    panels[-1].set_xlim(-0.5, len(rows) - 0.5)
    handles = [
        Line2D([], [], color=_COLOUR, marker="o", markersize=3, label="mean over channels"),
        Patch(color=_COLOUR, alpha=0.25, linewidth=0, label="range over channels"),
    ]
    if any(row.nonfinite for row in rows):
        handles.append(Line2D([], [], color=_WARNING, marker="x", linestyle="", label="with inf or nan"))
    figure.suptitle(title, fontweight="bold", parse_math=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path)


def _curves(axes: "Axes", name: str, ranges: Sequence[Range | None]) -> None:
    from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter, StrMethodFormatter

    logarithmic = name == "running_var"
    least = DEAD_VAR / 100 if logarithmic else -math.inf  # a channel without variance would need decades below
    low, mean, high = (
        [math.nan if r is None else max(getattr(r, figure), least) for r in ranges] for figure in ("min", "mean", "max")
    )
    axes.fill_between(range(len(ranges)), low, high, color=_COLOUR, alpha=0.25, linewidth=0)
    axes.vlines(range(len(ranges)), low, high, color=_COLOUR, alpha=0.4, linewidth=1)  # all there is of a lone layer
    axes.plot(mean, color=_COLOUR, marker="o", markersize=3, linewidth=1.2)
    wrong = [i for i, r in enumerate(ranges) if r and r.nonfinite]
    axes.plot(wrong, [0.96] * len(wrong), "x", color=_WARNING, transform=axes.get_xaxis_transform())
    if logarithmic:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        few = top < 1000 * bottom
        axes.yaxis.set_major_locator(
            AutoLocator() if top < 10 * bottom else LogLocator(subs=(1, 2, 5) if few else (1,))
        )
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
