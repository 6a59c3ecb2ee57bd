"""What the benchmark's figures rest on: the check of every output, means, plans, floors."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import backends, floors, rows, verify
from bench.cases import EPS, OPS, Case, make_inputs
from bnext import reference

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
]


def case_of(mode="fwd", dtype="float32", op="bn"):
    return Case("custom", "4x6x5x3", (4, 6, 5, 3), 1, mode, "nchw", dtype, "cpu", 1, op)


@pytest.mark.parametrize(
    ("op", "output"),
    [
        *itertools.product(("bn", "bn+add+relu"), ("y", "dx", "dw", "db", "running_mean", "running_var")),
        ("bn+add+relu", "dresidual"),
        ("bn+relu", "y"),
    ],
)
@pytest.mark.parametrize("name", ["bnext", "torch"])
@pytest.mark.parametrize("fault", ["value", "dtype", "shape", "nan", "format"])
def test_every_output_is_checked(op, output, name, fault):
    inputs = make_inputs((4, 6, 5, 3), torch.float32, "cpu", op).to(torch.channels_last)
    expected = verify.oracle(inputs, "fwd_bwd")
    of_torch = verify.errors_of_torch(expected, inputs, "fwd_bwd")
    good, each = (backends.candidate(backends.find(name), inputs, "fwd_bwd") for _ in range(2))
    assert verify.fault(name, good, expected, inputs, "fwd_bwd", of_torch) == ""
    if fault == "format" and expected[output].dim() == 1:
        return

    def broken(t):
        change = {
            "value": lambda: t * (1 + 1e-3),
            "dtype": lambda: t.double(),
            "shape": lambda: t[:-1],
            "nan": lambda: torch.full_like(t, math.nan),
            "format": lambda: t.contiguous(),
        }
        return change[fault]()

    class Broken:
        outputs = staticmethod(lambda: (found := each.outputs()) | {output: broken(found[output])})

    assert verify.fault(name, Broken, expected, inputs, "fwd_bwd", of_torch).startswith(f"{output}: ")


def test_a_wrong_torch_is_no_excuse():
    """bnext is measured by torch's errors, but not if those are nonsense."""
    inputs = make_inputs((4, 6, 5, 3), torch.float32, "cpu")
    expected = verify.oracle(inputs, "eval")
    each = backends.candidate(backends.Backend("bnext", "", lambda op: lambda *a: 2 * F.batch_norm(*a)), inputs, "eval")
    found = verify.fault("bnext", each, expected, inputs, "eval", dict.fromkeys(expected, math.inf))
    assert found.startswith("y: error ")


@pytest.mark.parametrize(("op", "called"), [("bn", "batch_norm"), ("bn+relu", "batch_norm_act")])
def test_a_bnext_that_is_torch_is_noticed(op, called):
    inputs = make_inputs((4, 6, 5, 3), torch.float32, "cpu", op)
    expected = verify.oracle(inputs, "fwd")
    each = backends.candidate(backends.find("torch"), inputs, "fwd")
    of_torch = verify.errors_of_torch(expected, inputs, "fwd")
    found = verify.fault("bnext", each, expected, inputs, "fwd", of_torch)
    assert found == f"bnext::{called}_train was called 0 times, not once"


@pytest.mark.parametrize("op", ["bn+relu", "bn+add+relu"])
def test_no_gradient_depends_on_a_plausible_error(op):
    """Next to 0 a ReLU passes all of a gradient or nothing: torch's channels-last statistics are off by as much."""
    inputs = make_inputs((8, 16, 10, 10), torch.bfloat16, "cpu", op)
    mean, _, invstd = reference.batch_stats(inputs.x.double(), EPS)
    z = reference.normalize(inputs.x.double(), inputs.weight.double(), inputs.bias.double(), mean, invstd)
    z = z.abs() if inputs.residual is None else (z + inputs.residual.double()).abs()
    assert (inputs.dy == 0)[z < 0.99 * 3e-2 * z.max()].all()
    assert not (inputs.dy == 0)[z > 1.01 * 3e-2 * z.max()].any()


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd_bwd", "eval"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own, while it compiles
def test_every_backend_can_be_called_again(op, mode):
    inputs = make_inputs((4, 6, 5, 3), torch.bfloat16, "cpu", op)
    expected = verify.oracle(inputs, mode)
    composed = backends.composed
    eager = backends.Backend("compile", "", lambda op: torch.compile(composed(F.batch_norm, op), backend="eager"))
    native = backends.Backend("torch-native", "", lambda op: composed(backends._native, op))
    for backend in (backends.find("torch"), backends.find("bnext"), eager, native):
        each = backends.candidate(backend, inputs, mode)
        of_torch = verify.errors_of_torch(expected, inputs, mode)
        assert verify.fault(backend.name, each, expected, inputs, mode, of_torch) == ""
        each.call()


