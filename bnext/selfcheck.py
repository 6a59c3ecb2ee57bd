"""A training step and an evaluation of a small layer, against bnext.reference in float64."""

import torch
from torch import Tensor

from bnext import reference
from bnext.modules import BatchNorm2d

_WEIGHT, _BIAS = (0.5, 0.75, 1.0, 1.25, 1.5), (-1.0, -0.5, 0.0, 0.5, 1.0)
_EPS, _MOMENTUM = 1e-5, 0.1


def fault(device: str) -> str | None:
    """What is wrong with bnext on this device, in float32 and bfloat16, channels first and channels last; or None."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, dy = (torch.randn(8, 5, 7, 7, generator=generator, device="cpu").to(dtype) for _ in range(2))
            found = _found(x.to(device, memory_format=layout), dy.to(device))
            for name, expected in _expected(reference.oracle(x), reference.oracle(dy)).items():
                error = (found[name].detach().cpu().double() - expected).abs().max().item()
                if not error <= 16 * torch.finfo(dtype).eps * expected.abs().max().item():
                    return f"{name} of {dtype}, {layout}, is off by {error:.1e}"
    return None


def _found(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    layer = BatchNorm2d(len(_WEIGHT), _EPS, _MOMENTUM, device=x.device)
    layer.load_state_dict({**layer.state_dict(), "weight": torch.tensor(_WEIGHT), "bias": torch.tensor(_BIAS)})
    output = layer(x.requires_grad_())
    output.backward(dy)
    return {
        "output": output,
        "grad_input": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "output in evaluation": layer.eval()(x),
    }


def _expected(x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    weight, bias = x.new_tensor(_WEIGHT), x.new_tensor(_BIAS)
    mean, var, invstd = reference.batch_stats(x, _EPS)
    grad_input, grad_weight, grad_bias = reference.backward(dy, x, weight, mean, invstd, training=True)
    count = x.numel() // x.shape[1]
    zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
    running_mean, running_var = reference.update_running(zeros, ones, mean, var, count, _MOMENTUM)
    return {
        "output": reference.normalize(x, weight, bias, mean, invstd),
        "grad_input": grad_input,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "output in evaluation": reference.normalize(x, weight, bias, running_mean, (running_var + _EPS).rsqrt()),
    }
