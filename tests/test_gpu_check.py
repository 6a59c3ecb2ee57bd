"""make gpu-check, as far as it goes without a GPU: its steps, their verdicts, and what it says without one."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_gpu_report import FACTS, ROWS, report, rows, section

from bench import gpu_bench, gpu_check, gpu_steps, options
from bench.gpu_report import markdown
from bench.gpu_steps import Step

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.bnext("bnext's own check of a GPU"),
    pytest.mark.only("cpu", "about make gpu-check, by trials on the CPU"),
]

STRATEGIES = ["streaming", "block", "cluster", "grid", "retained"]


@pytest.mark.parametrize(
    ("script", "code"), [("print('hello')", 0), ("raise SystemExit(3)", 3), ("import time; time.sleep(60)", None)]
)
def test_a_command_ends_in_time_and_leaves_its_output(script, code, tmp_path):
    log = tmp_path / "log"
    found, seconds = gpu_steps.execute([sys.executable, "-c", script], log, 1.0 if code is None else 60.0)
    assert found == code
    assert seconds < 30
    assert log.read_text() == ("hello\n" if code == 0 else "")


TRIAL = """
import os
import pytest

@pytest.mark.parametrize("n", range(3))
def test_good(n):
    pass

def test_bad():
    assert False

@pytest.mark.skip(reason="no")
def test_skipped():
    pass
