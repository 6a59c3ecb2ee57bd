"""The benchmark's run: what it times is checked, what it cannot time has a row that says so, its files are whole."""

import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bench.__main__ as command
from bench import backends, layers, timing, verify
from bench.cases import DTYPES, OPS

ROOT = Path(__file__).parent.parent
QUICK = ("--min-time", "0", "--timeout", "0")

pytestmark = [
    pytest.mark.bnext("bnext's benchmark"),
    pytest.mark.only("cpu", "about the benchmark's workings, on the CPU"),
    pytest.mark.usefixtures("one_thread"),
]


def bench(*arguments, shape="4,6,5,3"):
    return command.main([*(("--shape", shape) if shape else ()), *QUICK, "--allocator", "default", *arguments])


def document(tmp_path, *arguments, code=0, **keywords):
    file = tmp_path / "run.json"
    assert bench(*arguments, "--json", str(file), **keywords) == code
    return json.loads(file.read_text())


def wrong(*arguments):
    return 1.5 * F.batch_norm(*arguments)


def in_place(x, *arguments):
    y = F.batch_norm(x, *arguments)
    x.data.mul_(2)
    return y


_CALLS = itertools.count()


def right_at_first(*arguments):
    return F.batch_norm(*arguments) * (1 if next(_CALLS) == 0 else 2)


def leaves(*arguments):
    raise SystemExit(0)


def fails_later(*arguments):
    if next(_CALLS) > 0:
        raise TypeError("not again")
    return F.batch_norm(*arguments)


