"""make gpu-check, as far as it goes without a GPU: its reports, its steps' verdicts, and what it says without one."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.gpu_check import Step
from bench.gpu_report import markdown

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.bnext("bnext's own check of a GPU"),
    pytest.mark.only("cpu", "about make gpu-check, by trials on the CPU"),
]

FACTS = {"date": "2026-01-02 03:04 UTC", "device": "Some GPU", "memory": 80 * 2**30, "l2_cache": 50 * 2**20}


def row(dtype="bfloat16", layout="nchw", mode="fwd", shape="64x56x56", fault="", **microseconds):
    seconds = {name: {"median": 1e-6 * us, "p20": 0.9e-6 * us, "p80": 2e-6 * us} for name, us in microseconds.items()}
    return {
        "shape": shape,
        "layout": layout,
        "mode": mode,
        "dtype": dtype,
        "batch": 256,
        "bytes": 200_000_000,
        "seconds": seconds,
        "fault": fault,
    }


ROWS = [
    row(torch=300, native=400, bnext=200, floor=100),
    row(torch=400, native=300, bnext=100, floor=50, shape="256x56x56"),
    row(torch=90, native=100, bnext=100, floor=80, mode="bwd"),
    row(torch=100, native=80, bnext=100, floor=80, layout="nhwc"),
    row(mode="eval", fault="out of GPU memory"),
    row(torch=300, native=400, compile=150, bnext=200, floor=100),
]


def report(steps=(), rows=ROWS):
    return markdown({"schema": 1, "environment": FACTS, "steps": [vars(step) for step in steps], "rows": list(rows)})


def test_markdown_of_rows():
    page = report()
    assert page.startswith("# bnext on Some GPU, 2026-01-02 03:04 UTC\n")
    assert "- memory: 80 GiB\n- l2 cache: 50 MiB" in page
    assert "### bfloat16, nchw, fwd, batch 256" in page
    assert "| 64x56x56 | 300.0 | 400.0 | 200.0 | 100.0 | 1000 | 1.50 | 2.00 | 2.00 |" in page
    assert "| geometric mean |  |  |  |  |  | 2.45 | 2.45 | 2.00 |" in page
    assert "| 64x56x56 | 300.0 | 400.0 | 150.0 | 200.0 | 100.0 | 1000 | 1.50 | 2.00 | 0.75 | 2.00 |" in page
    slower = page.partition("## Where bnext is slower than torch\n\n")[2].partition("\n\n## ")[0]
    assert slower.splitlines() == [
        "2 of 5 rows.",
        "",
        "- bfloat16 64x56x56 nchw bwd: torch / bnext 0.90",
        "- bfloat16 64x56x56 nhwc fwd: native / bnext 0.80",
    ]
    assert "- bfloat16 64x56x56 nchw eval: out of GPU memory" in page


def test_markdown_of_steps():
    page = report([Step("build", "passed", 61.4, "for 9.0"), Step("suite", "failed", 3.0, "1 failed", ["a.py::b"])], [])
    assert "| build | passed | 61 | for 9.0 |" in page
    assert "## Tests that failed\n\n- a.py::b\n" in page
    assert "None measured." in page
    assert "0 of 0 rows." in page
    assert "Tests that failed" not in report()


@pytest.mark.parametrize(
    ("script", "code"), [("print('hello')", 0), ("raise SystemExit(3)", 3), ("import time; time.sleep(60)", None)]
)
def test_a_command_ends_in_time_and_leaves_its_output(script, code, tmp_path):
    log = tmp_path / "log"
    found, seconds = gpu_check.execute([sys.executable, "-c", script], log, 1.0 if code is None else 60.0)
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
    assert result.stdout == "1152 calls on cpu\n"


def test_the_runs_of_the_benchmark_share_the_time(monkeypatch, tmp_path):
    asked = []

    def execute(command, log, seconds, environment=None):
        asked.append((command[4:], seconds))
        file = Path(command[command.index("--json") + 1])
        file.write_text(json.dumps([row(fault="out of GPU memory"), row(torch=1, native=1, bnext=1, floor=1)]))
        return 0 if len(asked) < 4 else None, 1.0

    monkeypatch.setattr(gpu_check, "execute", execute)
    steps, rows = gpu_check.measurements(tmp_path, time.monotonic() + 200)
    assert [step.status for step in steps] == ["passed"] * 3 + ["timed out"]
    assert steps[0].detail == "1 of 72 rows measured; logs/bench-0.log"
    assert steps[3].detail == "1 of 24 rows measured; logs/bench-3.log"
    assert len(rows) == 8
    assert [round(seconds) for _, seconds in asked] == [50, 67, 100, 200]
    assert [("--no-compile" in command, command.count("--shape")) for command, _ in asked] == [(True, 0)] * 3 + [
        (False, 4)
    ]


@pytest.mark.parametrize("bad", [False, True])
def test_a_failing_step_stops_nothing_and_fails_the_whole(bad, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: FACTS)

    def build(logs):
        if bad:
            raise OSError("no disk")
        return Step("build", "passed", 1.0)

    monkeypatch.setattr(gpu_check, "build", build)
    monkeypatch.setattr(gpu_check, "checks", lambda logs: [Step("memcheck", "not installed", 0.0)])
    monkeypatch.setattr(gpu_check, "measurements", lambda logs, deadline: ([Step("bench", "passed", 9.0)], ROWS))
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == int(bad)
    written = json.loads((tmp_path / "gpu-report.json").read_text())
    assert written["schema"] == 1
    assert [step["name"] for step in written["steps"]] == ["build", "memcheck", "bench"]
    assert written["rows"] == ROWS
    assert (tmp_path / "gpu-report.md").read_text() == markdown(written)
    assert "bench" in capsys.readouterr().out


def test_without_a_gpu_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(tmp_path / "none")])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "no NVIDIA GPU: make gpu-check needs one, and a torch built for CUDA\n"
    assert not (tmp_path / "none").exists()
