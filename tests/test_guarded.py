"""skip_nonfinite=True: inf and NaN in a batch do not poison a channel's running statistics (pytorch#88474)."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE, by_dtypes, by_layout, layers, modules, torch_ops, values
from torch import nn
from torch.func import functional_call, grad

import bnext

pytestmark = [pytest.mark.bnext("skip_nonfinite is bnext's own"), pytest.mark.usefixtures("one_thread")]

SHAPE = (4, 5, 3, 6)
POISONED = [1, 2, 3, 4]  # of 5 channels


def guarded(shape=SHAPE, **keywords):
    return modules(max(len(shape) - 2, 1))[0](shape[1], **keywords, skip_nonfinite=True)


def pair(shape=SHAPE, **keywords):
    """A guarded layer, and torch's in the same state, which is not the initial one."""
    layer, (_, theirs) = guarded(shape, **keywords), layers(shape[1], max(len(shape) - 2, 1), **keywords)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    return layer, theirs


def poisoned(shape=SHAPE, dtypes=(torch.float32, torch.float32), layout="contiguous"):
    """A batch: NaN in channel 1, infinity in 2, a variance beyond the buffers' dtype in 3, both infinities in 4."""
    x = values(shape, dtypes[0], layout)
    last = (-1,) * (len(shape) - 2)
    x[-1, 1][last], x[-1, 2][last], x[-1, 4][last], x[0, 4][last] = torch.nan, torch.inf, torch.inf, -torch.inf
    large = min(40 * torch.finfo(dtypes[1]).max ** 0.5, torch.finfo(dtypes[0]).max)
    x[:, 3] = large
    x[0, 3] = -large
    return x


def statistics(layer):
    return torch.stack([layer.running_mean, layer.running_var])


@by_layout
@by_dtypes
@pytest.mark.parametrize("shape", [SHAPE, (7, 5), (3, 5, 13), (9, 12, 19, 30)], ids=str)
def test_a_poisoned_channel_is_left_alone_and_counted(shape, dtypes, layout):
    layer, theirs = pair(shape, dtype=dtypes[1])
    plain = copy.deepcopy(layer)
    plain.skip_nonfinite = False
    before, x = statistics(layer), poisoned(shape, dtypes, layout)
    for n in (1, 2):
        y = layer(x)
        assert torch.equal(y.nan_to_num(7), plain(x).nan_to_num(7))
        theirs(x)
        skipped = ~statistics(plain).isfinite().all(0)
        fits = dtypes == (torch.float16, torch.float32)  # float32 holds the variance of any float16 numbers
        assert skipped.nonzero().flatten().tolist() == [c for c in POISONED if c != 3 or not fits]
        assert torch.equal(statistics(layer), before.where(skipped, statistics(plain)))
        assert not statistics(theirs).isfinite().all(0)[skipped].any()
        assert torch.equal(layer.skipped_batches, n * skipped)
        assert layer.num_batches_tracked == plain.num_batches_tracked == n
    assert not plain.skipped_batches.any()


def test_a_good_batch_after_a_bad_one():
    """The counter goes on, the statistics are those of the good batches."""
    layer, theirs = pair()
    x = values(SHAPE, torch.float32)
    theirs(x)
    for batch in (poisoned(), x):
        layer(batch)
    torch.testing.assert_close(statistics(layer)[:, POISONED], statistics(theirs)[:, POISONED])
    assert layer.skipped_batches.tolist() == [0, 1, 1, 1, 1]
    assert layer.num_batches_tracked == 2


