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

from bnext import ops
from bnext.activation import Act, parse
from bnext.double_backward import gradients


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
        return grad_input, grad_weight, _reshaped(grad_bias, ctx.bias_shape), *(None,) * 7


class BatchNormActFunction(torch.autograd.Function):
    """act(BatchNormFunction's output + residual), with gradients for input, weight, bias and residual.

    apply(input, weight, bias, residual, running_mean, running_var, num_batches_tracked, training, momentum, eps,
    act, slope, skipped_batches) -> output

    residual like input, or None; act and slope as activation.parse gives them. Saved besides input, weight and
    statistics: where a residual is added, one bit an element for relu, relu6 and leaky_relu, and the residual for silu
    and hardswish; without residual, bias. The sum before the activation never is.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        act: str,
        slope: float,
        skipped_batches: Tensor | None,
    ) -> Tensor:
        buffers = (running_mean, running_var, num_batches_tracked)
        output, mean, invstd, mask = _act_forward(
            input, weight, bias, residual, *buffers, training, momentum, eps, act, slope, skipped_batches, True
        )
        recomputed = (bias, residual) if mask is None and act != "identity" else (None, None)
        ctx.save_for_backward(input, weight, *recomputed, mean, invstd, mask)
        ctx.rest, ctx.bias_shape = (training, eps, act, slope), None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 13
        *wanted, of_residual = ctx.needs_input_grad[:4]
        identity = "identity" in ctx.rest
        grad_input, grad_weight, grad_bias, grad_residual = gradients(
            grad_output, *ctx.saved_tensors, *ctx.rest, (*wanted, of_residual and not identity)
        )
        if of_residual and identity:
            grad_residual = grad_output
        return grad_input, grad_weight, _reshaped(grad_bias, ctx.bias_shape), grad_residual, *(None,) * 9


def _reshaped(grad: Tensor | None, shape: torch.Size | None) -> Tensor | None:
    """The op's gradient is [C], whatever the shape of what it belongs to."""
    return grad if grad is None or grad.shape == shape else grad.reshape(shape)


def _act_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str,
    slope: float,
    skipped_batches: Tensor | None,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    arguments, after = (input, weight, bias, running_mean, running_var), (residual, act, slope, keep_mask)
    if training:
        return ops.batch_norm_act_train(*arguments, num_batches_tracked, momentum, eps, *after, skipped_batches)
    return ops.batch_norm_act_eval(*arguments, eps, *after)


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
    """The gradients of input, weight and bias that mask asks for; csrc/autograd.cpp calls it."""
    saved = (input, weight, None, None, mean, invstd, None)
    return gradients(grad_output, *saved, training, eps, "identity", 0.0, (*mask, False))[:3]


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
    residual: Tensor | None = None,
    act: Act = "identity",
) -> Tensor:
    """BatchNormFunction.apply; by csrc/autograd.cpp, for speed, where nothing has to see Python call the ops.

    With a residual or another act BatchNormActFunction.apply.

    torch.compile follows Python alone, and a __torch_function__, of a mode or a class, takes calls from Python.

    Raises TypeError for a momentum or eps that is no number, ValueError for an act that is none.
    """
    if type(momentum) is not float and momentum is not None:
        momentum = _float("momentum", momentum)
    if type(eps) is not float:
        eps = _float("eps", eps)
    if running_mean is not None and running_mean.requires_grad:
        _refuse_gradient("running_mean", input, weight, bias)
    if running_var is not None and running_var.requires_grad:
        _refuse_gradient("running_var", input, weight, bias)
    if residual is not None or act != "identity":
        return _apply_act(
            (input, weight, bias, residual),
            (running_mean, running_var, num_batches_tracked, training, momentum, eps, *parse(act), skipped_batches),
        )
    tensors = (input, weight, bias, running_mean, running_var, num_batches_tracked)
    if torch.compiler.is_dynamo_compiling() or has_torch_function_variadic(*tensors):
        return BatchNormFunction.apply(*tensors, training, momentum, eps, skipped_batches)
    return ops.batch_norm(*tensors, training, momentum, eps, skipped_batches)


def _apply_act(differentiable: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return BatchNormActFunction.apply(*differentiable, *rest)
    return _act_forward(*differentiable, *rest, False)[0]


def _refuse_gradient(name: str, *differentiable: Tensor | None) -> None:
    """As torch, where the call has a gradient at all."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        raise RuntimeError(
            f"batch_norm is not differentiable with respect to argument '{name}'. "
            "This input cannot have requires_grad True."
        )
