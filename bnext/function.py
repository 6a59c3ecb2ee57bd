"""Batch normalisation as torch.autograd.Functions over torch.ops.bnext, twice differentiable."""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bnext import ops, reference
from bnext.fallbacks import backward_needs_formula


class BatchNormFunction(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per channel, with gradients for input, weight and bias.

    apply(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps) -> output

    input [N, C, *]; weight, bias, running_mean, running_var [C] or None; num_batches_tracked an int64 scalar or
    None. training=True takes mean and var from the batch, updates the running buffers and counts the batch, where
    given; momentum=None then averages cumulatively. training=False takes them from the running buffers. Errors are
    those of torch.nn.functional.batch_norm.

    What the backward needs of the statistics is saved, not read from the running buffers, which may have moved on.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        output, mean, invstd = _forward(
            input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
        )
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.training, ctx.eps, ctx.bias_shape = training, eps, None if bias is None else bias.shape
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad_output, *ctx.saved_tensors, ctx.training)
        mask = ctx.needs_input_grad[:3]
        if backward_needs_formula(*arguments[:3]):
            found = _formula(*arguments, ctx.eps)
            grads = [grad if wanted else None for grad, wanted in zip(found, mask, strict=True)]
        elif torch.is_grad_enabled():  # create_graph=True
            grads = BatchNormBackwardFunction.apply(*arguments, ctx.eps, mask)
        else:
            grads = ops.batch_norm_backward(*arguments, mask)
        grad_input, grad_weight, grad_bias = grads
        if grad_bias is not None and grad_bias.shape != ctx.bias_shape:
            grad_bias = grad_bias.reshape(ctx.bias_shape)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None


class BatchNormBackwardFunction(torch.autograd.Function):
    """The backward as a function of (grad_output, input, weight), for double backward.

    The gradients themselves come from the kernel; their derivative is autograd's, of the reference formula.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool,
        eps: float,
        mask: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_output, input, weight, mean, invstd)
        ctx.training, ctx.eps = training, eps
        ctx.set_materialize_grads(False)
        return ops.batch_norm_backward(grad_output, input, weight, mean, invstd, training, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        grad_output, input, weight, mean, invstd = ctx.saved_tensors
        needed = [i for i in range(3) if ctx.needs_input_grad[i]]
        result: list[Tensor | None] = [None] * 8
        with torch.enable_grad():
            # New nodes: a gradient stops here, even where grad_output was itself computed from input.
            inputs = [t if t is None else t.view_as(t) for t in (grad_output, input, weight)]
            outputs = _formula(*inputs, mean, invstd, ctx.training, ctx.eps)
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
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """The backward in differentiable torch operations, half types in float32; training: through the statistics too."""
    training = training and input.numel() > 0  # nothing has no statistics
    if training:
        mean, _, invstd = reference.batch_stats(input.to(mean.dtype), eps)
    wide = [t if t is None else t.to(mean.dtype) for t in (grad_output, input, weight)]
    grad_input, grad_weight, grad_bias = reference.backward(*wide, mean, invstd, training)
    dtype = mean.dtype if weight is None else weight.dtype
    shape = mean.shape if weight is None else weight.shape
    return [grad_input.to(input.dtype).reshape(input.shape), grad_weight.to(dtype).reshape(shape), grad_bias.to(dtype)]


def _float(name: str, value: Any) -> float:
    """value as torch's argument parser takes a float."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, (numbers.Real, torch.SymInt)) or (
        isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
    ):
        return float(value)
    raise TypeError(f"batch_norm(): argument '{name}' must be float, not {type(value).__name__}")


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """output, mean and invstd from the op that `training` asks for."""
    if training:
        return ops.batch_norm_train(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is None:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
    return ops.batch_norm_eval(input, weight, bias, running_mean, running_var, eps)


def apply(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """BatchNormFunction.apply, without autograd's bookkeeping where nothing wants a gradient.

    Raises TypeError for a momentum or eps that is no number.
    """
    momentum, eps = momentum if momentum is None else _float("momentum", momentum), _float("eps", eps)
    arguments = (
        input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
    )  # fmt: skip
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in arguments[:3]):
        return _forward(*arguments)[0]
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None and buffer.requires_grad:
            raise RuntimeError(
                f"batch_norm is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
    return BatchNormFunction.apply(*arguments)
