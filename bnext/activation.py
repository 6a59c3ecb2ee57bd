"""Activations by name, as act says which."""

import math

import torch

NAMES = ("identity", "relu", "relu6", "leaky_relu", "silu", "hardswish")  # as in csrc/checks.h
TWO_SLOPES = ("relu", "relu6", "leaky_relu")  # one bit an element tells which

Act = str | tuple[str, float]


def parse(act: Act) -> tuple[str, float]:
    """The name and the slope below 0 that act says: a name, or ("leaky_relu", slope). Raises ValueError for others."""
    if not torch.jit.is_scripting():
        _check(act)
    if isinstance(act, str):
        return act, 0.0
    return act[0], float(act[1])


def _check(act: Act) -> None:
    if isinstance(act, str) and act in NAMES and act != "leaky_relu":
        return
    if not isinstance(act, tuple) or len(act) != 2 or act[0] != "leaky_relu":
        names = ", ".join(repr(name) for name in NAMES if name != "leaky_relu")
        raise ValueError(f'expected act to be {names} or ("leaky_relu", slope), got {act!r}')
    if not isinstance(act[1], (int, float)) or not math.isfinite(act[1]):
        raise ValueError(f"expected the slope of leaky_relu in act to be a finite number, got {act[1]!r}")
