"""Bits that do not depend on the threads, and threads that are really used."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import by_dtype, by_layout, by_mode, channel_arguments, in_layout, run, values

import bnext

pytestmark = [
    pytest.mark.bnext("torch's own bits depend on the threads"),
    pytest.mark.only("cpu", "about the CPU kernels' threads"),
]

# Many channels, few channels with large planes, one channel, one image, many rows.
SHAPES = [(8, 64, 14, 14), (4, 3, 128, 130), (1, 1, 300, 301), (1, 33, 70, 70), (20000, 5), (6, 2048, 7, 7)]


def everything(x, dy, arguments, training):
    return run(bnext.batch_norm, x, grad_output=dy, training=training, **arguments)


@by_mode
@by_layout
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits(shape, dtype, layout, training):
    x, dy = values(shape, dtype, layout), values(shape, dtype, layout)
    arguments = channel_arguments(shape[1], dtype)
    torch.set_num_threads(1)
    first = everything(x, dy, arguments, training)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        again = everything(x, dy, arguments, training)
        for name, value in first.items():
            assert torch.equal(again[name], value), f"{name} with {threads} threads"


def test_saved_statistics_have_the_same_bits():
    x = values((4, 3, 128, 130), torch.float32)
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append(torch.ops.bnext.batch_norm_train(x, None, None, None, None, None, 0.1, 1e-5)[1:])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@by_mode
@by_layout
@by_dtype
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (2, 9, 128, 130), (3000, 50), (6, 512, 7, 7)], ids=str)
def test_a_channel_does_not_depend_on_its_neighbours(shape, dtype, layout, training):
    """Any order of the channels gives the same bits."""
    x, dy = values(shape, dtype, layout), values(shape, dtype, layout)
    arguments = channel_arguments(shape[1], dtype)
    first = everything(x, dy, arguments, training)
    order = torch.randperm(shape[1])
    parts = [in_layout(t[:, order], layout) for t in (x, dy)]
    for name, value in everything(*parts, {k: v[order] for k, v in arguments.items()}, training).items():
        expected = first[name][:, order] if first[name].dim() > 1 else first[name][order]
        assert torch.equal(value, expected), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the threads' times from /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("shape", ["32, 64, 56, 56", "8, 2, 512, 512"], ids=["channels", "phases"])
def test_two_threads_work(shape):
    """Without OpenMP at::parallel_for is silently serial: two threads must both have used the CPU."""
    script = textwrap.dedent(f"""
        import pathlib, time, torch, bnext
        torch.set_num_threads(2)
        x = torch.ones({shape})
        def busy():
            return {{t.name: int((t / "stat").read_text().rsplit(")")[1].split()[11])
                    for t in pathlib.Path("/proc/self/task").iterdir()}}
        bnext.batch_norm(x, None, None, training=True)
        before, end = busy(), time.monotonic() + 1.5
        while time.monotonic() < end:
            bnext.batch_norm(x, None, None, training=True)
        print(sorted(after - before.get(t, 0) for t, after in busy().items())[-2:])
    """)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # waiting is not working
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, timeout=120
    ).stdout
    ticks = [int(t) for t in output.strip(" []\n").split(",")]
    assert len(ticks) == 2, output
    assert ticks[0] >= 0.25 * ticks[1], f"ticks of the two busiest threads: {ticks}"
