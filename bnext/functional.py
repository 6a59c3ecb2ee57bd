"""bnext.batch_norm, the functional face, and the one place that decides when torch's own batch norm must run."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnext import function


def needs_torch(*tensors: Tensor | None) -> str | None:
    """Why this call must go to torch's own batch norm, or None: the whole list of bnext's fallbacks.

    They are the places that look through an operator to its derivative rules or its decomposition, and know only
    torch's: functorch transforms, forward-mode AD, torch.export (and ONNX through it), TorchScript tracing. Scripting,
    which compiles instead of calling, is handled in bnext.modules.
    """
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "TorchScript tracing"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform"
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "forward-mode AD"
    return None


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

    input [N, C, *]; running_mean, running_var, weight, bias [C] or None, of input's dtype. training=True normalises
    by the batch and updates the running buffers in place; training=False by the running buffers.

    Raises ValueError for one value per channel in training, for eps out of range and for one running buffer without
    the other; RuntimeError for sizes, dtypes or devices that do not match; NotImplementedError for a dtype that
    batch norm is not defined for; TypeError for a momentum, eps or training of the wrong type.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
        )
    if needs_torch(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not hasattr(value, "__float__"):
            raise TypeError(f"batch_norm(): argument '{name}' must be float, not {type(value).__name__}")
    return function.apply(input, weight, bias, running_mean, running_var, None, training, float(momentum), float(eps))
