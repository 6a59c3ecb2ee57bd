"""A step of make gpu-check: a command with a time budget, and what became of it."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("streaming", "block", "cluster", "grid", "retained")  # of the CUDA kernels, forced one after the other


@dataclass
class Step:
    """What became of a step: passed, failed, timed out or not installed; failed_tests are ids of pytest."""

    name: str
    status: str
    seconds: float
    detail: str = ""
    failed_tests: list[str] = field(default_factory=list)


def execute(
    arguments: Sequence[str | Path], log: Path, seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, float]:
    """Runs a command in the checkout, its output into log; the exit code, None after so many seconds, and the time.

    A command that takes longer is ended with everything that it has started.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.monotonic() - start


def verdict(code: int | None) -> str:
    """The status that an exit code of execute is."""
    return "timed out" if code is None else "failed" if code else "passed"


def forced(strategy: str) -> dict[str, str]:
    """The environment in which bnext takes a strategy wherever it can; "": the planner's choice."""
    return {"BNEXT_CUDA_STRATEGY": strategy} if strategy else {}
