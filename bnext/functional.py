"""bnext.batch_norm, the functional face."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import function
from bnext.fallbacks import needs_torch, torch_batch_norm
from bnext.recomputation import recomputation


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm: same arguments, results, side effects and errors.

    input [N, C, *]; running_mean, running_var, weight, bias [C] or None, of input's dtype, or float32 for bfloat16 and
    float16. training=True normalises by the batch and updates the running buffers in place; training=False by the
    running buffers.

    Raises ValueError for one value per channel in training, for eps out of range and for one running buffer without
    the other; RuntimeError for sizes, dtypes or devices that do not match; NotImplementedError for a dtype that
    batch norm is not defined for; TypeError for an input, momentum, eps or training of the wrong type.
    """
    if torch.jit.is_scripting():
        return torch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(batch_norm, tensors, *tensors, training=training, momentum=momentum, eps=eps)
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    if needs_torch(*tensors):
        return torch_batch_norm(*tensors, training, momentum, eps)
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' must be float, not NoneType")
    if training and recomputation.active:
        running_mean = running_var = None
    return function.apply(input, weight, bias, running_mean, running_var, None, training, momentum, eps)