MOVED = {  # tensors of 360 elements, masks of 45 bytes
    "bn": {"fwd": (2, 0), "bwd": (3, 0), "fwd_bwd": (5, 0), "eval": (2, 0)},
    "bn+relu": {"fwd": (2, 0), "bwd": (3, 0), "fwd_bwd": (5, 0), "eval": (2, 0)},
    "bn+add+relu": {"fwd": (3, 1), "bwd": (4, 1), "fwd_bwd": (7, 2), "eval": (3, 0)},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_rows_of_every_dtype(op, dtype, tmp_path, capsys):
    modes = ("fwd", "bwd", "fwd_bwd", "eval")
    found = document(tmp_path, "--op", op, "--dtype", dtype, "--mode", ",".join(modes))
    assert found["schema"] == 1
    assert not found["interrupted"]
    order = [(row["mode"], row["layout"], row["backend"]) for row in found["rows"]]
    assert order == list(itertools.product(modes, ("nchw", "nhwc"), ("floor", "bnext", "torch")))
    for row in found["rows"]:
        assert (row["shape"], row["op"], row["dtype"]) == ([4, 6, 5, 3], op, dtype)
        assert (row["status"], row["detail"]) == ("ok", "")
        tensors, masks = MOVED[op][row["mode"]]
        passes = round(tensors + masks * 45 / (360 * DTYPES[dtype].itemsize), 2)
        assert row["bytes"] == tensors * 360 * DTYPES[dtype].itemsize + masks * 45
        assert len(row["samples"]) == row["seconds"]["count"] == 5
        assert row["seconds"]["median"] == sorted(row["samples"])[2]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"]["median"] / 1e9)
        assert (row["passes"], row["plan"] != "") == ((passes, True) if row["backend"] == "bnext" else (None, False))
        assert (row["peak_bytes"] is None) == (row["backend"] == "floor")
    by_key = {(row["mode"], row["layout"], row["backend"]): row for row in found["rows"]}
    for mode, layout in itertools.product(modes, ("nchw", "nhwc")):
        medians = {b: by_key[mode, layout, b]["seconds"]["median"] for b in ("floor", "bnext", "torch")}
        assert by_key[mode, layout, "bnext"]["speedup"] == pytest.approx(medians["torch"] / medians["bnext"])
        assert by_key[mode, layout, "bnext"]["floor_share"] == pytest.approx(medians["floor"] / medians["bnext"])
    assert "Geometric means" in capsys.readouterr().out


def test_peak_is_what_a_call_allocates(tmp_path):
    found = document(tmp_path, "--layout", "nchw", "--backend", "bnext", shape="4,64,32,32")
    tensor = 4 * 64 * 32 * 32 * 4
    peaks = {row["mode"]: row["peak_bytes"] for row in found["rows"] if row["backend"] == "bnext"}
    assert peaks == {"fwd": tensor + 2 * 256, "bwd": tensor + 2 * 256, "eval": tensor + 2 * 256}
    found = document(tmp_path, "--layout", "nchw", "--op", "bn+add+relu", shape="4,64,32,32")["rows"]
    peaks = {(row["mode"], row["backend"]): row["peak_bytes"] for row in found}
    assert peaks["fwd", "bnext"] == tensor + tensor // 32 + 2 * 256  # with the mask
    assert peaks["bwd", "bnext"] == 2 * tensor + 2 * 256
    assert peaks["fwd", "torch"] < 1.01 * tensor  # in place
    assert peaks["eval", "bnext"] == tensor + 2 * 256  # no mask


@pytest.mark.parametrize("who", ["test_bench:wrong", "bnext"])
def test_a_wrong_backend_gets_no_speed(who, tmp_path, monkeypatch, capsys):
    if who == "bnext":
        bad = backends.Backend("bnext", "", lambda op: wrong)
        monkeypatch.setitem(backends.BACKENDS, "bnext", bad)
    found = document(tmp_path, "--backend", f"{who},torch", "--mode", "fwd,bwd,eval", code=1)
    for row in found["rows"]:
        if row["backend"] == who:
            assert row["status"] == "wrong"
            assert re.search(r"(y|dx): error \d\.\de.\d\d, allowed", row["detail"])
            assert (row["seconds"], row["samples"], row["speedup"], row["gb_per_s"]) == (None, [], None, None)
        else:
            assert row["status"] == "ok"
    shown = capsys.readouterr().out
    assert shown.count("wrong: ") == 6
    assert not re.search(rf"1  {who} +\d", shown)


@pytest.mark.parametrize(
    ("who", "status", "detail"),
    [
        ("in_place", "wrong", "changed its input x"),
        ("right_at_first", "wrong", "y: error"),
        ("leaves", "failed", "SystemExit: 0"),
        ("fails_later", "failed", "TypeError: not again"),
    ],
)
def test_a_bad_backend_harms_no_other(who, status, detail, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "this_module", sys.modules[__name__])
    for mode in ("fwd", "eval"):
        monkeypatch.setitem(globals(), "_CALLS", itertools.count())
        options = ("--backend", f"bnext,this_module:{who},torch", "--mode", mode, "--layout", "nchw")
        found = {row["backend"].rpartition(":")[2]: row for row in document(tmp_path, *options, code=1)["rows"]}
        assert [name for name, row in found.items() if row["status"] == "ok"] == ["floor", "bnext", "torch"]
        assert (found[who]["status"], found[who]["seconds"]) == (status, None)
        assert found[who]["detail"].startswith(detail)
        assert found["bnext"]["speedup"] > 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_onednn(tmp_path):
    found = document(tmp_path, "--backend", "torch-mkldnn,torch,torch-native", "--mode", "fwd,bwd,fwd_bwd,eval")
    for row in found["rows"]:
        if row["backend"] == "torch-mkldnn":
            assert row["status"] == ("ok" if row["layout"] == "nchw" else "unsupported")
        elif row["backend"] == "torch-native":
            assert (row["status"], row["detail"].partition(":")[0]) == ("unsupported", "there is no cuDNN on the CPU")


@pytest.mark.parametrize(
    ("error", "status", "detail", "code"),
    [
        (torch.OutOfMemoryError("of 9 GB"), "out of memory", "of 9 GB", 0),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nat"), "out of memory", None, 0),
        (RuntimeError("no launch\nat all"), "failed", "RuntimeError: no launch", 1),
        (NotImplementedError("not for this"), "unsupported", "not for this", 0),
    ],
    ids=["gpu-memory", "cpu-memory", "launch", "dtype"],
)
@pytest.mark.parametrize("where", ["inputs", "oracle", "timing", "backend"])
def test_what_cannot_run_is_a_row_and_the_run_goes_on(where, error, status, detail, code, tmp_path, monkeypatch):
    owner, name = {
        "inputs": (layers, "make_inputs"),
        "oracle": (verify, "oracle"),
        "timing": (timing, "interleaved"),
        "backend": (backends, "candidate"),
    }[where]
    working, calls = getattr(owner, name), itertools.count()

    def fail_once(*arguments):
        if next(calls) == (1 if where == "backend" else 0):  # the first candidate is torch's, to compare with
            raise error
        return working(*arguments)

    monkeypatch.setattr(owner, name, fail_once)
    found = document(tmp_path, "--shape", "3,2", "--mode", "fwd,eval", "--backend", "bnext", code=code)["rows"]
    bad = [row for row in found if row["status"] != "ok"]
    assert {row["status"] for row in bad} == {status}
    assert {row["backend"] for row in bad} == {"bnext"}
    assert len(bad) == {"inputs": 4, "oracle": 2, "timing": 1, "backend": 1}[where]
    assert detail in (None, bad[0]["detail"])
    assert sum(row["status"] == "ok" and row["backend"] == "bnext" for row in found) == 6 - len(bad)


def test_not_installed_and_unsupported_are_rows(tmp_path):
    found = document(tmp_path, "--backend", "bnext,inplace-abn", "--layout", "nhwc", "--mode", "eval", shape="5,4,3")
    assert [(row["backend"], row["status"]) for row in found["rows"]] == [
        ("bnext", "unsupported"),
        ("inplace-abn", "unsupported"),
    ]
    found = document(tmp_path, "--backend", "bnext,inplace-abn", "--mode", "eval")
    assert {row["detail"] for row in found["rows"] if row["status"] == "not installed"} == {
        "there is no package inplace_abn here"
    }
    single = document(tmp_path, "--mode", "fwd,eval", shape="1,7")["rows"]
    assert [row["status"] for row in single if row["backend"] == "bnext"] == ["unsupported", "ok"]
    assert "training needs more than 1 value per channel" in single[0]["detail"]


def test_threads_are_those_of_the_row(tmp_path, monkeypatch):
    seen, working = [], timing.interleaved
    monkeypatch.setattr(timing, "interleaved", lambda *a: (seen.append(torch.get_num_threads()), working(*a))[1])
    document(tmp_path, "--threads", "2,1", "--mode", "fwd", "--layout", "nchw")
    assert seen == [2, 1]


def process(*arguments, **keywords):
    words = [sys.executable, "-m", "bench", "--shape", "2,3,4,5", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **keywords)


def test_a_pipe_gets_rows_alone():
    run = process(*QUICK, "--json", "-", stdout=subprocess.PIPE)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert len(json.loads(out)["rows"]) == 18
    run = process(*QUICK, "--repro", stdout=subprocess.PIPE)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert out.isascii()
    assert not re.search(r"\x1b|\r", out)


def test_a_terminal_gets_a_table_and_progress():
    pytest.importorskip("rich")
    main, end = pty.openpty()
    run = process(*QUICK, "--mode", "fwd", stdout=end)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        shown += part
        if not part:
            break
    os.close(main)
    assert run.wait(60) == 0
    assert run.stderr.read() == ""  # which is no terminal here
    run.stderr.close()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert plain != shown.decode()
    assert re.search(r"fwd +nchw +1 +bnext +~?[\d.]+", plain)


def test_ctrl_c_leaves_what_was_measured(tmp_path):
    file, table = tmp_path / "run.json", tmp_path / "run.csv"
    files = ("--json", str(file), "--csv", str(table), "--md", str(tmp_path / "run.md"))
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in a shell's background too
    run = process("--min-time", "0.4", "--suite", "small", *files, stdout=subprocess.PIPE, **heard)
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "")
    found = json.loads(file.read_text())
    assert found["interrupted"]
    assert len(found["rows"]) >= 3
    assert len(table.read_text().splitlines()) == 1 + len(found["rows"])
    assert "Geometric means" in out
    assert not list(tmp_path.glob("*.part"))


def test_a_closed_pipe_and_an_end_from_outside_leave_what_was_measured(tmp_path):
    file, page = tmp_path / "run.json", tmp_path / "run.html"
    run = process(*QUICK, "--json", str(file), "--html", str(page), stdout=subprocess.PIPE)
    while not run.stdout.readline().startswith("fwd"):  # a row; then nobody listens any more
        pass
    run.stdout.close()
    assert run.wait(60) == 141
    run.stderr.close()
    assert len(json.loads(file.read_text())["rows"]) >= 3
    assert "</html>" in page.read_text()
    run = process("--min-time", "0.4", "--suite", "small", "--json", str(file), stdout=subprocess.DEVNULL)
    file.unlink()
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.terminate()
    assert run.communicate(timeout=60)[1] == ""
    assert run.returncode == 130
    assert json.loads(file.read_text())["interrupted"]
