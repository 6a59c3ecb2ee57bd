"""The backward of both Functions of bnext/function.py, itself differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bnext import ops, reference
from bnext.fallbacks import backward_needs_formula


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    slope: float,
    wanted: tuple[bool, bool, bool, bool],
) -> Sequence[Tensor | None]:
    """Gradients of input, weight, bias and residual, those wanted, by the op or, where that cannot do, the formula.

    bias, residual and mask as the op batch_norm_act_backward takes them; act="identity" gives residual no gradient.
    """
    arguments = (grad_output, input, weight, bias, residual, mean, invstd, mask, training, eps, act, slope)
    if backward_needs_formula(grad_output, input, weight, bias, residual):
        found = _formula(*arguments)
        return [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True
        return BatchNormBackwardFunction.apply(*arguments, wanted)
    return _by_op(*arguments, wanted)


def _by_op(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    slope: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    if act == "identity":
        return *ops.batch_norm_backward(grad_output, input, weight, mean, invstd, training, wanted[:3]), None
    return ops.batch_norm_act_backward(
        grad_output, input, weight, bias, mean, invstd, residual, mask, training, act, slope, wanted
    )


class BatchNormBackwardFunction(torch.autograd.Function):
    """The backward as a function of (grad_output, input, weight, bias, residual), for double backward.

    The gradients themselves come from the kernel; their derivative is autograd's, of the reference formula.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        mask: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        tensors = (grad_output, input, weight, bias, residual, mean, invstd, mask)
        ctx.save_for_backward(*tensors)
        ctx.rest = rest[:-1]
        ctx.set_materialize_grads(False)
        return _by_op(*tensors, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        needed = [i for i in range(5) if ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * 13
        with torch.enable_grad():
            # New nodes: a gradient stops here, even where grad_output was itself computed from input.
            inputs = [t if t is None else t.view_as(t) for t in saved[:5]]
            outputs = _formula(*inputs, *saved[5:], *ctx.rest)
            wanted = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [o for o, _ in wanted],
                [inputs[i] for i in needed],
                [g for _, g in wanted],
                create_graph=create_graph,
                allow_unused=True,
            )
        for i, grad in zip(needed, found, strict=True):
            result[i] = grad
        return tuple(result)


def _formula(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    slope: float,
) -> list[Tensor]:
    """The backward in differentiable torch operations, half types in float32; training: through the statistics too."""
    training = training and input.numel() > 0  # nothing has no statistics
    if training:
        mean, _, invstd = reference.batch_stats(input.to(mean.dtype), eps)
    dz, x, w, b, r = [t if t is None else t.to(mean.dtype) for t in (grad_output, input, weight, bias, residual)]
    if mask is not None:
        dz = torch.where(ops.unpacked(mask, input), dz, dz * slope if act == "leaky_relu" else 0)
    elif act != "identity":
        z = reference.normalize(x, w, b, mean, invstd)
        dz = reference.activate_backward(dz, z if r is None else z + r, act, slope)
    grad_input, grad_weight, grad_bias = reference.backward(dz, x, w, mean, invstd, training)
    dtype = mean.dtype if weight is None else weight.dtype
    shape = mean.shape if weight is None else weight.shape
    grad_input, grad_residual = (g.to(input.dtype).reshape(input.shape) for g in (grad_input, dz))
    return [grad_input, grad_weight.to(dtype).reshape(shape), grad_bias.to(dtype), grad_residual]
