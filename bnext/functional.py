"""bnext.batch_norm, the functional face."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import function
from bnext.activation import Act
from bnext.fallbacks import after_torch, needs_torch, torch_batch_norm
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


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = "relu",
) -> Tensor:
    """act(batch_norm(input, ...) + residual), in the passes over memory that batch_norm alone takes.

    The first eight arguments are batch_norm's. residual like input: its shape, dtype, device and memory format. act is
    "identity", "relu", "relu6", ("leaky_relu", slope), "silu" or "hardswish", each what the function of that name in
    torch.nn.functional is.

    Raises what batch_norm does, RuntimeError for a residual that is not like input, and ValueError for another act.
    """
    if torch.jit.is_scripting():
        output = torch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return after_torch(output, residual, act)
    else:
        return _batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, act)


def _batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Act,
) -> Tensor:
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors, residual):
        keywords = {"training": training, "momentum": momentum, "eps": eps, "residual": residual, "act": act}
        return handle_torch_function(batch_norm_act, (*tensors, residual), *tensors, **keywords)
    return _batch_norm(*tensors, training, momentum, eps, residual, act)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    act: Act = "identity",
) -> Tensor:
    tensors = (input, running_mean, running_var, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(batch_norm, tensors, *tensors, training=training, momentum=momentum, eps=eps)
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    if needs_torch(*tensors, residual):
        return after_torch(torch_batch_norm(*tensors, training, momentum, eps), residual, act)
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' must be float, not NoneType")
    if training and recomputation.active:
        running_mean = running_var = None
    return function.apply(
        input, weight, bias, running_mean, running_var, None, training, momentum, eps, None, residual, act
    )
