"""torch.ops.bnext: loads the compiled ops and gives them fake kernels.

Schemas are in csrc/ops.cpp, implementations behind csrc/host.h. The fakes let torch.compile, torch.export and
meta tensors work without running a kernel: shapes, dtypes and strides as csrc/host.h makes them.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext.activation import TWO_SLOPES

try:
    import bnext._build as _build

    if _build.torch.partition("+")[0] != torch.__version__.partition("+")[0]:
        raise ImportError(f"it was built with torch {_build.torch}")
    import bnext._C as _C  # not from bnext: the error would speak of a circular import
except ImportError as error:
    raise ImportError(
        f"bnext's compiled part, in {Path(__file__).parent}, does not load with torch {torch.__version__} ({error}): "
        "rebuild it with pip install --no-build-isolation --force-reinstall --no-deps ., or make build in a checkout"
    ) from None

__all__ = [
    "batch_norm",
    "batch_norm_act_backward",
    "batch_norm_act_eval",
    "batch_norm_act_train",
    "batch_norm_backward",
    "batch_norm_eval",
    "batch_norm_train",
    "cpu_isa",
]

cpu_isa: str = _C.cpu_isa()  # scalar, avx2, avx512 or avx512bf16; BNEXT_CPU_ISA forces one

batch_norm = _C.batch_norm  # calls these as BatchNormFunction.apply does
batch_norm_train = torch.ops.bnext.batch_norm_train.default
batch_norm_eval = torch.ops.bnext.batch_norm_eval.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default
batch_norm_act_train = torch.ops.bnext.batch_norm_act_train.default
batch_norm_act_eval = torch.ops.bnext.batch_norm_act_eval.default
batch_norm_act_backward = torch.ops.bnext.batch_norm_act_backward.default


def _known(condition: bool | torch.SymBool) -> bool:
    """Whether the condition is true for certain, sizes that are symbols included."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy: not for every import of bnext

    return guard_or_false(condition)


def _channel_count(input: Tensor) -> int | torch.SymInt:
    return input.shape[1] if input.dim() > 1 else 0


def check(input: Tensor, **others: Tensor | None) -> None:
    """What csrc/checks.h refuses by devices, dtype and sizes, as far as sizes are known.

    A meta tensor among real ones is dispatched here, and must not pass for a result.
    """
    if input.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f'"batch_norm" not implemented for {input.dtype}')
    if input.dim() < 2 and not _known(input.numel() == 0):
        raise RuntimeError(f"expected input to have at least 2 dimensions (N, C, ...), got {input.shape}")
    channels = _channel_count(input)
    for name, other in others.items():
        if other is not None and other.device != input.device:
            raise RuntimeError(f"expected {name} to be on {input.device} as input, got {other.device}")
        if other is not None and name != "grad_output" and _known(other.numel() != channels):
            raise RuntimeError(f"{name} should contain {channels} elements not {other.numel()}")


def output_format(input: Tensor) -> torch.memory_format:
    """csrc/host.h's."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if input.is_contiguous():
        return torch.contiguous_format
    if input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()]):
        return formats[input.dim()]
    return suggest_memory_format(input)


def output_like(input: Tensor) -> Tensor:
    if _known(input.numel() == 0):
        return torch.empty_like(input)
    return torch.empty_like(input, memory_format=output_format(input))


def check_residual(input: Tensor, residual: Tensor | None) -> None:
    """What csrc/checks.h refuses by the residual's shape, dtype, device and memory format."""
    if residual is None:
        return
    if residual.dim() != input.dim() or any(_known(r != i) for r, i in zip(residual.shape, input.shape, strict=True)):
        raise RuntimeError(f"expected residual to have the shape of input, {input.shape}, got {residual.shape}")
    if (residual.dtype, residual.device) != (input.dtype, input.device):
        raise RuntimeError(
            f"expected residual to be {input.dtype} on {input.device} as input, "
            f"got {residual.dtype} on {residual.device}"
        )
    format = suggest_memory_format(output_like(input))
    if not residual.is_contiguous(memory_format=format) and suggest_memory_format(residual) != format:
        raise RuntimeError(
            f"expected residual to have the memory format of input, {format}, got strides {residual.stride()}"
        )


def unpacked(mask: Tensor, input: Tensor) -> Tensor:
    """The mask of a forward on input as a bool Tensor of input's shape."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.bool().flatten().as_strided(input.shape, output_like(input.detach().to("meta")).stride())


def _fake_forward(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = input.new_empty(_channel_count(input), dtype=dtype)
    return output_like(input), mean, torch.empty_like(mean)


def _check_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_batches: Tensor | None,
) -> None:
    buffers = {"running_mean": running_mean, "running_var": running_var, "skipped_batches": skipped_batches}
    check(input, weight=weight, bias=bias, **buffers)
    if num_batches_tracked is not None and num_batches_tracked.device != input.device:
        raise RuntimeError(f"expected num_batches_tracked to be on {input.device}, got {num_batches_tracked.device}")
    if input.dim() > 1 and _known(input.numel() == input.shape[1]) and _known(input.numel() > 0):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")


def _check_eval(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor
) -> None:
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is None:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    check(input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)


def _fake_mask(input: Tensor, residual: Tensor | None, act: str, keep_mask: bool) -> Tensor | None:
    check_residual(input, residual)
    if not keep_mask or residual is None or act not in TWO_SLOPES:
        return None
    return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)


def _fake_backward(
    input: Tensor, weight: Tensor | None, mean: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    grad_input, grad_weight, grad_bias, grad_residual = None, None, None, None
    format = torch.preserve_format if _known(input.numel() == 0) else suggest_memory_format(input)
    if output_mask[0]:
        grad_input = torch.empty_like(input, memory_format=format)
    if output_mask[1] and weight is not None:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if output_mask[2]:
        grad_bias = (mean if weight is None else weight).new_empty(_channel_count(input))
    if output_mask[3]:
        grad_residual = torch.empty_like(input, memory_format=format)
    return grad_input, grad_weight, grad_bias, grad_residual


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
    skipped_batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_train(input, weight, bias, running_mean, running_var, num_batches_tracked, skipped_batches)
    return _fake_forward(input)


@torch.library.register_fake("bnext::batch_norm_eval")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_eval(input, weight, bias, running_mean, running_var)
    return _fake_forward(input)


@torch.library.register_fake("bnext::batch_norm_act_train")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    act: str,
    slope: float,
    keep_mask: bool,
    skipped_batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_train(input, weight, bias, running_mean, running_var, num_batches_tracked, skipped_batches)
    return *_fake_forward(input), _fake_mask(input, residual, act, keep_mask)


@torch.library.register_fake("bnext::batch_norm_act_eval")
def _(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    act: str,
    slope: float,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_eval(input, weight, bias, running_mean, running_var)
    return *_fake_forward(input), _fake_mask(input, residual, act, keep_mask)


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
    check(input, grad_output=grad_output, weight=weight, mean=mean, invstd=invstd)
    return _fake_backward(input, weight, mean, [*output_mask, False])[:3]


@torch.library.register_fake("bnext::batch_norm_act_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    training: bool,
    act: str,
    slope: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    check(input, grad_output=grad_output, weight=weight, bias=bias, mean=mean, invstd=invstd)
    check_residual(input, residual)
    return _fake_backward(input, weight, mean, output_mask)
