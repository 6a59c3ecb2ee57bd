"""The layer benchmark: what it times is checked, what it cannot time has a row that says so."""

import argparse
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import layers, report, timing, verify
from bench.candidates import _native, batch_norms, candidate
from bench.cases import DTYPES, LAYOUTS, MODES, Case, make_inputs

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(layers, "_SECONDS", {"cpu": 0.0})


def bench(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench", "layers", "--batch", "4", "--shape", "6,5,3", *arguments])
    return command.main()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_dtype(dtype, monkeypatch, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert bench(monkeypatch, "--dtype", dtype, "--reps", "3", "--json", str(file), "--allocator", "default") == 0
    rows = json.loads(file.read_text())
    assert [(row["mode"], row["layout"]) for row in rows] == list(itertools.product(MODES, LAYOUTS))
    for row in rows:
        assert (row["shape"], row["batch"], row["dtype"], row["fault"]) == ("6x5x3", 4, dtype, "")
        assert row["bytes"] == (3 if row["mode"] == "bwd" else 2) * 4 * 6 * 5 * 3 * DTYPES[dtype].itemsize
        assert set(row["seconds"]) == {"torch", "bnext", "floor"}
        assert all(0 < s["p20"] <= s["median"] <= s["p80"] and s["count"] == 3 for s in row["seconds"].values())
    assert "geometric means" in capsys.readouterr().out


def test_without_a_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(monkeypatch, "--device", "cuda") == 2
    assert capsys.readouterr().err == "--device cuda: torch finds no NVIDIA GPU here\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own, while it compiles
def test_every_candidate_is_checked_and_can_be_called_again(mode):
    inputs = make_inputs(Case(6, 5, 3), 4, torch.bfloat16, "cpu")
    found = {**batch_norms("cpu", compiled=False), "native": _native, "compile": torch.compile(_eager, backend="eager")}
    candidates = {name: candidate(f, inputs, mode) for name, f in found.items()}
    assert verify.faults(candidates, verify.oracle(inputs, mode), inputs, mode) == []
    for each in candidates.values():
        each.call()


def _eager(*arguments):
    return torch.nn.functional.batch_norm(*arguments)


@pytest.mark.parametrize("who", ["torch", "bnext"])
def test_a_wrong_result_is_a_row_without_figures(who, monkeypatch, capsys, tmp_path):
    good = batch_norms("cpu", compiled=False)
    wrong = {**good, who: lambda *arguments: good[who](*arguments) * 1.5}
    monkeypatch.setattr(layers, "batch_norms", lambda *_, **__: wrong)
    file = tmp_path / "rows.json"
    assert bench(monkeypatch, "--mode", "eval", "--json", str(file)) == 1
    assert capsys.readouterr().out.count(f"WRONG  {who} y: error") == 2
    assert all(row["fault"].startswith("WRONG") and row["seconds"] == {} for row in json.loads(file.read_text()))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("of 9 GB"), "out of GPU memory"),
        (RuntimeError("no launch\nat all"), "FAILED  no launch"),
    ],
    ids=["memory", "launch"],
)
@pytest.mark.parametrize("where", ["make_inputs", "verify.oracle", "floor"])
def test_what_cannot_run_is_a_row_and_the_run_goes_on(where, error, fault, monkeypatch):
    calls = itertools.count()
    owner, _, name = where.rpartition(".")
    owner = getattr(layers, owner) if owner else layers
    working = getattr(owner, name)

    def fail_at_first(*arguments):
        if next(calls) == 0:
            raise error
        return working(*arguments)

    monkeypatch.setattr(owner, name, fail_at_first)
    args = argparse.Namespace(
        shape=[Case(6, 5, 3), Case(3, 2, 2)], layout=None, mode=None, batch=4, dtype="float32", device="cpu",
        no_compile=False, reps=1,
    )  # fmt: skip
    faults = [row.fault for row in layers._rows(args)]
    failed = {"make_inputs": 6, "verify.oracle": 2, "floor": 1}[where]
    assert faults == [fault] * failed + [""] * (12 - failed)


def test_a_cuda_row_leaves_out_what_was_not_timed():
    def spreads(**medians):
        return {name: timing.Spread.of([seconds]) for name, seconds in medians.items()}

    case = Case(64, 56, 56)
    medians = {"torch": 3e-4, "native": 4e-4, "bnext": 2e-4, "floor": 1.6e-4}
    plain = report.Row(case, "nchw", "fwd", "bfloat16", 256, spreads(**medians))
    figures = report.cuda_row_line(plain).split()[3:]
    assert figures == ["300.0", "400.0", "-", "200.0", "160.0", "1028", "1.50x", "2.00x", "-", "1.25x"]
    full = report.Row(case, "nchw", "fwd", "bfloat16", 256, spreads(**medians, compile=1e-4))
    assert report.cuda_row_line(full).split()[5] == "100.0"
    assert report.cuda_row_line(full).split()[-2] == "0.50x"


def test_a_queue_that_ran_dry_is_filled_longer(monkeypatch):
    """Of the CUDA timer, what can be tried without CUDA: the spin grows until the host is ahead of the GPU."""
    spins = []

    class Event:
        def __init__(self, enable_timing=False):
            pass

        def record(self):
            pass

        def query(self):
            return spins[-1] < 4 * timing._FIRST_SPIN

        def elapsed_time(self, other):
            return 2.0

    fake = SimpleNamespace(
        Event=Event,
        synchronize=lambda: None,
        _sleep=spins.append,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=64),
    )
    monkeypatch.setattr(timing.torch, "cuda", fake)
    empty = torch.empty
    monkeypatch.setattr(timing.torch, "empty", lambda *size, device, **keywords: empty(*size, **keywords))
    called = []
    found = timing.interleaved([lambda: called.append("a"), lambda: called.append("b")], 3, 0.0, "cuda")
    assert [spread.median for spread in found] == [2e-3, 2e-3]
    assert spins == [timing._FIRST_SPIN * n for n in (1, 2, 4, 4, 4, 4, 4)]
    assert called == ["a", "b"] * 7


def test_percentiles():
    assert timing.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == timing.Spread(3.5, 2.0, 5.0, 6)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0, 1)
