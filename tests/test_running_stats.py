"""Running buffers, the counter, momentum, and the four states of (training, track_running_stats)."""

import itertools

import pytest
import subject
import torch
import torch.nn.functional as F
from helpers import (
    assert_accurate,
    assert_same_state,
    bnext_ops,
    by_layout,
    by_wide_dtype,
    channel_arguments,
    exact,
    layers,
    values,
)

SHAPE = (4, 5, 3, 6)


def step(ours, theirs, x, op="train"):
    """One forward of both on x; the outputs and states must agree."""
    with bnext_ops(op):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)
    assert_same_state(ours, theirs)
    return y


@by_layout
@by_wide_dtype
@pytest.mark.parametrize("momentum", [0.1, 0, 0.0, 1, 1.0, True, False, None, -0.5, 2.0])
def test_momentum_over_steps(momentum, dtype, layout):
    ours, theirs = layers(momentum=momentum, dtype=dtype)
    for n in range(1, 5):
        step(ours, theirs, values(SHAPE, dtype, layout))
        assert ours.num_batches_tracked == n


@by_wide_dtype
def test_cumulative_average_is_the_mean_of_the_batches(dtype):
    layer = subject.BatchNorm2d(5, momentum=None, dtype=dtype)
    batches = [values((n, *SHAPE[1:]), dtype) for n in (2, 7, 3)]
    for x in batches:
        layer(x)
    dims = (0, 2, 3)
    mean = torch.stack([x.mean(dims) for x in batches]).mean(0)
    var = torch.stack([x.var(dims) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


def test_momentum_none_continues_from_the_counter():
    ours, theirs = layers(momentum=None)
    for layer in (ours, theirs):
        layer.num_batches_tracked.fill_(9)
    before = ours.running_mean.clone()
    x = values(SHAPE, torch.float32)
    step(ours, theirs, x)
    torch.testing.assert_close(ours.running_mean, 0.9 * before + 0.1 * x.mean((0, 2, 3)))


def test_momentum_none_without_a_counter():
    ours, theirs = layers(momentum=None)
    before = ours.running_mean.clone()
    for layer in (ours, theirs):
        layer.num_batches_tracked = None
    step(ours, theirs, values(SHAPE, torch.float32))
    assert torch.equal(ours.running_mean, before)


def test_momentum_one_keeps_only_the_last_batch():
    layer = subject.BatchNorm2d(5, momentum=1.0)
    layer.running_mean.fill_(1e30)
    x = values(SHAPE, torch.float32)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))


def test_momentum_zero_leaves_every_bit():
    layer, _ = layers(momentum=0.0)
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(values(SHAPE, torch.float32))
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert layer.num_batches_tracked == 1


