"""torch.ops.bnext: loads the compiled ops and gives them fake kernels.

Schemas are in csrc/ops.cpp, implementations behind csrc/host.h. The fakes let torch.compile, torch.export and
meta tensors work without running a kernel: shapes, dtypes and strides as csrc/host.h makes them.
"""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

try:
    from bnext import _C
except ImportError as error:
    raise ImportError(
        f"bnext's compiled part does not load with torch {torch.__version__} ({error}): "
        "rebuild it with pip install --no-build-isolation --force-reinstall --no-deps ., or make build in a checkout"
    ) from error

__all__ = ["batch_norm_backward", "batch_norm_eval", "batch_norm_train", "built_for_torch", "cpu_isa"]

built_for_torch: str = _C.torch_version
cpu_isa: str = _C.cpu_isa()  # what the CPU kernels use, "scalar" or "avx2"; BNEXT_CPU_ISA=scalar forces it

batch_norm_train = torch.ops.bnext.batch_norm_train.default
batch_norm_eval = torch.ops.bnext.batch_norm_eval.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    """A meta tensor among real ones is dispatched here, and must not pass for a result."""
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(f"expected all tensors to be on {input.device} as input, got one on {other.device}")


def _fake_forward(input: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(input, *others)
    output = torch.empty_like(input, memory_format=suggest_memory_format(input))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = input.new_empty(input.shape[1], dtype=dtype)
    return output, mean, torch.empty_like(mean)


@torch.library.register_fake("bnext::batch_norm_train")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(input, weight, bias, running_mean, running_var, num_batches_tracked)


@torch.library.register_fake("bnext::batch_norm_eval")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(input, weight, bias, running_mean, running_var)


@torch.library.register_fake("bnext::batch_norm_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _check_devices(input, grad_output, weight, mean, invstd)
    param = mean if weight is None else weight
    return (
        torch.empty_like(input, memory_format=suggest_memory_format(input)) if output_mask[0] else None,
        torch.empty_like(param, memory_format=torch.contiguous_format)
        if output_mask[1] and weight is not None
        else None,
        torch.empty_like(param, memory_format=torch.contiguous_format) if output_mask[2] else None,
    )
