"""Where torch's own batch norm must run instead of bnext's: the one list of them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from bnext import reference
from bnext.activation import Act, parse

# Bound here, so that it stays torch's where someone puts bnext.batch_norm in its place.
torch_batch_norm = F.batch_norm


def after_torch(output: Tensor, residual: Tensor | None, act: Act) -> Tensor:
    """What follows torch's batch norm in batch_norm_act: torch's own addition and activation."""
    if residual is not None:
        if not torch.jit.is_tracing() and residual.shape != output.shape:
            raise RuntimeError(f"expected residual to have the shape of input, {output.shape}, got {residual.shape}")
        output = output + residual
    name, slope = parse(act)
    return reference.activate(output, name, slope)


def needs_torch(*tensors: Tensor | None) -> str | None:
    """Why a batch norm of these tensors must be torch's own, or None.

    The reasons are the places that look through an operator to its derivative rules or its decomposition, and know only
    torch's: functorch transforms, forward-mode AD, torch.export (and ONNX through it), TorchScript tracing. Scripting,
    which compiles instead of calling, is handled where it is compiled; a class that overrides __torch_function__, which
    waits for torch's names, where a module meets it (overrides_torch).
    """
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch._C._get_tracing_state() is not None:
        return "TorchScript tracing"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform"
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "forward-mode AD"
    return None


def overrides_torch(input: object) -> bool:
    """Whether the class of input has a __torch_function__ of its own."""
    if type(input) is Tensor:
        return False
    own = getattr(type(input), "__torch_function__", torch._C._disabled_torch_function_impl)
    inherited = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    return getattr(own, "__func__", own) not in inherited


def backward_needs_formula(*tensors: Tensor | None) -> bool:
    """Whether something looks through a backward on these tensors: needs_torch's reasons, or batched gradients."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # is_grads_batched has a tensor class of its own
    return needs_torch(*tensors) is not None or any(
        t is not None and (functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t))
        for t in tensors
    )
