"""Batch norms of other packages, given the signature of F.batch_norm, by their public interfaces.

What they return is checked like everything else: an adapter that is wrong gets a status, not a speed.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import Inputs

BatchNorm = Callable[..., Tensor]


class Unsupported(Exception):
    """Why a backend does not do a case."""


def for_apex(inputs: Inputs, mode: str) -> Inputs:
    """apex's kernels are for float16 in [N, H, W, C]."""
    x = inputs.x
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (x.is_cuda and x.dtype == torch.float16 and last):
        raise Unsupported("apex.contrib.groupbn takes float16, nhwc, on CUDA")
    return inputs


def apex(op: str) -> BatchNorm:
    """apex.contrib.groupbn.BatchNorm2d_NHWC, a module: x and residual are given to it as views [N, H, W, C]."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    modules: dict[int, torch.nn.Module] = {}

    def batch_norm(
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        *_: float,
        residual: Tensor | None = None,
    ) -> Tensor:
        if weight.data_ptr() not in modules:
            module = BatchNorm2d_NHWC(x.shape[1], fuse_relu=op != "bn", bn_group=1).to(x.device).train(training)
            for name, t in (("weight", weight), ("bias", bias)):
                delattr(module, name)
                setattr(module, name, t)
            for name, t in (("running_mean", mean), ("running_var", var)):
                if t is not None:
                    setattr(module, name, t)
            modules[weight.data_ptr()] = module
        views = (t.permute(0, 2, 3, 1) for t in (x, residual) if t is not None)
        return modules[weight.data_ptr()](*views).permute(0, 3, 1, 2)

    return batch_norm


def for_abn(inputs: Inputs, mode: str) -> Inputs:
    """It overwrites x with y, so x is a copy of its own, no backward can be walked twice, and ReLU cannot be undone."""
    if inputs.op != "bn":
        raise Unsupported("inplace_abn has no ReLU: it inverts its activation, and a ReLU has no inverse")
    if mode not in ("fwd", "eval"):
        raise Unsupported("inplace_abn overwrites its input: a backward cannot be repeated on the same tensors")
    return replace(inputs, x=inputs.x.clone())


def inplace_abn(op: str) -> BatchNorm:
    """inplace_abn.inplace_abn with its identity activation; its weight is taken as |weight| + eps, and x gets no graph.

    A detached view, because what it overwrites must not be a leaf.
    """
    from inplace_abn import inplace_abn as function

    def batch_norm(x: Tensor, *arguments: Tensor | float | bool | None) -> Tensor:
        mean, var, weight, bias, training, momentum, eps = arguments
        return function(x.detach(), weight, bias, mean, var, training, momentum, eps, "identity", 0.0)

    return batch_norm
