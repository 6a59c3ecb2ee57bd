"""Every combination of what a batch norm is given, against torch and the oracle: all of them with --all, else a cut.

A cell is one combination. A test has one shape, dtype and layout, and goes through its cells, or every n-th of them,
beginning elsewhere in each test, so that a cut still brings every value of every argument to every shape.
"""

import itertools
import zlib

import pytest
import subject
import torch
import torch.nn.functional as F
from helpers import (
    LARGE,
    OUTPUTS,
    SMALL,
    bnext_ops,
    by_dtypes,
    by_layout,
    channel_arguments,
    compare,
    in_layout,
    layers,
    run,
    values,
)

RESNET = [(2, 64, 56, 56), (2, 256, 14, 14), (4, 512, 7, 7)]
MOMENTUM = (0.1, 0, 1, None, True)
EACH = (True, False)

by_shape = pytest.mark.parametrize("shape", [*SMALL, *LARGE, *RESNET], ids=str)


def wanted(*given):
    """Which of (input, weight, bias) may want gradients, of those that are given."""
    return itertools.product(*[EACH if g else (False,) for g in given])


MODULES = [
    (momentum, affine, track, training, requires)
    for momentum, affine, track, training in itertools.product(MOMENTUM, EACH, EACH, EACH)
    for requires in wanted(True, affine, affine)
]
FUNCTIONS = [
    (weight, bias, buffers, training, requires)
    for weight, bias, buffers, training in itertools.product(EACH, EACH, EACH, EACH)
    if buffers or training
    for requires in wanted(True, weight, bias)
]


def cut(request, cells, shape):
    if request.config.getoption("--all"):
        return cells
    stride = 11 if shape in SMALL else 83
    return cells[zlib.crc32(request.node.name.encode()) % stride :: stride]


def problem(shape, dtype, layout):
    return values(shape, dtype, layout), in_layout(torch.randn(shape, dtype=dtype) + 0.3, layout)


def ops(batch, requires):
    return bnext_ops("train" if batch else "eval", *["backward"] * any(requires))


def step(layer, x, dy, requires):
    """Results of a forward and a backward of a layer, by name."""
    leaves = (x.detach(), layer.weight, layer.bias)
    for t, r in zip(leaves, requires, strict=True):
        if t is not None:
            t.requires_grad_(r).grad = None
    output = layer(leaves[0])
    if output.requires_grad:
        output.backward(dy)
    buffers = [None if b is None else b.clone() for b in (layer.running_mean, layer.running_var)]
    grads = [None if t is None else t.grad for t in leaves]
    return dict(zip(OUTPUTS, (output.detach(), *buffers, *grads), strict=True))


def two_steps(shape, dtypes, layout, momentum, affine, track, training, requires):
    """A module's two steps, each from the same state as torch's module."""
    dim = max(len(shape) - 2, 1)
    ours, theirs = (
        m.train(training)
        for m in layers(
            shape[1], dim, momentum=momentum, affine=affine, track_running_stats=track, eps=1e-3, dtype=dtypes[1]
        )
    )
    for n in (1, 2):
        theirs.load_state_dict(ours.state_dict())
        before = {k: v.clone() for k, v in ours.state_dict().items() if k != "num_batches_tracked"}
        x, dy = problem(shape, dtypes[0], layout)
        with ops(training or not track, requires):
            found = step(ours, x, dy, requires)
        compare(
            found,
            step(theirs, x, dy, requires),
            x,
            **before,
            grad_output=dy if any(requires) else None,
            requires=requires,
            training=training or not track,
            momentum=1 / n if momentum is None else momentum,
            eps=1e-3,
        )
        if track:
            assert ours.num_batches_tracked == theirs.num_batches_tracked == (n if training else 0)


def one_call(shape, dtypes, layout, weight, bias, buffers, training, requires):
    """A call of the function."""
    x, dy = problem(shape, dtypes[0], layout)
    given = {"weight": weight, "bias": bias, "running_mean": buffers, "running_var": buffers}
    arguments = {
        "training": training,
        "momentum": 0.3,
        "requires": requires,
        "grad_output": dy if any(requires) else None,
        **{name: t for name, t in channel_arguments(shape[1], dtypes[1]).items() if given[name]},
    }
    with ops(training, requires):
        found = run(subject.batch_norm, x, **arguments)
    compare(found, run(F.batch_norm, x, **arguments), x, **arguments)


@by_layout
@by_dtypes
@by_shape
@pytest.mark.parametrize(("check", "cells"), [(two_steps, MODULES), (one_call, FUNCTIONS)], ids=["module", "function"])
def test_cells(request, check, cells, shape, dtypes, layout):
    for cell in cut(request, cells, shape):
        try:
            check(shape, dtypes, layout, *cell)
        except AssertionError as error:
            raise AssertionError(f"in cell {cell}: {error}") from error


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (0, 5, 3, 3), (2, 5, 0, 3), (2, 5, 3, 0, 2)], ids=str)
@by_layout
@by_dtypes
def test_empty(dtypes, layout, shape):
    """Nothing to normalise: what is left is the counter, zeros for gradients, and strides."""
    for momentum, affine, track, training, requires in MODULES:
        keywords = {"momentum": momentum, "affine": affine, "track_running_stats": track, "dtype": dtypes[1]}
        ours, theirs = (m.train(training) for m in layers(5, max(len(shape) - 2, 1), **keywords))
        x, dy = problem(shape, dtypes[0], layout)
        found, expected = (step(m, x, dy, requires) for m in (ours, theirs))
        for name in OUTPUTS:
            assert (found[name] is None) == (expected[name] is None), (name, keywords, requires)
            if found[name] is not None:
                assert torch.equal(found[name], expected[name])
                assert found[name].dtype == expected[name].dtype
        if track:
            assert ours.num_batches_tracked == theirs.num_batches_tracked
