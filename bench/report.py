"""The text of a run: header, one line per row, table of means."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bnext
from bench.cases import Case

_ROW = "{:<11}  {:<6}  {:<4}"
_MEAN = "{:<6}  {:<4}"


@dataclass(frozen=True)
class Row:
    """One layer in one layout and mode: the median seconds of torch, of bnext and of the memory floor."""

    case: Case
    layout: str
    mode: str
    torch: float
    bnext: float
    floor: float

    @property
    def speedup(self) -> float:
        """How many times as fast as torch bnext is."""
        return self.torch / self.bnext

    @property
    def to_floor(self) -> float:
        """How many times as long as the floor bnext takes."""
        return self.bnext / self.floor


def machine() -> str:
    """The model of the CPU, and the instruction set that torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def versions(threads: int) -> str:
    """The versions of bnext and torch, and the number of threads."""
    plural = "s" if threads > 1 else ""
    return f"bnext {bnext.__version__}, torch {torch.__version__}, {threads} thread{plural}"


def header(batch: int, threads: int, dtype: str, warm: bool) -> str:
    """What is measured, on what, and how to read it."""
    memory = "warm pages (glibc is told to keep freed memory)" if warm else "the default allocator"
    return "\n".join(
        (
            f"batch norm, batch {batch}, {dtype}, {versions(threads)}",
            f"on {machine()}; outputs come from {memory}",
            "median ms of each; floor: copying x (bwd: adding x and dy) into existing memory",
            "speedup: torch / bnext; to floor: bnext / floor",
            "",
            _ROW.format("shape", "layout", "mode")
            + f"{'torch':>9}{'bnext':>9}{'floor':>9}{'speedup':>10}{'to floor':>10}",
        )
    )


def row_line(row: Row) -> str:
    """The figures of a row."""
    times = "".join(f"{1e3 * seconds:9.3f}" for seconds in (row.torch, row.bnext, row.floor))
    ratios = f"{row.speedup:9.2f}x{row.to_floor:9.2f}x"
    return _ROW.format(str(row.case), row.layout, row.mode) + times + ratios


def wrong_line(case: Case, layout: str, mode: str, faults: Sequence[str]) -> str:
    """What a row shows instead of figures when a result is wrong."""
    return _ROW.format(str(case), layout, mode) + "    WRONG  " + "; ".join(faults)


def means(rows: Sequence[Row]) -> str:
    """Geometric means per layout and mode: each shape once, and as often as the network has it."""
    lines = [
        f"{'geometric means':<19}{'speedup':>18}{'to floor':>18}",
        _MEAN.format("layout", "mode") + f"{'shapes':>7}" + f"{'plain':>8}{'weighted':>10}" * 2,
    ]
    for layout, mode in dict.fromkeys((row.layout, row.mode) for row in rows):
        group = [row for row in rows if (row.layout, row.mode) == (layout, mode)]
        figures = ""
        for values in ([row.speedup for row in group], [row.to_floor for row in group]):
            figures += f"{_geometric(values, [1] * len(group)):7.2f}x"
            figures += f"{_geometric(values, [row.case.count for row in group]):9.2f}x"
        lines.append(_MEAN.format(layout, mode) + f"{len(group):7}" + figures)
    lines.append("weighted: by how often ResNet-50 has the shape; a --shape counts once")
    return "\n".join(lines)


def _geometric(values: Sequence[float], weights: Sequence[int]) -> float:
    logs = (weight * math.log(value) for value, weight in zip(values, weights, strict=True))
    return math.exp(sum(logs) / sum(weights))
