"""Which implementation runs for a tensor, and for which GPUs there is one."""

import os
import re
from typing import NamedTuple

import torch
from torch import Tensor

from bnext import _build, ops
from bnext.fallbacks import needs_torch, overrides_torch


class Backend(NamedTuple):
    """name: "cpu" or "cuda", bnext's kernels; "meta", shapes alone; "torch", its own batch norm; "none", an error."""

    name: str
    reason: str


def backend_for(x: Tensor) -> Backend:
    """What computes the batch norm of input x [N, C, *] here and now, and why, for parameters without tangents.

    Raises TypeError for what is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a Tensor, got {type(x).__name__}")
    if overrides_torch(x):
        return Backend("torch", f"{type(x).__name__} has a __torch_function__ of its own")
    if reason := needs_torch(x):
        return Backend("torch", reason)
    try:
        ops.check(x)
    except (NotImplementedError, RuntimeError) as error:
        return Backend("none", str(error))
    if x.layout is not torch.strided:
        return Backend("none", f"bnext has no kernels for {x.layout} tensors")
    if x.device.type == "cpu":
        return Backend("cpu", ops.cpu_isa + (", as BNEXT_CPU_ISA says" if os.environ.get("BNEXT_CPU_ISA") else ""))
    if x.device.type == "cuda":
        return on_cuda(torch.cuda.get_device_capability(x.device))
    if x.device.type == "meta":
        return Backend("meta", "there is nothing to compute")
    return Backend("none", f"bnext has no kernels for {x.device.type} devices")


def is_cuda_available() -> bool:
    """Whether there is a GPU, torch's current one, and bnext has kernels for it."""
    return torch.cuda.is_available() and on_cuda(torch.cuda.get_device_capability()).name == "cuda"


def on_cuda(capability: tuple[int, int]) -> Backend:
    """What runs on a GPU of this compute capability, such as (9, 0)."""
    if not _build.cuda_archs:
        return Backend("none", f"bnext was built without CUDA kernels: {_build.no_cuda}")
    arch = next((arch for arch in _build.cuda_archs if _runs(arch, capability)), None)
    if arch is None:
        built = ", ".join(_build.cuda_archs)
        return Backend("none", f"bnext was built for {built}, and the GPU is sm_{capability[0]}{capability[1]}")
    return Backend("cuda", arch)


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for arch, such as sm_90, runs there: binaries within a major version, PTX (compute_) beyond it.

    Either from its own version on; what has a letter, such as sm_90a, nowhere else.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
    assert found is not None, arch
    built = (int(found[2]), int(found[3]))
    if capability == built:
        return True
    return capability > built and not found[4] and (found[1] == "compute" or capability[0] == built[0])
