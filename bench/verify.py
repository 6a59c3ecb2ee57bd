"""Checks what the timed callables return against bnext.reference in float64.

The rule: bnext's largest absolute error is at most 1.5 times torch's, plus one rounding of the output dtype; in
float64, where the oracle rounds as much as the candidates do, plus eight. The others, torch's own among them, have to
be plausible: off by no more than a share of the largest value, see bench.cases.PLAUSIBLE.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bench.backends import BACKENDS, Candidate, candidate
from bench.cases import EPS, MOMENTUM, PLAUSIBLE, Inputs
from bench.opcount import OpCounter
from bnext import reference

_BNEXT_OPS = {"fwd": ("train",), "bwd": ("backward",), "fwd_bwd": ("train", "backward"), "eval": ("eval",)}

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
    """length channels of t [N, C, ...] or [C], from start on."""
    return t.narrow(min(1, t.dim() - 1), start, length)


def _oracle_of_channels(inputs: Inputs, start: int, length: int, mode: str) -> dict[str, Tensor]:
    x, dy, weight, bias, running_mean, running_var, residual = (
        t if t is None else _channels(t, start, length).double()
        for t in (
            inputs.x, inputs.dy, inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var, inputs.residual
        )
    )  # fmt: skip
    act = "identity" if inputs.op == "bn" else "relu"
    if mode == "eval":
        mean, invstd = running_mean, (running_var + EPS).rsqrt()
    else:
        mean, var, invstd = reference.batch_stats(x, EPS)
    z = reference.normalize(x, weight, bias, mean, invstd)
    if residual is not None:
        z += residual
    y = reference.activate(z, act, 0)
    if mode == "eval":
        return {"y": y, "running_mean": running_mean, "running_var": running_var}
    found = {}
    if mode != "bwd":
        count = x.numel() // length
        updated = reference.update_running(running_mean, running_var, mean, var, count, MOMENTUM)
        found = dict(zip(("running_mean", "running_var"), updated, strict=True))
        found["y"] = y
    if mode != "fwd":
        dz = reference.activate_backward(dy, z, act, 0)
        gradients = reference.backward(dz, x, weight, mean, invstd, training=True)
        found |= zip(("dx", "dw", "db"), gradients, strict=True)
        if residual is not None:
            found["dresidual"] = dz
    return found


def errors_of_torch(expected: dict[str, Tensor], inputs: Inputs, mode: str) -> dict[str, float]:
    """How far off eager torch is, by output: what bnext is measured by."""
    return _errors(candidate(BACKENDS["torch"], inputs, mode).outputs(), expected)


def fault(
    name: str,
    each: Candidate,
    expected: dict[str, Tensor],
    inputs: Inputs,
    mode: str,
    of_torch: dict[str, float],
) -> str:
    """Calls the candidate once; what is wrong with its outputs in words, "" if nothing is."""
    called: dict[str, int] = {}
    if name == "bnext":
        with OpCounter() as ops:
            outputs = each.outputs()
        called = ops.count
    else:  # torch.compile does not compile what a mode watches
        outputs = each.outputs()
    errors = _errors(outputs, expected)
    found = []
    for output, value in expected.items():
        dtype = (inputs.x if value.dim() > 1 else inputs.weight).dtype
        scale = _largest(value.chunk(_PIECES))
        allowed = PLAUSIBLE[inputs.x.dtype] * scale
        if name == "bnext":
            roundings = 8 if dtype == torch.float64 else 1
            exact = 1.5 * of_torch[output] + roundings * torch.finfo(dtype).eps * scale
            allowed = min(exact, allowed)  # should torch itself be wrong
        if not errors[output] <= allowed:
            found.append(f"{output}: error {errors[output]:.1e}, allowed {allowed:.1e}")
        if outputs[output].dtype != dtype:
            found.append(f"{output}: {outputs[output].dtype}, not {dtype}")
        if value.dim() > 1 and not outputs[output].is_contiguous(memory_format=inputs.memory_format):
            found.append(f"{output}: not in the memory format of x")
    if name == "bnext":
        act = "" if inputs.op == "bn" else "_act"
        ops = [f"bnext::batch_norm{act}_{kind}" for kind in _BNEXT_OPS[mode]]
        found += [f"{op} was called {called[op]} times, not once" for op in ops if called[op] != 1]
    return "; ".join(found)


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
