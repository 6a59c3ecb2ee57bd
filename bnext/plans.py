"""How a batch norm would run on a GPU, by each strategy that the kernels have: predictions, no measurement."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from bnext import _C
from bnext.gpus import GPUS
from bnext.output import first_line
from bnext.plan import STRATEGIES, GpuPlan, on_gpu

_READING = """\
the lines: every strategy, - where it is not possible; * before the one chosen, or forced by BNEXT_CUDA_STRATEGY
  streaming      statistics of everything, then everything is read again; also what needs no statistics
  block          a block keeps a channel, or a few, in shared memory between statistics and results
  cluster, grid  the blocks of a cluster, or several blocks of the grid, do so together
  retained       all blocks keep as much as fits, and read the rest again

the columns:
  per SM         blocks on a multiprocessor at once
  occupancy      their threads, of those that a multiprocessor can have
  busy           multiprocessors that have blocks
  shared         bytes of shared memory of a block
  passes         how often the kernels move the tensor: 1 is once read or written
  memory         of these passes, what memory is expected to see: the others find the tensor in the L2 cache
  bandwidth us   a bound: those of memory at the GPU's bandwidth, and nothing else
  estimate us    what is chosen by: with the cache, uneven work and barriers, by constants that nobody has measured yet

exit code: 0, 2 for bad arguments or where there is no GPU"""

_MODES = {  # by the names of python -m bench
    "fwd": {"backward": False, "training": True},
    "bwd": {"backward": True, "training": True},
    "eval": {"backward": False, "training": False},
}
_COLUMNS = {  # of a GpuPlan
    "blocks": "{.blocks}",
    "threads": "{.threads}",
    "cluster": "{.cluster}",
    "per SM": "{.blocks_per_multiprocessor}",
    "occupancy": "{.occupancy:.0%}",
    "busy": "{.busy:.0%}",
    "shared": "{.shared}",
    "launches": "{.launches}",
    "passes": "{.passes:.2f}",
    "memory": "{.memory_passes:.2f}",
    "bandwidth us": "{.bandwidth_microseconds:.1f}",
    "estimate us": "{.estimated_microseconds:.1f}",
}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of python -m bnext plan."""
    parser.epilog = _READING
    parser.set_defaults(error=parser.error)
    add = parser.add_argument
    add("shape", type=_shape, metavar="NxCxHxW", help="or NxC, NxCxL, NxCxDxHxW")
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32", help="(default: float32)")
    add("--layout", choices=("nchw", "nhwc"), default="nchw", help="channels first, or last (default: nchw)")
    add("--mode", type=_modes, default="fwd,bwd", metavar="M", help="of fwd,bwd,eval (default: fwd,bwd)")
    add("--gpu", choices=GPUS, help="(default: torch's current one)")
    add("--bandwidth", type=_bandwidth, metavar="GB/S", help="of its memory (default: what it or its data sheet says)")
    add("--json", action="store_true", help="print JSON, nothing rounded, in place of tables")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 5 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected NxC, NxCxL, NxCxHxW or NxCxDxHxW, all above 0, got {text!r}")
    shape = tuple(map(int, sizes))
    if math.prod(shape) >= 2**50:
        raise argparse.ArgumentTypeError(f"expected fewer than 2^50 elements, got {text}")
    return shape


def _modes(text: str) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in _MODES]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(_MODES)}, got {wrong[0]!r}")
    return list(dict.fromkeys(names))


def _bandwidth(text: str) -> int:
    """Bytes a second."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected GB/s from 1 to 1000000, got {text!r}")
    return round(value * 1e9)


def run(args: argparse.Namespace) -> int:
    """The exit code."""
    shape = "x".join(map(str, args.shape))
    if args.layout == "nhwc" and len(args.shape) not in _FORMATS:
        args.error(f"argument --layout: expected nchw for {shape}, as torch has no channels last of its dimensions")
    try:
        gpu = GPUS[args.gpu] if args.gpu else _C.gpu()
    except RuntimeError as error:
        args.error(f"{first_line(error)}: expected --gpu with one of {', '.join(GPUS)}")
    if args.bandwidth:
        gpu = gpu | {"bandwidth": args.bandwidth}
    format = _FORMATS[len(args.shape)] if args.layout == "nhwc" else torch.contiguous_format
    x = torch.empty(args.shape, dtype=getattr(torch, args.dtype), device="meta", memory_format=format)
    try:
        modes = {mode: _plans(x, gpu, mode) for mode in args.mode}
    except ValueError as error:
        args.error(f"BNEXT_CUDA_STRATEGY: {error}")
    if args.json:
        asked = {"shape": args.shape, "dtype": args.dtype, "layout": args.layout, "gpu": gpu}
        print(json.dumps(asked | {"modes": modes}, indent=1, default=asdict))
        return 0
    name = args.gpu or torch.cuda.get_device_name()
    print(f"{shape} {args.dtype} {args.layout}, {x.nbytes / 1e6:.1f} MB, on {name}, {gpu['bandwidth'] / 1e9:g} GB/s")
    for mode, found in modes.items():
        floor = found["strategies"][found["chosen"]].floor
        print(f"\n{mode}: at least {floor} passes, {floor * x.nbytes / gpu['bandwidth'] * 1e6:.1f} us")
        _print_table(**found)
    return 0


def _plans(x: torch.Tensor, gpu: Mapping[str, Any], mode: str) -> dict[str, Any]:
    chosen = on_gpu(x, gpu, **_MODES[mode])
    strategies = {name: on_gpu(x, gpu, **_MODES[mode], strategy=name) for name in STRATEGIES}
    return {"chosen": chosen.strategy, "strategies": strategies}


def _print_table(chosen: str, strategies: Mapping[str, GpuPlan | None]) -> None:
    lines = [["  strategy", *_COLUMNS]]
    for name, plan in strategies.items():
        cells = [text.format(plan) if plan else "-" for text in _COLUMNS.values()]
        lines.append([f"{'*' if name == chosen else ' '} {name}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        print(f"{first:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True)), sep="  ")
