"""Batch normalisation as torch.autograd.Functions over torch.ops.bnext, twice differentiable.

csrc/autograd.cpp has the first of them in C++ too, and comes back here for the second derivative.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import has_torch_function_variadic

from bnext import ops, reference
from bnext.fallbacks import backward_needs_formula


class BatchNormFunction(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per channel, with gradients for input, weight and bias.

    apply(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
    skipped_batches=None) -> output

    input [N, C, *]; weight, bias, running_mean, running_var [C] or None; num_batches_tracked an int64 scalar or
    None. training=True takes mean and var from the batch, updates the running buffers and counts the batch, where
    given; momentum=None then averages cumulatively. training=False takes them from the running buffers. With
    skipped_batches, int64 [C], channels whose mean or var is not finite keep their running buffers and are counted
    there. Errors are those of torch.nn.functional.batch_norm.

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
        skipped_batches: Tensor | None = None,
    ) -> Tensor:
        if training:
            output, mean, invstd = ops.batch_norm_train(
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, skipped_batches
            )
        else:
            output, mean, invstd = ops.batch_norm_eval(input, weight, bias, running_mean, running_var, eps)
        ctx.save_for_backward(input, weight, mean, invstd)
        ctx.training, ctx.eps, ctx.bias_shape = training, eps, None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 10
        grad_input, grad_weight, grad_bias = backward(
            grad_output, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.needs_input_grad[:3]
        )
        if grad_bias is not None and grad_bias.shape != ctx.bias_shape:
            grad_bias = grad_bias.reshape(ctx.bias_shape)
        return grad_input, grad_weight, grad_bias, *(None,) * 7


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
    mask: tuple[bool, bool, bool],
) -> Sequence[Tensor | None]:
    """The gradients of input, weight and bias that mask asks for, by the op or, where that cannot do, the formula."""
    arguments = (grad_output, input, weight, mean, invstd, training)
    if backward_needs_formula(grad_output, input, weight):
        found = _formula(*arguments, eps)
        return [grad if wanted else None for grad, wanted in zip(found, mask, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True
        return BatchNormBackwardFunction.apply(*arguments, eps, mask)
    return ops.batch_norm_backward(*arguments, mask)


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
    skipped_batches: Tensor | None = None,
) -> Tensor:
    """BatchNormFunction.apply; by csrc/autograd.cpp, for speed, where nothing has to see Python call the ops.

    torch.compile follows Python alone, and a __torch_function__, of a mode or a class, takes calls from Python.

    Raises TypeError for a momentum or eps that is no number.
    """
    if type(momentum) is not float and momentum is not None:
        momentum = _float("momentum", momentum)
    if type(eps) is not float:
        eps = _float("eps", eps)
    if running_mean is not None and running_mean.requires_grad:
        _refuse_gradient("running_mean", input, weight, bias)
    if running_var is not None and running_var.requires_grad:
        _refuse_gradient("running_var", input, weight, bias)
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked)
    if torch.compiler.is_dynamo_compiling() or has_torch_function_variadic(*tensors):
        return BatchNormFunction.apply(*tensors, training, momentum, eps, skipped_batches)
    return ops.batch_norm(*tensors, training, momentum, eps, skipped_batches)


def _refuse_gradient(name: str, *differentiable: Tensor | None) -> None:
    """As torch, where the call has a gradient at all."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        raise RuntimeError(
            f"batch_norm is not differentiable with respect to argument '{name}'. "
            "This input cannot have requires_grad True."
        )