def test_in_a_cumulative_average_a_skipped_batch_counts_as_the_average_so_far():
    layer = guarded(momentum=None)
    batches = [values(SHAPE, torch.float32) for _ in range(3)]
    for x in (*batches[:2], poisoned(), batches[2]):
        layer(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    expected = (means[:2].mean(0) * 3 + means[2]) / 4
    torch.testing.assert_close(layer.running_mean[POISONED], expected[POISONED])


def test_what_does_not_track_does_not_count():
    layer = guarded()
    before = statistics(layer)
    for training, tracking in ((True, False), (False, True), (False, False)):
        layer.training, layer.track_running_stats = training, tracking
        layer(poisoned())
    assert torch.equal(statistics(layer), before)
    assert not layer.skipped_batches.any()
    with pytest.raises(ValueError, match=r"skip_nonfinite=True .* expected track_running_stats=True"):
        guarded(track_running_stats=False)


def test_the_count_is_no_state():
    layer, theirs = pair()
    layer(poisoned())
    assert list(layer.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert layer.skipped_batches.sum() == 4
    layer.reset_running_stats()
    assert not layer.skipped_batches.any()
    assert torch.equal(statistics(layer), statistics(nn.BatchNorm2d(5)))


def test_the_guard_is_seen_and_copied():
    layer, theirs = pair()
    assert repr(layer) == repr(theirs)[:-1] + ", skip_nonfinite=True)"
    layer(poisoned())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(poisoned())
        assert (twin.skipped_batches.sum(), layer.skipped_batches.sum()) == (8, 4)
        assert statistics(twin).isfinite().all()


def test_a_layer_moves_with_its_count():
    layer = guarded(device="meta")
    assert layer.skipped_batches.is_meta
    layer(torch.empty(SHAPE, device="meta"))
    layer.to_empty(device=torch.get_default_device()).reset_parameters()
    assert not layer.skipped_batches.any()
    layer.double()(poisoned(dtypes=(torch.float64,) * 2))
    assert layer.skipped_batches.tolist() == [0, 1, 1, 1, 1]
    assert layer.skipped_batches.dtype == torch.int64
    skipped = torch.nn.utils.skip_init(bnext.BatchNorm2d, 5, skip_nonfinite=True).skipped_batches
    assert skipped.shape == (5,)


FROM_META = {
    "to_empty": lambda layer, state: layer.to_empty(device=DEVICE).load_state_dict(state),
    "assign=True": lambda layer, state: layer.load_state_dict(state, assign=True),
}


@pytest.mark.parametrize("way", FROM_META)
def test_a_count_that_leaves_the_meta_device_is_0(way, monkeypatch):
    """No state_dict holds it, so that nothing else would give it a value."""
    monkeypatch.setattr(torch, "empty_like", lambda t, **keywords: torch.full_like(t, 7, **keywords))
    layer = guarded(device="meta")
    FROM_META[way](layer, pair()[1].state_dict())
    layer(poisoned())
    assert layer.skipped_batches.tolist() == [0, 1, 1, 1, 1]


def test_a_layer_whose_type_is_changed():
    """type() casts every buffer, num_batches_tracked too; torch's go on."""
    layer = guarded()
    layer(poisoned())
    layer.type(torch.float64)(poisoned(dtypes=(torch.float64,) * 2))
    assert layer.skipped_batches.tolist() == [0, 2, 2, 2, 2]


def test_compiled():
    torch._dynamo.reset()
    layer, x = pair()[0], poisoned()
    twin = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), twin(x), equal_nan=True)
    assert torch.equal(statistics(layer), statistics(twin))
    assert torch.equal(layer.skipped_batches, twin.skipped_batches)


def transformed(layer, x):
    grad(lambda x: layer(x).sum())(x)


def exported(layer, x):
    torch.export.export(layer, (x,))


def traced(layer, x):
    torch.jit.trace(layer, (x,))


def scripted(layer, x):
    torch.jit.script(layer)(x)


def of_a_class(layer, x):
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    layer(x.as_subclass(Own))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [transformed, exported, traced, scripted, of_a_class])
def test_where_torchs_own_must_run_there_is_no_unguarded_training(way):
    layer, x = guarded(), poisoned()
    with pytest.raises((NotImplementedError, torch.jit.Error), match="skip_nonfinite=True needs bnext's op"):
        way(layer, x)
    assert torch.equal(statistics(layer), statistics(guarded()))
    way(layer.eval(), x)


def test_functional_call_counts_in_the_buffers_that_it_is_given():
    layer = guarded()
    given = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    functional_call(layer, given, (poisoned(),))
    assert given["skipped_batches"].tolist() == [0, 1, 1, 1, 1]
    assert not layer.skipped_batches.any()


def test_reverting_says_what_is_lost_and_converting_brings_it_back(caplog):
    model = nn.Sequential(guarded(), bnext.BatchNorm2d(5))
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.revert_batchnorm(model)
    (record,) = caplog.records
    assert record.getMessage() == "running statistics no longer guarded, as by skip_nonfinite=True: 0"
    with torch_ops():
        model(values(SHAPE, torch.float32))
    bnext.convert_batchnorm(model)(poisoned())
    assert model[0].skipped_batches.sum() == 4
    assert statistics(model[0]).isfinite().all()


def test_two_devices_are_refused():
    layer = guarded()
    layer.skipped_batches = layer.skipped_batches.to("meta")
    with pytest.raises(RuntimeError, match="skipped_batches"):
        layer(values(SHAPE, torch.float32))
