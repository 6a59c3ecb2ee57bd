"""The benchmark's peak memory of a call."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import memory

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]


def floats(count):
    return torch.empty(count, dtype=torch.float32)


def kept():
    return floats(1000)


def freed_inside():
    temporary = floats(500)
    results = [floats(1000)]
    del temporary
    results.append(floats(100))
    return results


def freed_first():
    temporary = floats(800)
    del temporary
    return floats(1000)


@pytest.mark.parametrize(
    ("call", "bytes_"), [(lambda: None, 0), (kept, 4000), (freed_inside, 6000), (freed_first, 4000)]
)
def test_peak_on_the_cpu(call, bytes_):
    assert [memory.peak_bytes(call, "cpu") for _ in range(2)] == [bytes_, bytes_]


def test_what_is_freed_later_was_held_at_the_peak():
    def call():
        first, second = floats(1000), floats(2000)
        del first
        third = floats(500)
        del second, third

    assert memory.peak_bytes(call, "cpu") == 12000


def test_nothing_is_written():
    script = "import torch; from bench import memory; print(memory.peak_bytes(lambda: torch.empty(10), 'cpu'))"
    command = [sys.executable, "-W", "error", "-c", script]
    root = Path(__file__).parent.parent
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert (found.stdout, found.stderr) == ("40\n", "")
