"""What the batch norms in a checkpoint hold, layer by layer: ranges and means, channels that are dead or exploding."""

import argparse
import csv
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from bnext.checkpoint import read
from bnext.inspect import DEAD_VAR, DEAD_WEIGHT, EXPLODING_VAR, TENSORS, LayerStats, Range, bn_stats
from bnext.output import finite, first_line

_READING = f"""\
the columns:
  min mean max  of running_mean, running_var, weight and bias over a layer's channels, inf and nan left out
  dead          channels with |weight| < {DEAD_WEIGHT:g} or running_var < {DEAD_VAR:g}: their output hardly varies
  exploding     channels with running_var > {EXPLODING_VAR:g}
  nonfinite     values of the four that are inf or nan
  batches       num_batches_tracked

Nothing in the file is executed: one that needs that to load, such as a whole model by torch.save(model), is refused.
exit code: 0, 1 if the file cannot be read or has no batch norm, 2 for bad arguments"""

_PICTURES = (".png", ".svg", ".pdf")
_FIGURES = tuple(field.name for field in fields(Range))
_COLUMNS = [("layer", ""), ("channels", "")]
_COLUMNS += [(name, "{:>8} {:>8} {:>8}".format(*_FIGURES)) for name in TENSORS]
_COLUMNS += [("dead", ""), ("exploding", ""), ("nonfinite", ""), ("batches", "")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of python -m bnext stats."""
    parser.epilog = _READING
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file by torch.save, or .safetensors")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print CSV, nothing rounded, in place of the table")
    formats.add_argument("--json", action="store_true", help="print JSON, nothing rounded, in place of the table")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw curves over the layers: .png, .svg or .pdf")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"expected a file name ending in {', '.join(_PICTURES)}, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("drawing needs matplotlib: pip install matplotlib")
    return path


def run(args: argparse.Namespace) -> int:
    """The exit code."""
    file = args.checkpoint
    try:
        rows = bn_stats(read(file))
        if not rows:
            raise ValueError("no batch norm in it: no name ends in running_mean")
        if args.plot:
            from bnext import plots

            file = args.plot
            plots.save(rows, args.checkpoint.name, file)
    except Exception as error:  # a file can be wrong in any way
        print(f"python -m bnext stats: {file}: {first_line(error)}", file=sys.stderr)
        return 1
    if args.csv:
        _print_csv(rows)
    elif args.json:
        print(json.dumps(finite([asdict(row) for row in rows]), indent=1, allow_nan=False))
    else:
        _print_table(rows)
    return 0


def _print_csv(rows: Sequence[LayerStats]) -> None:
    """A line per layer; a column per figure, such as running_mean_min, empty where it is None or nan."""
    columns = []
    for field in fields(LayerStats):
        columns += [f"{field.name}_{figure}" for figure in _FIGURES] if field.name in TENSORS else [field.name]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = finite(asdict(row))
        for name in TENSORS:
            cells |= {f"{name}_{figure}": value for figure, value in (cells.pop(name) or {}).items()}
        writer.writerow(cells)


def _cells(row: LayerStats) -> list[str]:
    ranges = [getattr(row, name) for name in TENSORS]
    return [
        (row.name if row.name.isprintable() else ascii(row.name)) or "(root)",  # no control codes to a terminal
        "-" if row.channels is None else str(row.channels),
        *("-" if r is None else f"{r.min:8.2g} {r.mean:8.2g} {r.max:8.2g}" for r in ranges),
        *map(str, (row.dead, row.exploding, row.nonfinite)),
        "-" if row.num_batches_tracked is None else str(row.num_batches_tracked),
    ]


def _print_table(rows: Sequence[LayerStats]) -> None:
    """By rich on a terminal where it is installed, plain text elsewhere."""
    lines = [_cells(row) for row in rows]
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _print_rich(rows, lines)
    else:
        headers = [list(line) for line in zip(*_COLUMNS, strict=True)]
        widths = [max(map(len, column)) for column in zip(*headers, *lines, strict=True)]
        for first, *others in (*headers, *lines):
            cells = [f"{first:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True))]
            print("  ".join(cells).rstrip())
    found = {name: sum(getattr(row, name) for row in rows) for name in ("dead", "exploding", "nonfinite")}
    channels = sum(row.channels or 0 for row in rows)
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    print(f"{len(rows)} batch norm{'s' * (len(rows) > 1)}, {channels} channel{'s' * (channels != 1)}; {counts}")


def _print_rich(rows: Sequence[LayerStats], lines: Sequence[Sequence[str]]) -> None:
    """Red: not finite or exploding; yellow: dead channels."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, titles in enumerate(_COLUMNS):
        drawn.add_column("\n".join(titles), justify="right" if i else "left", overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        drawn.add_row(*map(Text, line), style="red" if row.nonfinite or row.exploding else "yellow" * bool(row.dead))
    Console(highlight=False).print(drawn)
