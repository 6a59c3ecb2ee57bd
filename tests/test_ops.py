"""torch.ops.bnext: schemas, fake kernels, and what they refuse."""

import pytest
import torch
from helpers import DEVICE, DTYPES, by_dtypes, by_layout, channel_arguments, values

import bnext

pytestmark = pytest.mark.bnext("torch.ops.bnext")

ops = torch.ops.bnext
SHAPES = [(4, 5), (3, 5, 7), (2, 5, 4, 3), (2, 3, 2, 3, 2), (0, 5, 4, 3)]
GIVEN = [(), ("weight", "bias"), ("weight",), ("buffers",), ("weight", "bias", "buffers"), ("buffers", "skipped")]
MASKS = [[True] * 3, [True, False, False], [False, True, True], [False] * 3]
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")  # a fiftieth of the time of all
LEAVES = ("input", "grad_output", "weight", "bias")

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_given = pytest.mark.parametrize("given", GIVEN, ids=str)
by_mask = pytest.mark.parametrize("mask", MASKS, ids=str)
by_affine = pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])


def opcheck(op, arguments, traced=False):
    """torch's checks of an op: all where traced; else the quick ones, without and with gradients wanted."""
    if traced:
        torch.library.opcheck(op, arguments)
        return
    names = [a.name for a in op.default._schema.arguments]
    for requires_grad in (False, True):  # tracing refuses these: autograd is BatchNormFunction's
        leaves = [
            t.detach().requires_grad_(requires_grad) if name in LEAVES and t is not None else t
            for name, t in zip(names, arguments, strict=True)
        ]
        torch.library.opcheck(op, tuple(leaves), test_utils=QUICK)


def train_arguments(shape, dtypes, layout, given, momentum=0.1):
    a = channel_arguments(shape[1], dtypes[1])
    parameters = [a[k] if k in given else None for k in ("weight", "bias")]
    buffers = [a["running_mean"], a["running_var"], torch.tensor(3)] if "buffers" in given else [None] * 3
    skipped = torch.zeros(shape[1], dtype=torch.int64) if "skipped" in given else None
    return values(shape, dtypes[0], layout), *parameters, *buffers, momentum, 1e-5, skipped


def eval_arguments(shape, dtypes, layout, affine):
    a = channel_arguments(shape[1], dtypes[1])
    parameters = (a["weight"], a["bias"]) if affine else (None, None)
    return values(shape, dtypes[0], layout), *parameters, a["running_mean"], a["running_var"], 1e-5


def backward_arguments(shape, dtypes, layout, affine, training, mask):
    a = channel_arguments(shape[1], dtypes[1])
    statistics = (torch.randn(shape[1]).to(torch.promote_types(dtypes[0], torch.float32)) for _ in range(2))
    x, dy = values(shape, dtypes[0], layout), values(shape, dtypes[0], layout)
    return dy, x, a["weight"] if affine else None, *statistics, training, mask


@by_layout
@by_dtypes
@by_given
def test_opcheck_train(given, dtypes, layout):
    for shape in SHAPES:
        for momentum in (0.1, None):
            opcheck(ops.batch_norm_train, train_arguments(shape, dtypes, layout, given, momentum))


@by_layout
@by_dtypes
@by_affine
def test_opcheck_eval(affine, dtypes, layout):
    for shape in SHAPES:
        opcheck(ops.batch_norm_eval, eval_arguments(shape, dtypes, layout, affine))


@by_layout
@by_dtypes
@by_mask
def test_opcheck_backward(mask, dtypes, layout):
    for shape in SHAPES:
        for affine, training in ((True, True), (True, False), (False, True)):
            opcheck(ops.batch_norm_backward, backward_arguments(shape, dtypes, layout, affine, training, mask))


@by_given
@by_shape
def test_traced_train(shape, given):
    for dtypes, layout, momentum in ((DTYPES[0], "contiguous", 0.1), (DTYPES[-1], "channels_last", None)):
        opcheck(ops.batch_norm_train, train_arguments(shape, dtypes, layout, given, momentum), traced=True)


@by_affine
@by_shape
def test_traced_eval(shape, affine):
    for dtypes, layout in ((DTYPES[0], "contiguous"), (DTYPES[-1], "channels_last")):
        opcheck(ops.batch_norm_eval, eval_arguments(shape, dtypes, layout, affine), traced=True)


@by_mask
@by_shape
def test_traced_backward(shape, mask):
    for dtypes, layout, training in ((DTYPES[0], "channels_last", True), (DTYPES[-1], "contiguous", False)):
        arguments = backward_arguments(shape, dtypes, layout, True, training, mask)
        opcheck(ops.batch_norm_backward, arguments, traced=True)


