"""Pictures of a run, a PNG for each suite; matplotlib, which draws them, is optional."""

import importlib.util
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import shape_text
from bench.cells import group_title, groups
from bench.rows import FLOOR, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "--plot needs matplotlib: pip install matplotlib"

# of Okabe and Ito, told apart by colour-blind readers; bnext has the one warm colour
_BNEXT = "#D55E00"
_OTHERS = ("#56B4E9", "#009E73", "#999999", "#CC79A7", "#0072B2", "#F0E442")
_MARKERS = "osD^vP"

_Look = dict[str, tuple[str, str]]  # colour and marker by backend


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(rows: Sequence[Row], folder: Path, environment: Mapping[str, Any]) -> list[Path]:
    """Writes <suite>.png for each suite with figures; the folder is made. ImportError without matplotlib."""
    if not available():
        raise ImportError(MISSING)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suite, picture in pictures(rows, environment).items():
        paths.append(folder / f"{suite}.png")
        paths[-1].write_bytes(picture)
    return paths


def pictures(rows: Sequence[Row], environment: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG of each suite in which a backend, the floor aside, has figures."""
    suites: dict[str, list[Row]] = {}
    for row in rows:
        suites.setdefault(row.case.suite, []).append(row)
    drawn = {suite: of_suite for suite, of_suite in suites.items() if _measured(of_suite)}
    return {suite: png(of_suite, environment) for suite, of_suite in drawn.items()}


def png(rows: Sequence[Row], environment: Mapping[str, Any]) -> bytes:
    """The picture of one suite's rows, one of them with figures; environment has device, bnext and torch."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    looks = _looks(rows)
    lines = [group for group in groups(rows) if _measured(group)]
    longest = max(len(label) for group in lines for label in _labels(group).values())
    height = 2.6 + 0.03 * longest  # inches, as the labels are slanted
    figure = Figure(figsize=(15, 0.9 + height * len(lines)), dpi=100, layout="constrained")
    panels = figure.subplots(len(lines), 2, squeeze=False, width_ratios=(2, 1))
    for (left, right), group in zip(panels, lines, strict=True):
        _shares(left, group, looks)
        _roofline(right, group, looks)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=8, linestyle="", label=backend)
        for backend, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], color="black", linestyle="--", label="memory floor"))
    if any(not row.samples for group in lines for row in group):
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", label="no figures"))
    title = "{device}, bnext {bnext}, torch {torch}".format_map(environment)
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        title=f"{rows[0].case.suite} on {title}",
        title_fontproperties={"weight": "bold", "size": 13},
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.15)
    return file.getvalue()


def _measured(rows: Sequence[Row]) -> bool:
    return any(row.samples and row.backend != FLOOR for row in rows)


def _looks(rows: Sequence[Row]) -> _Look:
    names = [name for name in dict.fromkeys(row.backend for row in rows) if name != FLOOR]
    others = [name for name in names if name != "bnext"]
    looks = {name: (_OTHERS[i % len(_OTHERS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(others)}
    return {name: looks.get(name, (_BNEXT, "*")) for name in names}


def _labels(group: Sequence[Row]) -> dict[tuple[str, tuple[int, ...]], str]:
    """The name of each layer and shape: the layer's, with the shape where others have it too."""
    places = list(dict.fromkeys((row.case.layer, row.case.shape) for row in group))
    names = [layer for layer, _ in places]
    return {
        (layer, shape): layer if names.count(layer) == 1 else f"{layer} {shape_text(shape)}" for layer, shape in places
    }


def _shares(axes: "Axes", group: Sequence[Row], looks: _Look) -> None:
    """Bars: the percentage of the floor's speed, by layer and backend, from the 20th to the 80th percentile."""
    labels = _labels(group)
    places = {place: i for i, place in enumerate(labels)}
    backends = list(looks)
    width = 0.8 / len(backends)
    for row in group:
        if row.backend == FLOOR:
            continue
        colour, _ = looks[row.backend]
        at = places[row.case.layer, row.case.shape] + (backends.index(row.backend) - (len(backends) - 1) / 2) * width
        spread, share = row.spread, row.floor_share
        if spread is None:
            axes.plot(at, 0, color=colour, marker="x", markeredgewidth=2, clip_on=False, zorder=3)
        elif share is not None:
            percent, low, high = (100 * share * spread.median / t for t in (spread.median, spread.p80, spread.p20))
            errors = [[percent - low], [high - percent]]
            axes.bar(at, percent, width, color=colour, yerr=errors, error_kw={"elinewidth": 1, "ecolor": "#333333"})
    axes.axhline(100, color="black", linestyle="--", linewidth=1.2)
    axes.text(1.005, 100, "memory\nfloor", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    margin = max(0.6, (5 - len(places)) / 2)  # the bars of a few layers are not stretched over the whole panel
    axes.set_xlim(-margin, len(places) - 1 + margin)
    axes.set_ylim(0, max(115, axes.get_ylim()[1]))
    axes.set_xticks(range(len(places)), [*labels.values()], rotation=25, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("% of the memory floor's speed")
    axes.set_title(group_title(group[0].case), loc="left", fontsize=10, fontweight="bold")
    _plain(axes)


def _roofline(axes: "Axes", group: Sequence[Row], looks: _Look) -> None:
    """Points: GB/s by the bytes of the case; the floor is a line."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    floors: dict[int, list[float]] = {}
    for row in group:
        if (speed := row.gb_per_s) is None:
            continue
        if row.backend == FLOOR:
            floors.setdefault(row.case.bytes, []).append(speed)
        else:
            colour, marker = looks[row.backend]
            style = {"color": colour, "marker": marker, "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
            axes.scatter(row.case.bytes, speed, 90 if row.backend == "bnext" else 36, **style)
    line = [(size, statistics.median(speeds)) for size, speeds in sorted(floors.items())]
    if line:
        axes.plot(*zip(*line, strict=True), color="black", linestyle="--", linewidth=1.2, marker="_", markersize=8)
    measured = [row for row in group if row.samples]
    sizes, speeds = [row.case.bytes for row in measured], [row.gb_per_s or 0.0 for row in measured]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
    few = max(sizes) < 100 * min(sizes)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(speeds) < 30 * min(speeds):
        axes.set_ylim(0, 1.1 * max(speeds))
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes that must move", fontsize=9)
    axes.set_ylabel("GB/s")
    _plain(axes)


def _plain(axes: "Axes") -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
