"""The formulas in plain torch code: the oracle of the tests and the benchmark, in float64.

Ioffe & Szegedy 2015 as torch.nn.BatchNorm2d does it: the biased variance normalises, with eps inside the square
root; running_var keeps the unbiased one. Everything here is differentiable, in whatever dtype it is given.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Of `count` values per channel: mean and m2 = sum((x - mean)^2), each [C]."""

    count: int
    mean: Tensor
    m2: Tensor


def combine(a: Moments, b: Moments) -> Moments:
    """Of a's values and b's together: Chan, Golub & LeVeque (1979)."""
    count, delta = a.count + b.count, b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * (a.count * b.count / count))


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    """t [C] as [1, C, 1, ...], to broadcast against like [N, C, *]."""
    return t.reshape(1, -1, *[1] * (like.dim() - 2))


def _dims(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def batch_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and 1 / sqrt(var + eps), each [C], of input [N, C, *]."""
    mean = input.mean(_dims(input))
    var = (input - _per_channel(mean, input)).square().mean(_dims(input))
    return mean, var, (var + eps).rsqrt()


def normalize(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """(input - mean) * (weight * invstd) + bias."""
    scale = invstd if weight is None else weight * invstd
    output = (input - _per_channel(mean, input)) * _per_channel(scale, input)
    return output if bias is None else output + _per_channel(bias, input)


def activate(z: Tensor, act: str, slope: float) -> Tensor:
    """torch's own activation of that name; slope is that of leaky ReLU below 0."""
    if act == "relu":
        return F.relu(z)
    if act == "relu6":
        return F.relu6(z)
    if act == "leaky_relu":
        return F.leaky_relu(z, slope)
    if act == "silu":
        return F.silu(z)
    if act == "hardswish":
        return F.hardswish(z)
    return z


def activate_backward(grad_output: Tensor, z: Tensor, act: str, slope: float) -> Tensor:
    """Gradient of z."""
    if act == "relu":
        return torch.where(z <= 0, 0, grad_output)
    if act == "relu6":
        return torch.where((z <= 0) | (z >= 6), 0, grad_output)
    if act == "leaky_relu":
        return torch.where(z > 0, grad_output, grad_output * slope)
    if act == "silu":
        s = z.sigmoid()
        return grad_output * s * (1 + z * (1 - s))
    if act == "hardswish":
        return torch.where(z <= -3, 0, torch.where(z < 3, grad_output * (z / 3 + 0.5), grad_output))
    return grad_output


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, factor: float
) -> tuple[Tensor, Tensor]:
    """The running statistics after a batch of `count` values per channel with mean and biased variance var."""
    unbiased = var * (count / (count - 1))
    return (1 - factor) * running_mean + factor * mean, (1 - factor) * running_var + factor * unbiased


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input [N, C, *], weight [C] and bias [C]; training: mean and invstd are those of input."""
    dims = _dims(input)
    centred = input - _per_channel(mean, input)
    grad_bias = grad_output.sum(dims)
    sum_dy_xmu = (grad_output * centred).sum(dims)
    grad = grad_output
    if training:
        count = input.numel() / input.shape[1]
        projection = sum_dy_xmu * invstd.square() / count
        grad = grad - _per_channel(grad_bias / count, input) - centred * _per_channel(projection, input)
    scale = invstd if weight is None else weight * invstd
    return grad * _per_channel(scale, input), sum_dy_xmu * invstd, grad_bias


def oracle(t: Tensor | None) -> Tensor | None:
    """t in float64, detached: what the functions above are fed to serve as an oracle."""
    return None if t is None else t.detach().to(torch.float64)
