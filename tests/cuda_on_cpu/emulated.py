"""bnext's CUDA kernels in the place of its CPU kernels, executed on the CPU: for this process, from load() on."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from cuda_on_cpu import build

# A small GPU: few multiprocessors, so that small grids already have several tasks a block, and short of bandwidth, so
# that memory is what the planner spares.
GPU = {
    "multiprocessors": 6,
    "shared_per_block": 227 * 1024,
    "shared_per_multiprocessor": 228 * 1024,
    "threads_per_multiprocessor": 2048,
    "l2": 0,
    "bandwidth": 10**9,
    "clustered": (6, 4, 0, 0),
    "cooperative": True,
}


def library(mode: build.Mode, name: str = "bnext_cuda_on_cpu", csrc: Path = build.ROOT / "csrc") -> Path:
    """The compiled backend; of another copy of csrc under a name of its own."""
    sources = [csrc / "cuda/forward.cu", csrc / "cuda/backward.cu", build.HERE / "ops.cpp"]
    defines = ["TORCH_EXTENSION_NAME=bnext_cuda_on_cpu"]
    return build.build(name, sources, mode, torch=True, shared=True, defines=defines)


module: ModuleType | None = None  # of tests/cuda_on_cpu/ops.cpp, once loaded


def load(path: Path) -> None:
    """Puts the compiled backend in the place of bnext's CPU kernels."""
    global module
    import bnext  # noqa: F401  # the ops must be there before they are replaced

    spec = importlib.util.spec_from_file_location("bnext_cuda_on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reset()


def reset(**gpu: Any) -> None:
    """The small GPU with these properties changed, no strategy forced, the plainest schedule."""
    assert module is not None
    module.set_gpu(GPU | gpu)
    module.take_clusters(16)
    module.force("")
    module.configure("fwd", 0, True)