"""


def test_a_step_counts_tests_and_names_those_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')")
    sources = {
        "test_trial": TRIAL,
        "test_crash": "import os\ndef test_crash():\n    os._exit(7)\n",
        "test_exit": "import atexit, os\natexit.register(os._exit, 9)\ndef test_exit():\n    pass\n",
        "test_none": "import pytest\npytest.importorskip('no_such_module')\n",
    }
    files = [tmp_path / f"{name}.py" for name in sources]
    for file in files:
        file.write_text(sources[file.stem])
    with ThreadPoolExecutor(3) as pool:
        step = gpu_check.pytest_step("some", files, tmp_path, pool, time.monotonic() + 60)
    assert (step.status, step.detail) == ("failed", "4 passed, 3 failed, 2 skipped")
    assert step.failed_tests == [
        "test_trial.py::test_bad",
        "test_crash.py: exit code 7, see logs/test_crash.log",
        "test_exit.py: exit code 9, see logs/test_exit.log",
    ]
    (tmp_path / "test_slow.py").write_text("import time\ntime.sleep(60)\n")
    _, failed = gpu_check.pytest_file(tmp_path / "test_slow.py", "cuda", tmp_path, time.monotonic() + 1)
    assert failed == ["test_slow.py: timed out, see logs/test_slow.log"]


def test_a_file_of_the_suite(tmp_path):
    deadline = time.monotonic() + 60
    counts, failed = gpu_check.pytest_file(ROOT / "tests" / "test_running_stats.py", "cpu", tmp_path, deadline)
    assert counts["passed"] > 100
    assert not failed


def test_a_sanitizer_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    step = gpu_check.sanitizer_step("memcheck", tmp_path, time.monotonic() + 60)
    assert (step.name, step.status) == ("compute-sanitizer memcheck", "not installed")


def test_what_the_sanitizers_watch_runs():
    command = [sys.executable, "tests/small_shapes.py", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "3672 calls on cpu\n"


def test_the_runs_of_the_benchmark_share_the_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def execute(command, log, seconds, environment=None):
        assert command[:3] == [sys.executable, "-m", "bench"]
        args = options.parse("bench", command[3:])
        asked.append((args, seconds, (environment or {}).get("BNEXT_CUDA_STRATEGY")))
        found = rows(torch=1, bnext=1, floor=1) + rows(floor=1, faults=[("bnext", "wrong", "y")], mode="bwd")
        if len(asked) != 2:  # as if the second had ended before its first case
            Path(args.json).write_text(json.dumps({"schema": 1, "rows": found}))
        return 0 if len(asked) < 4 else None, 1.0

    monkeypatch.setattr(gpu_bench, "execute", execute)
    steps, kept = gpu_bench.measured(gpu_bench.runs(), tmp_path, time.monotonic() + 200)
    assert [(step.name, step.status, step.detail) for step in steps] == [
        ("bench bfloat16", "passed", "1 of 72 cases measured; logs/bench-0.log"),
        ("bench float16", "passed", "0 of 72 cases measured; logs/bench-1.log"),
        ("bench float32", "passed", "1 of 72 cases measured; logs/bench-2.log"),
        ("bench bfloat16 with torch.compile", "timed out", "1 of 24 cases measured; logs/bench-3.log"),
        *(
            (f"bench bfloat16, {name}", "timed out", f"1 of 48 cases measured; logs/bench-{4 + i}.log")
            for i, name in enumerate(STRATEGIES)
        ),
    ]
    assert len(kept) == 8 * 5
    assert [row.get("strategy") for row in kept[::5]] == [None] * 3 + STRATEGIES
    assert not any("samples" in row for row in kept)
    assert kept[0]["seconds"]["median"] == 1e-6
    assert [round(seconds) for _, seconds, _ in asked] == [round(200 / left) for left in range(9, 0, -1)]
    assert [strategy for *_, strategy in asked] == [None] * 4 + STRATEGIES
    cases = [[case for group in options.groups(args) for case in group] for args, *_ in asked]
    assert [len(found) for found in cases] == [72, 72, 72, 24] + [48] * 5
    assert {case.shape[0] for found in cases for case in found} == {256}
    assert [args.dtype for args, *_ in asked] == [["bfloat16"], ["float16"], ["float32"]] + [["bfloat16"]] * 6
    backends = ["bnext", "torch", "torch-native"]
    named = [[backend.name for backend in args.backend] for args, *_ in asked]
    assert named == [backends] * 3 + [[*backends, "compile"]] + [["bnext"]] * 5
    assert {(args.device, args.min_time, args.timeout) for args, *_ in asked} == {("cuda", 0.25, 0.25)}


def test_what_is_fused_is_compiled_side_by_side_and_then_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def execute(command, log, seconds, environment=None):
        assert command[:3] == [sys.executable, "-m", "bench"]
        args = options.parse("bench", command[3:])
        asked.append((args, {case for group in options.groups(args) for case in group}))
        return 0 if args.op != ["bn+add+relu"] or args.mode != ["bwd"] else None, 1.0

    monkeypatch.setattr(gpu_bench, "execute", execute)
    (step,) = gpu_bench.compiled(tmp_path, time.monotonic() + 60)
    assert (step.name, step.status) == ("torch.compile", "timed out")
    assert step.detail == "12 of 16 runs; logs/compile-*.log"
    assert {(args.run_once, *(backend.name for backend in args.backend)) for args, _ in asked} == {(True, "compile")}
    compiled = [case for _, cases in asked for case in cases]
    asked.clear()
    steps, kept = gpu_bench.measured(gpu_bench.fused_runs(), tmp_path, time.monotonic() + 200)
    assert [(step.name, step.detail) for step in steps] == [
        ("bench bfloat16, fused", "0 of 96 cases measured; logs/bench-0.log"),
        ("bench float32, fused", "0 of 96 cases measured; logs/bench-1.log"),
    ]
    assert [[backend.name for backend in args.backend] for args, _ in asked] == [["bnext", "torch", "compile"]] * 2
    timed = [case for _, cases in asked for case in cases]
    assert len(timed) == len(compiled) == 2 * 96
    assert set(timed) == set(compiled)
    assert {(case.op, case.mode) for case in timed} == {
        (op, mode) for op in ("bn+relu", "bn+add+relu") for mode in ("fwd", "bwd")
    }
    assert kept == []


def test_nothing_is_needed_before_it_is_built():
    command = [sys.executable, "-c", "import sys; sys.modules['bnext'] = None; import bench.gpu_check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_benchmark_s_own_document_makes_a_report(tmp_path):
    file = tmp_path / "bench.json"
    words = "--shape 4,8,6,6 --mode fwd,bwd,eval --backend bnext,torch,torch-native --min-time 0 --timeout 0 --json"
    command = [sys.executable, "-m", "bench", *words.split(), str(file)]
    assert gpu_steps.execute(command, tmp_path / "log", 60.0)[0] == 0, (tmp_path / "log").read_text()
    page = report(rows=json.loads(file.read_text())["rows"])
    assert section(page, "## Where bnext is slower than torch")[0].endswith(" of 6 cases.")
    assert len(section(page, "## Rows without figures")) == 6  # torch-native
    for layout in ("nchw", "nhwc"):
        for mode in ("fwd", "bwd", "eval"):
            cells = section(page, f"### bn, float32, {layout}, {mode}")[2].strip("| ").split(" | ")
            assert cells[0] == "4x8x6x6"
            assert float(cells[8]) > 0  # bnext / floor


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_failing_step_stops_nothing_and_fails_the_whole(fused, bad, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: FACTS)

    def build(logs):
        if bad:
            raise OSError("no disk")
        return Step("build", "passed", 1.0)

    monkeypatch.setattr(gpu_check, "build", build)
    monkeypatch.setattr(gpu_check, "checks", lambda logs: [Step("memcheck", "not installed", 0.0)])
    monkeypatch.setattr(gpu_bench, "measured", lambda runs, logs, deadline: ([Step("bench", "passed", 9.0)], ROWS))
    monkeypatch.setattr(gpu_bench, "compiled", lambda logs, deadline: [Step("compile", "passed", 9.0)])
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path), *["--fused"] * fused])
    assert gpu_check.main() == int(bad)
    written = json.loads((tmp_path / "gpu-report.json").read_text())
    assert written["schema"] == 2
    assert [step["name"] for step in written["steps"]] == ["build", "compile" if fused else "memcheck", "bench"]
    assert written["rows"] == ROWS
    assert (tmp_path / "gpu-report.md").read_text() == markdown(written)
    assert "bench" in capsys.readouterr().out


def test_without_a_gpu_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path / "none")])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "no NVIDIA GPU: make gpu-check needs one, and a torch built for CUDA\n"
    assert not (tmp_path / "none").exists()
