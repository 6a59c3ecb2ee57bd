"""What the figures were measured on and with."""

import datetime
import os
import platform
from typing import Any

import torch

import bnext
from bnext.environment import cpu_model


def cpu() -> str:
    """The model of the CPU, and the instruction set that torch uses on it."""
    return f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def facts(device: str) -> dict[str, Any]:
    """The device and the versions; flat. Sizes in bytes."""
    found: dict[str, Any] = {"device": cpu() if device == "cpu" else torch.cuda.get_device_name()}
    found |= {"bnext": bnext.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cpu":
        return found | {"bnext_instruction_set": bnext.ops.cpu_isa, "cpus": os.cpu_count()}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        "l2_cache": gpu.L2_cache_size,
        "cpu": cpu(),
    }


def report() -> dict[str, Any]:
    """What torch.utils.collect_env finds; takes a second."""
    from torch.utils import collect_env

    return collect_env.get_env_info()._asdict()


def now() -> str:
    """The date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
