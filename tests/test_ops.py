"""torch.ops.bnext: schemas, fake kernels, and what they refuse."""

import pytest
import torch
from helpers import by_layout, by_wide_dtype, channel_arguments, values

pytestmark = pytest.mark.bnext("torch.ops.bnext")

ops = torch.ops.bnext
SHAPES = [(4, 5), (3, 5, 7), (2, 5, 4, 3), (2, 3, 2, 3, 2), (0, 5, 4, 3)]


def train_arguments(shape, dtype, layout, given):
    a = channel_arguments(shape[1], dtype)
    parameters = [a[k] if k in given else None for k in ("weight", "bias")]
    buffers = [a["running_mean"], a["running_var"], torch.tensor(3)] if "buffers" in given else [None] * 3
    return values(shape, dtype, layout), *parameters, *buffers


GIVEN = [(), ("weight", "bias"), ("weight",), ("buffers",), ("weight", "bias", "buffers")]


@by_layout
@by_wide_dtype
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_opcheck_train(given, momentum, dtype, layout):
    for shape in SHAPES:
        torch.library.opcheck(ops.batch_norm_train, (*train_arguments(shape, dtype, layout, given), momentum, 1e-5))


@by_layout
@by_wide_dtype
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck_eval(affine, dtype, layout):
    for shape in SHAPES:
        a = channel_arguments(shape[1], dtype)
        parameters = (a["weight"], a["bias"]) if affine else (None, None)
        torch.library.opcheck(
            ops.batch_norm_eval,
            (values(shape, dtype, layout), *parameters, a["running_mean"], a["running_var"], 1e-5),
        )


@by_layout
@by_wide_dtype
@pytest.mark.parametrize("mask", [[True] * 3, [True, False, False], [False, True, True], [False] * 3], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_backward(mask, training, dtype, layout):
    for shape in SHAPES:
        a = channel_arguments(shape[1], dtype)
        x, dy = values(shape, dtype, layout), values(shape, dtype, layout)
        for weight in (a["weight"], None):
            arguments = (dy, x, weight, a["running_mean"], a["running_var"], training, mask)
            torch.library.opcheck(ops.batch_norm_backward, arguments)


@by_layout
@by_wide_dtype
def test_meta_agrees_with_the_kernels(dtype, layout):
    for shape in SHAPES:
        arguments = train_arguments(shape, dtype, layout, ("weight", "bias", "buffers"))
        real = ops.batch_norm_train(*arguments, 0.1, 1e-5)
        meta = ops.batch_norm_train(*(t.to("meta") for t in arguments), 0.1, 1e-5)
        for r, m in zip(real, meta, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


def test_schema_declares_what_is_written():
    written = [a.name for a in ops.batch_norm_train.default._schema.arguments if a.is_write]
    assert written == ["running_mean", "running_var", "num_batches_tracked"]
    for op in (ops.batch_norm_eval.default, ops.batch_norm_backward.default):
        assert not op._schema.is_mutable


def good_backward():
    a = channel_arguments(5, torch.float32)
    x = values((2, 5, 4, 3), torch.float32)
    return [x.clone(), x, a["weight"], a["running_mean"], a["running_var"], True, [True] * 3]


@pytest.mark.parametrize(
    ("position", "bad", "names"),
    [
        (0, torch.zeros(2, 5, 4, 2), "grad_output"),
        (0, torch.zeros(2, 5, 4, 3, dtype=torch.float64), "grad_output"),
        (1, torch.zeros(2, 4, 4, 3), "grad_output"),
        (2, torch.zeros(4), "weight"),
        (2, torch.zeros(5, dtype=torch.float64), "weight"),
        (3, torch.zeros(6), "mean"),
        (3, torch.zeros(5, dtype=torch.float64), "mean"),
        (4, torch.zeros(0), "invstd"),
    ],
)
def test_raw_backward_refuses(position, bad, names):
    arguments = good_backward()
    arguments[position] = bad
    with pytest.raises(RuntimeError, match=names):
        ops.batch_norm_backward(*arguments)


@pytest.mark.parametrize("counter", [torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long)], ids=len)
def test_counter_of_the_wrong_size(counter):
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ops.batch_norm_train(torch.randn(4, 3), None, None, None, None, counter, 0.1, 1e-5)