def test_means_weigh_layers_by_how_often_they_occur():
    def row(count, seconds, speedup, share, status="ok", shape=(2, 3, 4, 4)):
        case = Case("net", "a", shape, count, "fwd", "nchw", "float32", "cpu", 1)
        return rows.Row(case, "bnext", status, samples=(seconds,), speedup=speedup, floor_share=share)

    (mean,) = rows.means([row(3, 1.0, 2.0, 0.5), row(1, 1.0, 32.0, 0.5), row(9, 1.0, 0.1, 0.1, status="wrong")])
    assert (mean.suite, mean.layers) == ("net", 2)
    assert mean.speedup == pytest.approx(4.0)
    assert mean.floor_share == pytest.approx(0.5)
    assert mean.worst.speedup == 2.0


def test_means_show_what_threads_bring():
    def row(threads, seconds, shape, count=1):
        case = Case("net", "a", shape, count, "fwd", "nchw", "float32", "cpu", threads)
        return rows.Row(case, "bnext", samples=(seconds,))

    small, large = (2, 3, 4, 4), (2, 3, 8, 8)
    found = rows.means([row(2, 1.0, small), row(2, 1.0, large, 3), row(1, 1.0, small), row(1, 2.0, large, 3)])
    assert [(mean.threads, mean.scaling) for mean in found] == [(2, pytest.approx(2**0.75)), (1, None)]


CHOSEN = """
from bench import plans
from bench.cases import Case
def show(mode, layout, shape, threads=1, op="bn"):
    print(*plans.predicted(Case("net", "a", shape, 1, mode, layout, "float32", "cpu", threads, op)), sep="; ")
show("eval", "nchw", (4, 6, 5, 3))
show("fwd", "nchw", (4, 6, 5, 3))
show("fwd", "nchw", (4, 6, 5, 3), 2)
show("fwd_bwd", "nchw", (32, 64, 56, 56))
show("fwd_bwd", "nchw", (128, 1024, 14, 14))
show("fwd", "nchw", (32, 1024, 14, 14))
show("fwd", "nchw", (32, 8192, 5, 5))
show("fwd", "nhwc", (32, 64, 56, 56))
show("bwd", "nhwc", (32, 64, 56, 56))
show("bwd", "nhwc", (32, 64, 7, 7))
show("bwd", "nhwc", (32, 64, 56, 56), op="bn+relu")
show("bwd", "nhwc", (32, 64, 56, 56), op="bn+add+relu")
"""


def group_bytes():
    """Of a group of channels: three eighths of what Linux says of the second-level cache, or what is usual."""
    kilobytes = 1024
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == "2":
            kilobytes = int((index / "size").read_text().strip().removesuffix("K"))
    return max(384, kilobytes * 3 // 8) * 1024


def test_what_bnext_chooses():
    held = group_bytes()
    environment = {**os.environ, "BNEXT_CPU_LLC": str(32 * 1024 * 1024)}
    run = subprocess.run(
        [sys.executable, "-c", CHOSEN],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "one step; 2",
        "by 6 channels; 2",
        "two steps; 2",  # too few channels for two threads
        f"by {max(1, held // 401408)} channels, streaming; by {max(1, held // 802816)} channels, streaming; 5",
        # so many that 1024 elements lie one behind the other
        f"by {max(6, held // 100352)} channels, streaming; by {max(6, held // 200704)} channels, streaming; 5",
        f"by {held // 25088} channels, streaming; 2",
        f"by {held // 3200} channels; 2",  # planes of few elements are not streamed
        "two steps, streaming; 3",
        "two steps, streaming; 5",
        "two steps; 3",
        "two steps, streaming; 5",
        "two steps, streaming; 6.06",  # the mask is read twice
    ]


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each operator is given to read, and to write."""

    def __init__(self):
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if isinstance(value, torch.Tensor) and value.dim():
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written += value.nbytes
                else:
                    self.read += value.nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "mode", "read", "written"),
    [
        ("bn", "fwd", (1, 0), (1, 0)),
        ("bn", "bwd", (2, 0), (1, 0)),
        ("bn+relu", "fwd_bwd", (3, 0), (2, 0)),
        ("bn+add+relu", "fwd", (2, 0), (1, 1)),
        ("bn+add+relu", "bwd", (2, 1), (2, 0)),
        ("bn+add+relu", "fwd_bwd", (4, 1), (3, 1)),
        ("bn+add+relu", "eval", (2, 0), (1, 0)),
    ],
)
def test_the_floor_moves_what_it_says(op, mode, read, written):
    case = case_of(mode, dtype="bfloat16", op=op)
    floor = floors.floor(make_inputs(case.shape, torch.bfloat16, "cpu", op), mode)
    with Traffic() as traffic:
        floor()
    assert traffic.read == read[0] * case.tensor_bytes + read[1] * 45
    assert traffic.written == written[0] * case.tensor_bytes + written[1] * 45
    assert traffic.read + traffic.written == case.bytes
