"""The text of a run: header, one line per row, table of means."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bnext
from bench.cases import DTYPES, Case
from bench.timing import Spread

_ROW = "{:<11}  {:<6}  {:<4}"
_MEAN = "{:<6}  {:<4}"
_ON_CUDA = ("torch", "native", "compile", "bnext", "floor")


@dataclass(frozen=True)
class Row:
    """One layer in one layout and mode: what each candidate and the memory floor took, or why that is not known."""

    case: Case
    layout: str
    mode: str
    dtype: str
    batch: int
    spreads: dict[str, Spread] = field(default_factory=dict)
    fault: str = ""

    def ratio(self, above: str, below: str) -> float:
        """The median time of one over that of another."""
        return self.spreads[above].median / self.spreads[below].median

    @property
    def speedup(self) -> float:
        """How many times as fast as torch bnext is."""
        return self.ratio("torch", "bnext")

    @property
    def to_floor(self) -> float:
        """How many times as long as the floor bnext takes."""
        return self.ratio("bnext", "floor")

    @property
    def bytes(self) -> int:
        """What must move: x read and y written; in the backward x and dy read and dx written."""
        elements = self.batch * self.case.channels * self.case.height * self.case.width
        return (3 if self.mode == "bwd" else 2) * elements * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds by candidate, bytes, and the fault or ""."""
        return {
            "shape": str(self.case),
            "layout": self.layout,
            "mode": self.mode,
            "dtype": self.dtype,
            "batch": self.batch,
            "bytes": self.bytes,
            "seconds": {name: spread.as_dict() for name, spread in self.spreads.items()},
            "fault": self.fault,
        }


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


def gpu() -> str:
    """The name of the current CUDA device, and the versions that come with torch."""
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()})"


def header(batch: int, threads: int, dtype: str, warm: bool) -> str:
    """What is measured on the CPU, on what, and how to read it."""
    memory = "warm pages (glibc is told to keep freed memory)" if warm else "the default allocator"
    return "\n".join(
        (
            f"batch norm, batch {batch}, {dtype}{_parameters(dtype)}, {versions(threads)}",
            f"on {machine()}; outputs come from {memory}",
            "median ms of each; floor: copying x (bwd: adding x and dy) into existing memory",
            "speedup: torch / bnext; to floor: bnext / floor",
            "",
            _ROW.format("shape", "layout", "mode")
            + f"{'torch':>9}{'bnext':>9}{'floor':>9}{'speedup':>10}{'to floor':>10}",
        )
    )


def cuda_header(batch: int, dtype: str) -> str:
    """The same on CUDA."""
    return "\n".join(
        (
            f"batch norm, batch {batch}, {dtype}{_parameters(dtype)}, bnext {bnext.__version__}, "
            f"torch {torch.__version__}",
            f"on {gpu()}; nothing in L2 beforehand",
            "median us of each; native: torch without cuDNN; compile: torch.compile of torch's",
            "floor: copying x (bwd: adding x and dy) into existing memory",
            "GB/s: of bnext, 2 passes over x (bwd: 3); then ratios of times",
            "",
            _ROW.format("shape", "layout", "mode")
            + "".join(f"{name:>9}" for name in _ON_CUDA)
            + f"{'GB/s':>7}"
            + "".join(f"{title:>15}" for title in ("torch/bnext", "native/bnext", "compile/bnext", "bnext/floor")),
        )
    )


def _parameters(dtype: str) -> str:
    return "" if DTYPES[dtype].itemsize > 2 else " (parameters float32)"


def row_line(row: Row) -> str:
    """The figures of a row on the CPU, or why there are none."""
    start = _ROW.format(str(row.case), row.layout, row.mode)
    if row.fault:
        return f"{start}    {row.fault}"
    times = "".join(f"{1e3 * row.spreads[name].median:9.3f}" for name in ("torch", "bnext", "floor"))
    return start + times + f"{row.speedup:9.2f}x{row.to_floor:9.2f}x"


def cuda_row_line(row: Row) -> str:
    """The same on CUDA; "-" for a candidate that was left out."""
    start = _ROW.format(str(row.case), row.layout, row.mode)
    if row.fault:
        return f"{start}    {row.fault}"
    times = "".join(
        f"{1e6 * row.spreads[name].median:9.1f}" if name in row.spreads else f"{'-':>9}" for name in _ON_CUDA
    )
    pairs = [(name, "bnext") for name in ("torch", "native", "compile")] + [("bnext", "floor")]
    ratios = "".join(f"{row.ratio(*pair):14.2f}x" if pair[0] in row.spreads else f"{'-':>15}" for pair in pairs)
    return start + times + f"{row.bytes / row.spreads['bnext'].median / 1e9:7.0f}" + ratios


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