STATES = list(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize(("training", "tracking"), STATES)
def test_four_states(training, tracking):
    ours, theirs = (m.train(training) for m in layers(track_running_stats=tracking))
    for _ in range(2):
        step(ours, theirs, values(SHAPE, torch.float32), "train" if training or not tracking else "eval")
    if tracking:
        assert ours.num_batches_tracked == (2 if training else 0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("states", list(itertools.permutations(STATES, 2)), ids=str)
@pytest.mark.filterwarnings("default")
def test_flipping_states(states, start, momentum):
    ours, theirs = layers(track_running_stats=start, momentum=momentum)
    for training, tracking in states:
        for layer in (ours, theirs):
            layer.training, layer.track_running_stats = training, tracking
        batch = training or not start  # eval without buffers takes the batch's statistics
        step(ours, theirs, values(SHAPE, torch.float32), "train" if batch else "eval")


def test_buffers_are_updated_in_place():
    layer, _ = layers()
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [getattr(layer, n) for n in names]
    pointers, copies = [b.data_ptr() for b in before], [b.clone() for b in before]
    layer(values(SHAPE, torch.float32))
    for name, buffer, pointer, copy in zip(names, before, pointers, copies, strict=True):
        assert getattr(layer, name) is buffer
        assert buffer.data_ptr() == pointer
        assert not torch.equal(buffer, copy)


def test_eval_touches_nothing():
    layer, _ = layers()
    before = {k: (v, v.clone(), v._version) for k, v in layer.state_dict(keep_vars=True).items()}
    layer.eval()(values(SHAPE, torch.float32))
    for key, (tensor, copy, version) in before.items():
        assert torch.equal(tensor, copy), key
        assert tensor._version == version, key


def test_version_counters_move_as_torchs_do():
    x = values(SHAPE, torch.float32)
    moved = []
    for layer in layers():
        before = {n: b._version for n, b in layer.named_buffers()}
        layer(x)
        moved.append({n: b._version - before[n] for n, b in layer.named_buffers()})
    assert moved[0] == moved[1]
    assert moved[0]["num_batches_tracked"] == 1


@by_wide_dtype
@by_layout
def test_buffers_that_are_strided_views(layout, dtype):
    arguments = channel_arguments(5, dtype)
    x = values(SHAPE, dtype, layout)
    store = torch.full((5, 4), 42.0, dtype=dtype)
    store[:, 0], store[:, 2] = arguments["running_mean"], arguments["running_var"]
    contiguous = arguments["running_mean"].clone(), arguments["running_var"].clone()
    with bnext_ops("train"):
        y = subject.batch_norm(x, store[:, 0], store[:, 2], training=True)
    torch.testing.assert_close(y, subject.batch_norm(x, *contiguous, training=True))
    torch.testing.assert_close(store[:, 0], contiguous[0])
    torch.testing.assert_close(store[:, 2], contiguous[1])
    assert (store[:, 1::2] == 42).all()


def test_buffers_with_an_offset():
    arguments = channel_arguments(5, torch.float32)
    store = torch.cat([torch.ones(1), arguments["running_mean"], arguments["running_var"], torch.ones(1)])
    oracle, _ = exact(x := values(SHAPE, torch.float32), **arguments)
    subject.batch_norm(x, store[1:6], store[6:11], training=True)
    torch.testing.assert_close(store[1:6].double(), oracle["running_mean"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(store[6:11].double(), oracle["running_var"], rtol=1e-6, atol=1e-6)
    assert store[0] == store[-1] == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("type_", [torch.float64, torch.float32])
def test_counter_of_another_dtype(type_, momentum):
    ours, theirs = (m.type(type_) for m in layers(momentum=momentum))
    assert ours.num_batches_tracked.dtype == type_
    for n in range(1, 4):
        step(ours, theirs, values(SHAPE, type_))
        assert ours.num_batches_tracked == n


@pytest.mark.parametrize("type_", [torch.int32, torch.int16])
def test_counter_of_another_integer_type(type_):
    ours, theirs = layers(momentum=None)
    for layer in (ours, theirs):
        layer.num_batches_tracked = torch.tensor(4, dtype=type_)
    step(ours, theirs, values(SHAPE, torch.float32))
    assert ours.num_batches_tracked.dtype == type_


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_counter_moves_where_the_batch_is_refused(momentum):
    ours, theirs = layers(momentum=momentum)
    before = ours.running_mean.clone(), ours.running_var.clone()
    for layer in (ours, theirs):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(torch.randn(1, 5, 1, 1))
        assert layer.num_batches_tracked == 1
    assert torch.equal(ours.running_mean, before[0])
    assert torch.equal(ours.running_var, before[1])


def test_the_counter_stays_where_the_rank_is_refused():
    for layer in layers():
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(3, 5))
        assert layer.num_batches_tracked == 0


def test_running_statistics_are_those_of_the_oracle_after_many_steps():
    arguments = channel_arguments(5, torch.float32)
    buffers = [arguments["running_mean"], arguments["running_var"]]
    mine, torchs = ([b.clone() for b in buffers] for _ in range(2))
    oracle = [b.double() for b in buffers]
    for _ in range(50):
        x = values(SHAPE, torch.float32)
        subject.batch_norm(x, *mine, training=True, momentum=0.3)
        F.batch_norm(x, *torchs, training=True, momentum=0.3)
        found, _ = exact(x, running_mean=oracle[0], running_var=oracle[1], momentum=0.3)
        oracle = [found["running_mean"], found["running_var"]]
    for name, *three in zip(("running_mean", "running_var"), mine, torchs, oracle, strict=True):
        assert_accurate(name, *three)


def test_unbiased_variance_of_two_values():
    layer = subject.BatchNorm1d(1, momentum=1.0)
    layer(torch.tensor([[1.0], [4.0]]))
    assert layer.running_mean == 2.5
    assert layer.running_var == 4.5


def test_reset_running_stats():
    layer, _ = layers()
    layer(values(SHAPE, torch.float32))
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()
