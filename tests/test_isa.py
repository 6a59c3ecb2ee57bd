"""The instruction set that runs: chosen by the machine or by BNEXT_CPU_ISA, and not to be seen in any bit."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bnext

pytestmark = [
    pytest.mark.bnext("bnext's instruction sets"),
    pytest.mark.only("cpu", "about the CPU kernels' instruction sets"),
]

OBJECTS = [*(Path(__file__).parent.parent / "build").glob("temp.*/csrc/cpu/*.o")]
ALL_UNITS = ["scalar", "avx2", "avx512", "avx512bf16"]
UNITS = ALL_UNITS[: ALL_UNITS.index(bnext.ops.cpu_isa) + 1]

EVERYTHING = textwrap.dedent("""
    import hashlib, sys, torch, bnext
    sys.path.insert(0, "tests")
    from helpers import HALF, LARGE, LAYOUTS, SMALL, WIDE, channel_arguments, run, values
    for dtype in WIDE + HALF:
        for layout in LAYOUTS:
            digest = hashlib.sha256()
            for shape in SMALL + LARGE:
                torch.manual_seed(len(shape))
                x, dy, a = values(shape, dtype, layout), values(shape, dtype), channel_arguments(shape[1], dtype)
                for training in (True, False):
                    for t in run(bnext.batch_norm, x, grad_output=dy, training=training, **a).values():
                        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
            print(dtype, layout, digest.hexdigest())
    print(bnext.ops.cpu_isa)
""")


def python(script, isa, check=True, **more):
    environment = {**os.environ, "BNEXT_CPU_ISA": isa, **more}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=check,
        timeout=600,
    )


def test_every_unit_gives_the_same_bits():
    """But for bfloat16 by its own instructions, whose sums have an order of their own."""
    found = [python(EVERYTHING, unit).stdout.split("\n")[:-1] for unit in UNITS]
    assert [lines[-1] for lines in found] == UNITS
    assert all(len(lines) == 9 for lines in found)
    for unit, lines in zip(UNITS, found, strict=True):
        own = "bfloat16" if unit == "avx512bf16" else "none"
        assert [a for a in lines[:-1] if own not in a] == [b for b in found[0][:-1] if own not in b]


def test_neither_writing_past_the_caches_nor_their_size_is_seen_in_a_bit():
    how = {"channels_last": False, "dtype": "float32", "backward": False, "training": True, "threads": 1}
    assert bnext._C.cpu_plan(1, 1, 1, **how)["cache"] > 0
    for unit in (UNITS[0], UNITS[-1]):
        found = [python(EVERYTHING, unit, BNEXT_CPU_LLC=size).stdout for size in ("1", str(1 << 40))]
        assert found[0] == found[1] != ""


@pytest.mark.parametrize("size", ["", "0", "-1", "32M"])
def test_a_size_that_is_none_is_refused(size):
    script = "import torch, bnext; bnext.batch_norm(torch.ones(2, 3), None, None, training=True)"
    error = python(script, UNITS[0], check=False, BNEXT_CPU_LLC=size).stderr
    assert f"BNEXT_CPU_LLC: expected a positive number of bytes, got {size}" in error


@pytest.mark.parametrize("name", ["avx1024", "AVX2"])
def test_an_unknown_name_is_refused(name):
    error = python("import bnext", name, check=False).stderr
    assert f"BNEXT_CPU_ISA: expected scalar, avx2, avx512 or avx512bf16, got {name}" in error


@pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="needs nm and the object files of a build in place"
)
def test_no_wide_code_can_be_merged_into_another_unit():
    """A function that the linker may share would run its AVX version on machines without AVX."""
    units = [o for o in OBJECTS if o.stem in ALL_UNITS[1:]]
    assert len(units) == 3
    for unit in units:
        names = subprocess.run(["nm", "--defined-only", "-C", unit], capture_output=True, text=True, check=True).stdout
        shared = [line for line in names.splitlines() if line.split()[1] in "WVu" and "DW.ref" not in line]
        assert [line for line in shared if f"::{unit.stem}::" not in line] == []
