"""What make gpu-check times, by runs of the benchmark that share the time that is left."""

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import LAYOUTS, OPS
from bench.gpu_report import OURS
from bench.gpu_steps import STRATEGIES, Step, execute, forced, verdict
from bench.rows import OK
from bench.suites import SUITES

_BATCH = 256
_DTYPES = ("bfloat16", "float16", "float32")
_MODES = ("fwd", "bwd", "eval")
_BACKENDS = "bnext,torch,torch-native"
_COMPILED = ("64,112,112", "256,56,56", "512,28,28", "2048,7,7")  # torch.compile takes seconds for each case
_CASE_SECONDS = "0.25"
_LAYERS = len(SUITES["resnet50"].layers)
_RESNET50 = ["--suite", "resnet50", "--batch", str(_BATCH)]

_FUSED_DTYPES = ("bfloat16", "float32")
_FUSED_OPS, _FUSED_MODES = OPS[1:], _MODES[:2]


@dataclass
class Run:
    """One of the benchmark's; in each layout it has layers x modes cases. strategy: the one that is forced, if any."""

    name: str
    dtype: str
    options: list[str]
    layers: int
    modes: Sequence[str]
    strategy: str = ""


def runs() -> list[Run]:
    """Of batch norm alone."""
    best = _DTYPES[0]
    compiled = [word for shape in _COMPILED for word in ("--shape", f"{_BATCH},{shape}")]
    return [
        *(Run(f"bench {t}", t, [*_RESNET50, "--backend", _BACKENDS], _LAYERS, _MODES) for t in _DTYPES),
        Run(
            f"bench {best} with torch.compile", best, [*compiled, "--backend", f"{_BACKENDS},compile"],
            len(_COMPILED), _MODES,
        ),
        *(
            Run(f"bench {best}, {name}", best, [*_RESNET50, "--backend", OURS], _LAYERS, _MODES[:2], name)
            for name in STRATEGIES
        ),
    ]  # fmt: skip


def fused_runs() -> list[Run]:
    """Of batch norm with what follows it, training alone."""
    options = [*_RESNET50, "--op", ",".join(_FUSED_OPS), "--backend", "bnext,torch,compile"]
    layers = _LAYERS * len(_FUSED_OPS)
    return [Run(f"bench {dtype}, fused", dtype, options, layers, _FUSED_MODES) for dtype in _FUSED_DTYPES]


def compiled(logs: Path, deadline: float) -> list[Step]:
    """Has torch.compile compile what fused_runs time, side by side; from then on that is found in its cache.

    Compiled one after the other as they are timed, so many cases would take several times what gpu-check may.
    """
    parts = list(itertools.product(_FUSED_DTYPES, _FUSED_OPS, LAYOUTS, _FUSED_MODES))
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))

    def compile_part(part: tuple[str, ...]) -> int | None:
        words = zip(("--dtype", "--op", "--layout", "--mode"), part, strict=True)
        command = [sys.executable, "-m", "bench", "--device", "cuda", "--run-once", *_RESNET50, "--backend", "compile"]
        log = logs / f"compile-{'-'.join(part)}.log"
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        return execute([*command, *itertools.chain(*words)], log, deadline - time.monotonic(), environment)[0]

    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(compile_part, parts))
    worst = next((code for code in codes if code != 0), 0)
    detail = f"{codes.count(0)} of {len(parts)} runs; logs/compile-*.log"
    return [Step("torch.compile", verdict(worst), time.monotonic() - start, detail)]


def measured(runs: Sequence[Run], logs: Path, deadline: float) -> tuple[list[Step], list[dict[str, Any]]]:
    """A step for each of the runs, which share the time that is left, and their rows, without the single timings.

    Rows of a forced strategy have its name as "strategy".
    """
    steps, rows = [], []
    for i, run in enumerate(runs):
        file = logs / f"bench-{i}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench", "--device", "cuda", "--dtype", run.dtype]
        command += ["--mode", ",".join(run.modes), "--min-time", _CASE_SECONDS, "--timeout", _CASE_SECONDS]
        command += ["--json", str(file), *run.options]
        budget = (deadline - time.monotonic()) / (len(runs) - i)
        code, seconds = execute(command, logs / f"bench-{i}.log", budget, forced(run.strategy))
        found = json.loads(file.read_text())["rows"] if file.exists() else []
        tag = {"strategy": run.strategy} if run.strategy else {}
        rows += [{key: value for key, value in row.items() if key != "samples"} | tag for row in found]
        timed = sum(row["backend"] == OURS and row["status"] == OK for row in found)
        detail = f"{timed} of {run.layers * len(LAYOUTS) * len(run.modes)} cases measured; logs/bench-{i}.log"
        steps.append(Step(run.name, verdict(code), seconds, detail))
    return steps, rows
