"""make gpu-check: builds, tests and measures bnext on the NVIDIA GPU at hand; writes gpu-report.json and gpu-report.md.

make gpu-check-fused measures what is fused, beside eager torch and torch.compile, instead of testing and all else.
Every step has a time budget and a status in the report, and none stops the others; all of it takes less than eight
minutes. No setting of the GPU is changed. bnext itself is only imported by the steps, once the first has built it.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import gpu_bench
from bench.gpu_report import SCHEMA, markdown
from bench.gpu_steps import ROOT, STRATEGIES, Step, execute, forced, verdict

_ALL_SECONDS, _BUILD_SECONDS, _CHECK_SECONDS = 470, 115, 150
_SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_WATCHED = (("racecheck", "cluster"), ("racecheck", "grid"))  # that the planner does not choose for small shapes


def build(logs: Path) -> Step:
    """Builds in place, for the GPU at hand only."""
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "BNEXT_FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, seconds = execute(command, logs / "build.log", _BUILD_SECONDS, environment)
    return Step("build", verdict(code), seconds, f"TORCH_CUDA_ARCH_LIST={major}.{minor}; logs/build.log")


def pytest_file(
    file: Path, device: str, logs: Path, deadline: float, strategy: str = ""
) -> tuple[dict[str, int], list[str]]:
    """pytest on one file: counts of passed, failed and skipped tests, and the ids of those that failed.

    In a process of its own: an illegal access to GPU memory ends all that a process can do there.
    """
    name = f"{file.stem}-{strategy}" if strategy else file.stem
    results = logs / f"{name}.xml"
    results.unlink(missing_ok=True)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={results}"]
    command = [sys.executable, "-m", "pytest", *options, file, "--device", device]
    code, _ = execute(command, logs / f"{name}.log", deadline - time.monotonic(), forced(strategy))
    if code is None or not results.exists():
        why = "timed out" if code is None else f"exit code {code}"
        return {"passed": 0, "failed": 1, "skipped": 0}, [f"{file.name}: {why}, see logs/{name}.log"]
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    if code not in (0, 1, 5):  # all passed, some failed, none collected
        counts["failed"] += 1
        failed.append(f"{file.name}: exit code {code}, see logs/{name}.log")
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(f"{file.name}::{case.get('name')}")
        else:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
    return counts, failed


def pytest_step(
    name: str, files: Sequence[Path], logs: Path, pool: ThreadPoolExecutor, deadline: float, strategy: str = ""
) -> Step:
    """pytest on these files, side by side."""
    start = time.monotonic()
    outcomes = list(pool.map(lambda file: pytest_file(file, "cuda", logs, deadline, strategy), files))
    counts = {kind: sum(counted[kind] for counted, _ in outcomes) for kind in ("passed", "failed", "skipped")}
    failed = [test for _, tests in outcomes for test in tests]
    detail = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return Step(name, "failed" if failed else "passed", time.monotonic() - start, detail, failed)


def sanitizer_step(tool: str, logs: Path, deadline: float, strategy: str = "") -> Step:
    """One tool of compute-sanitizer on tests/small_shapes.py."""
    log = f"{tool}-{strategy}" if strategy else tool
    name = f"compute-sanitizer {tool}" + (f", {strategy}" if strategy else "")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if program is None:
        return Step(name, "not installed", 0.0)
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "99"]
    if tool == "memcheck":  # what torch asks of the driver and expects to be refused is no error of a kernel
        options += ["--report-api-errors", "no"]
    command = [program, *options, sys.executable, "tests/small_shapes.py", "cuda"]
    # Without torch's cache each tensor is an allocation of its own, and an overrun cannot land in another one.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | forced(strategy)
    code, seconds = execute(command, logs / f"{log}.log", deadline - time.monotonic(), environment)
    return Step(name, verdict(code), seconds, f"exit code {code}; logs/{log}.log")


def checks(logs: Path) -> list[Step]:
    """The suite on up to eight processes, and compute-sanitizer beside it."""
    deadline = time.monotonic() + _CHECK_SECONDS
    own = ROOT / "tests" / "test_gpu.py"
    suite = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if file != own]
    results = [
        ROOT / "tests" / f"test_{name}.py" for name in ("forward", "backward", "running_stats", "guarded", "act")
    ]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(32) as steps:
        found = [
            steps.submit(pytest_step, "graphs, streams, the same bits again", [own], logs, pool, deadline),
            steps.submit(pytest_step, "the suite on CUDA", suite, logs, pool, deadline),
            *(steps.submit(sanitizer_step, tool, logs, deadline) for tool in _SANITIZERS),
            *(
                steps.submit(pytest_step, f"results, {name}", [own, *results], logs, pool, deadline, name)
                for name in STRATEGIES
            ),
            *(steps.submit(sanitizer_step, tool, logs, deadline, name) for tool, name in _WATCHED),
        ]
        return [step.result() for step in found]


def environment() -> dict[str, Any]:
    """The GPU, the software and the date; sizes in bytes."""
    gpu = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        "l2_cache": gpu.L2_cache_size,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD"),
    }


def _output(*command: str) -> str:
    """What a command prints, "unknown" where it does not run."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def write(out: Path, facts: dict[str, Any], steps: Sequence[Step], rows: Sequence[dict[str, Any]]) -> None:
    """Both reports, as far as they go."""
    report = {"schema": SCHEMA, "environment": facts, "steps": [asdict(step) for step in steps], "rows": list(rows)}
    (out / "gpu-report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu-report.md").write_text(markdown(report))


def main() -> int:
    """The exit code: 0, 1 if a step failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the reports and logs")
    parser.add_argument("--fused", action="store_true", help="build, and time batch norm with sum and ReLU alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU: make gpu-check needs one, and a torch built for CUDA", file=sys.stderr)
        return 2
    deadline = time.monotonic() + _ALL_SECONDS
    logs = args.out.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    facts, steps, rows = environment(), [], []
    parts = {
        "build": lambda: ([build(logs)], []),
        "checks": lambda: (checks(logs), []),
        "bench": lambda: gpu_bench.measured(gpu_bench.runs(), logs, deadline),
    }
    if args.fused:
        parts["checks"] = lambda: (gpu_bench.compiled(logs, time.monotonic() + _CHECK_SECONDS), [])
        parts["bench"] = lambda: gpu_bench.measured(gpu_bench.fused_runs(), logs, deadline)
    for name, part in parts.items():
        try:
            found, measured = part()
        except Exception as error:
            found, measured = [Step(name, "failed", 0.0, f"{type(error).__name__}: {error}")], []
        steps, rows = steps + found, rows + measured
        for step in found:
            print(f"{step.status:<14}{step.seconds:6.0f} s  {step.name}: {step.detail}", flush=True)
        write(args.out, facts, steps, rows)  # after each part, so that an interrupted run leaves what it has
    print(f"{args.out / 'gpu-report.md'}")
    return int(any(step.status in ("failed", "timed out") for step in steps))


if __name__ == "__main__":
    sys.exit(main())
