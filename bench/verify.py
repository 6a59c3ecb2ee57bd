"""Checks what the timed callables return against bnext.reference in float64.

The rule: bnext's largest absolute error is at most 1.5 times torch's, plus one rounding of the output dtype; in
float64, where the oracle rounds as much as the candidates do, plus eight. The others only have to be plausible.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.candidates import BNEXT_OPS, Candidate
from bench.cases import EPS, MOMENTUM, Inputs
from bench.opcount import OpCounter
from bnext import reference

# Elements that the oracle works on at a time: few enough for a CPU's cache, enough to keep a GPU busy.
_SLICE = {"cpu": 2**19, "cuda": 2**24}
_PIECES = 32


def oracle(inputs: Inputs, mode: str) -> dict[str, Tensor]:
    """The outputs of one mode in float64, by name. Channels do not mix, so they are taken a few at a time."""
    channels = inputs.x.shape[1]
    step = max(1, _SLICE[inputs.x.device.type] * channels // inputs.x.numel())
    whole: dict[str, Tensor] = {}
    for start in range(0, channels, step):
        length = min(step, channels - start)
        for name, part in _oracle_of_channels(inputs, start, length, mode).items():
            if name not in whole:
                whole[name] = part.new_empty(inputs.x.shape if part.dim() > 1 else channels)
            _channels(whole[name], start, length).copy_(part)
    return whole


def _channels(t: Tensor, start: int, length: int) -> Tensor:
    """length channels of t [N, C, H, W] or [C], from start on."""
    return t.narrow(min(1, t.dim() - 1), start, length)


def _oracle_of_channels(inputs: Inputs, start: int, length: int, mode: str) -> dict[str, Tensor]:
    x, dy, weight, bias, running_mean, running_var = (
        _channels(t, start, length).double()
        for t in (
            inputs.x, inputs.dy, inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var
        )
    )  # fmt: skip
    if mode == "eval":
        y = reference.normalize(x, weight, bias, running_mean, (running_var + EPS).rsqrt())
        return {"y": y, "running_mean": running_mean, "running_var": running_var}
    mean, var, invstd = reference.batch_stats(x, EPS)
    if mode == "bwd":
        gradients = reference.backward(dy, x, weight, mean, invstd, training=True)
        return dict(zip(("dx", "dw", "db"), gradients, strict=True))
    count = x.numel() // length
    running_mean, running_var = reference.update_running(running_mean, running_var, mean, var, count, MOMENTUM)
    y = reference.normalize(x, weight, bias, mean, invstd)
    return {"y": y, "running_mean": running_mean, "running_var": running_var}


def faults(candidates: dict[str, Candidate], expected: dict[str, Tensor], inputs: Inputs, mode: str) -> list[str]:
    """Calls each candidate once; what is wrong with its outputs, in words."""
    scale = {name: _largest(value.chunk(_PIECES)) for name, value in expected.items()}
    found, torch_errors = [], {}
    for who, each in candidates.items():
        if who == "bnext":
            continue
        outputs = each.outputs()
        errors = _errors(outputs, expected)
        for name, error in errors.items():
            plausible = math.sqrt(torch.finfo(inputs.x.dtype).eps) * scale[name]
            if not error <= plausible:
                found.append(f"{who} {name}: error {error:.1e}, plausible {plausible:.1e}")
        if who == "torch":
            torch_errors = errors
        del outputs
    with OpCounter() as ops:
        outputs = candidates["bnext"].outputs()
    errors = _errors(outputs, expected)
    for name, value in expected.items():
        output, dtype = outputs[name], (inputs.x if value.dim() == 4 else inputs.weight).dtype
        roundings = 8 if dtype == torch.float64 else 1
        allowed = 1.5 * torch_errors[name] + roundings * torch.finfo(dtype).eps * scale[name]
        if not errors[name] <= allowed:
            found.append(f"bnext {name}: error {errors[name]:.1e}, allowed {allowed:.1e}")
        if output.dtype != dtype:
            found.append(f"bnext {name}: {output.dtype}, not {dtype}")
        if value.dim() == 4 and not output.is_contiguous(memory_format=inputs.memory_format):
            found.append(f"bnext {name}: not in the memory format of x")
    if ops.count[BNEXT_OPS[mode]] != 1:
        found.append(f"bnext: {BNEXT_OPS[mode]} was called {ops.count[BNEXT_OPS[mode]]} times, not once")
    return found


def _errors(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute error of each output; infinite for a wrong shape, NaN for a NaN."""
    return {name: _max_error(outputs[name].detach(), value) for name, value in expected.items()}


def _max_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return math.inf
    pieces = zip(expected.chunk(_PIECES), output.chunk(_PIECES), strict=True)
    return _largest(a - b.contiguous() for a, b in pieces)


def _largest(pieces: Iterable[Tensor]) -> float:
    """The largest absolute value in all pieces, NaN if one is there."""
    return torch.stack([torch.linalg.vector_norm(piece, math.inf) for piece in pieces]).max().item()
