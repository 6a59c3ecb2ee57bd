"""What bnext was built with, what it runs on, and whether a small training step comes out right."""

import argparse
import functools
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bnext
from bnext.output import first_line

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")

_READING = """\
exit code: 0, 1 if bnext does not load or the self-check fails, 2 for bad arguments

other commands:
  %(prog)s stats CHECKPOINT    what the batch norms in a checkpoint hold
  %(prog)s plan NxCxHxW        how a batch norm would run on a GPU, and how often it would move the tensor"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of python -m bnext."""
    parser.epilog = _READING
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")


def run(args: argparse.Namespace) -> int:
    """The exit code."""
    found = facts()
    if not args.json:
        _print(found)
    checks = {device: self_check(device) for device in ("cpu", "cuda")}
    if args.json:
        print(json.dumps(found | {"self_check": checks}, indent=1))
    else:
        _print({f"self-check on {device}": outcome for device, outcome in checks.items()})
    return int(any(outcome.startswith("failed") for outcome in checks.values()))


def _print(lines: Mapping[str, Any]) -> None:
    """What there is of it."""
    for name, value in lines.items():
        if isinstance(value, dict):
            value = [f"{key}={each}" for key, each in value.items()]
        if value:
            print(f"{name.replace('_', ' '):<20}{', '.join(value) if isinstance(value, list) else value}", flush=True)


def facts() -> dict[str, Any]:
    """By name; what cannot be found out is a sentence that says why."""
    found: dict[str, Any] = {"bnext": bnext.__version__, "python": platform.python_version()}
    for name, part in {"torch": _of_torch, "built_with": _of_build, "extension": _of_extension}.items():
        try:
            found |= part()
        except Exception as error:
            found[name] = first_line(error)
    found |= {"cpu": cpu_model(), "cpus": os.cpu_count()}
    named = {name: value for name, value in os.environ.items() if name in _VARIABLES or name.startswith("BNEXT_")}
    return found | {"variables": named}


def _of_build() -> dict[str, Any]:
    from bnext import _build

    return {
        "built_with_torch": _build.torch,
        "built_with_nvcc": _build.nvcc or None,
        "cuda_archs": _build.cuda_archs,
        "no_cuda_kernels": _build.no_cuda or None,
    }


def _of_torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "gpus": [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus],
    }


def _of_extension() -> dict[str, Any]:
    import torch

    _survive()
    from bnext import _C, backend, ops

    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return {
        "extension": _C.__file__,
        "gpus_covered_by": [backend.on_cuda(capability).reason for capability in capabilities],
        "cpu_isa": ops.cpu_isa,
        "cpu_isa_forced": bool(os.environ.get("BNEXT_CPU_ISA")),
    }


def cpu_model() -> str:
    """As the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def self_check(device: str) -> str:
    """passed; failed, or not run, with the reason."""
    try:
        if device == "cuda" and (reason := _no_cuda()):
            return f"not run: {reason}"
        _survive()
        from bnext import selfcheck

        fault = selfcheck.fault(device)
    except Exception as error:
        fault = first_line(error)
    return f"failed: {fault}" if fault else "passed"


def _survive() -> None:
    """Raises RuntimeError where compiled code that is not loaded yet would end this process."""
    if "bnext._C" not in sys.modules and (crash := _crash()):
        raise RuntimeError(crash)


@functools.cache
def _crash() -> str | None:
    """What ends a process that runs the self-check: of a file that is cut off, a code that the CPU or GPU has not."""
    devices = "('cpu', 'cuda')[:1 + torch.cuda.is_available()]"
    script = f"import torch; from bnext import selfcheck; [selfcheck.fault(device) for device in {devices}]"
    code = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode
    return f"bnext's compiled part ends Python by {signal.Signals(-code).name}" if code < 0 else None


def _no_cuda() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    from bnext import _build

    return None if _build.cuda_archs else f"bnext was built without CUDA kernels: {_build.no_cuda}"