@by_layout
@by_dtypes
def test_meta_agrees_with_the_kernels(dtypes, layout):
    for shape in SHAPES:
        arguments = train_arguments(shape, dtypes, layout, ("weight", "bias", "buffers"))
        real = ops.batch_norm_train(*arguments)
        meta = ops.batch_norm_train(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments))
        for r, m in zip(real, meta, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


def test_schema_declares_what_is_written():
    written = [a.name for a in ops.batch_norm_train.default._schema.arguments if a.is_write]
    assert written == ["running_mean", "running_var", "num_batches_tracked", "skipped_batches"]
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


def good_train():
    a = channel_arguments(5, torch.float32)
    x = values((2, 5, 4, 3), torch.float32)
    buffers = [a["running_mean"], a["running_var"], torch.tensor(3)]
    return [x, a["weight"], a["bias"], *buffers, 0.1, 1e-5, torch.zeros(5, dtype=torch.long)]


def good_eval():
    return [*good_train()[:5], 1e-5]


GOOD = {ops.batch_norm_train: good_train, ops.batch_norm_eval: good_eval, ops.batch_norm_backward: good_backward}
TENSORS = [(op, i) for op, good in GOOD.items() for i, a in enumerate(good()) if isinstance(a, torch.Tensor)]
OPTIONAL = {ops.batch_norm_train: (1, 2, 3, 4, 5, 8), ops.batch_norm_eval: (1, 2), ops.batch_norm_backward: (2,)}
by_tensor = pytest.mark.parametrize(("op", "i"), TENSORS, ids=str)


def refused(op, arguments, error=Exception):
    """op raises, and no tensor has changed."""
    real = [a for a in arguments if isinstance(a, torch.Tensor) and a.layout == torch.strided and not a.is_meta]
    before = [a.clone() if a.untyped_storage().nbytes() else None for a in real]
    with pytest.raises(error) as caught:
        op(*arguments)
    for old, new in zip(before, real, strict=True):
        assert old is None or torch.equal(old, new)
    return str(caught.value)


@pytest.mark.parametrize(("op", "i"), [(op, i) for op, i in TENSORS if i not in OPTIONAL[op]], ids=str)
def test_none_for_a_required_tensor(op, i):
    arguments = GOOD[op]()
    arguments[i] = None
    refused(op, arguments)


@by_tensor
def test_freed_memory(op, i):
    arguments = GOOD[op]()
    arguments[i].untyped_storage().resize_(0)
    message = refused(op, arguments, RuntimeError)
    assert "not allocated" in message or "storage" in message, message


@by_tensor
@pytest.mark.parametrize(
    "bad",
    {
        "nothing": lambda t: t.new_empty(0),
        "too many": lambda t: torch.ones(*t.shape[:1], 7, *t.shape[2:]) if t.dim() > 1 else torch.ones(7),
        "int": lambda t: t.int() if t.is_floating_point() else torch.ones(3, dtype=torch.int),
        "complex": lambda t: t.to(torch.complex64) if t.is_floating_point() else torch.ones(2, 2),
        "meta": lambda t: t.to("meta"),
        "sparse": lambda t: t.to_sparse(),
    }.items(),
    ids=lambda bad: bad[0],
)
def test_nonsense(op, i, bad):
    arguments = GOOD[op]()
    arguments[i] = bad[1](arguments[i])
    refused(op, arguments)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_expanded_running_buffers(name):
    arguments = good_train()
    arguments[3 if name == "running_mean" else 4] = torch.ones(1).expand(5)
    assert "expanded" in refused(ops.batch_norm_train, arguments)


def test_skipped_batches_with_gaps():
    arguments = good_train()
    arguments[8] = torch.zeros(10, dtype=torch.long)[::2]
    assert "skipped_batches" in refused(ops.batch_norm_train, arguments, RuntimeError)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_features": 7}, RuntimeError),
        ({"input": torch.ones(2, 5, 4, 3, dtype=torch.int)}, NotImplementedError),
        ({"input": torch.ones(1, 5, 1, 1)}, ValueError),
    ],
    ids=["channels", "int", "one value"],
)
def test_meta_refuses_as_the_kernels_do(change, error):
    for device in (DEVICE, "meta"):
        layer = bnext.BatchNorm2d(change.get("num_features", 5), device=device)
        with pytest.raises(error):
            layer(change.get("input", torch.randn(2, 5, 4, 3)).to(device))
