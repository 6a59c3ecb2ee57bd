"""update_bn: statistics of all batches as if they were one, and nothing else changed, whatever goes wrong."""

import itertools
import logging

import pytest
import torch
from helpers import HALF, WIDE, by_layout, float_id, modules, norms
from ranks import in_two_ranks
from recalibration import CLASSES, SIZES, assert_statistics_of, assert_unchanged, batches, inputs, network, state
from torch import distributed, nn
from torch.optim import swa_utils
from torch.testing import assert_close

import bnext
from bnext import recalibrate

pytestmark = [pytest.mark.bnext("bnext.update_bn"), pytest.mark.usefixtures("one_thread")]


@by_layout
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", WIDE + HALF, ids=float_id)
def test_of_batches_as_of_one(dtype, name, layout):
    norm, data = CLASSES[name](5, dtype=dtype), batches(5, 4, 6, dtype=dtype, layout=layout)
    bnext.update_bn(data, norm)
    assert_statistics_of(norm, torch.cat(data))
    assert norm.num_batches_tracked == len(SIZES)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_of_each_dimension(dim):
    norm, data = modules(dim)[0](5), batches(5, *[4] * dim, dtype=torch.float32)
    bnext.update_bn(data, norm)
    assert_statistics_of(norm, torch.cat(data))


def test_torchs_own_differs_where_batches_do():
    """It averages over batches, each with its own mean, and the last as heavy as the first."""
    data, found = batches(5, 4, 6), []
    for update_bn in (bnext.update_bn, swa_utils.update_bn):
        norm = nn.BatchNorm2d(5).double()
        update_bn(data, norm)
        found.append(norm)
    assert (found[0].running_mean - found[1].running_mean).abs().max() > 1e-3
    assert found[0].num_batches_tracked == found[1].num_batches_tracked


@pytest.mark.parametrize("name", ["bnext", "torch"])
def test_of_each_layer_of_a_network(name):
    model, data = network(CLASSES[name]), batches(3, 6, 6)
    found = inputs(model, data)
    bnext.update_bn(iter(data), model)
    for norm, x in zip(norms(model), found, strict=True):
        assert_statistics_of(norm, x)
    assert [norm.num_batches_tracked.item() for norm in norms(model)] == [len(SIZES), 2 * len(SIZES)]


def test_of_large_means_and_samples_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(recalibrate, "_CHUNK", 100)
    norm, data = bnext.BatchNorm2d(5).double(), [x + 1e8 for x in batches(5, 4, 6)]
    bnext.update_bn(data, norm)
    dims, x = (0, 2, 3), torch.cat(data) - 1e8
    assert_close(norm.running_mean - 1e8, x.mean(dims), rtol=0, atol=3e-8)
    assert_close(norm.running_var, x.var(dims), rtol=2e-8, atol=0)


def test_what_was_before_does_not_matter():
    norm, data = bnext.BatchNorm2d(5).double(), batches(5, 4, 6)
    norm.running_mean.fill_(torch.nan), norm.running_var.fill_(torch.inf), norm.num_batches_tracked.fill_(9)
    bnext.update_bn(data, norm)
    assert_statistics_of(norm, torch.cat(data))


def test_nothing_but_statistics_changes():
    model = network()
    before, statistics, outputs = state(model), {id(b) for b in model.buffers()}, []
    bnext.update_bn(batches(3, 6, 6), model, forward=lambda model, x: outputs.append(model(x)))
    assert not any(y.requires_grad for y in outputs)
    for (a, *was), (b, *now) in zip(before, state(model), strict=True):
        assert a is b
        if id(a) in statistics:
            assert not torch.equal(was[0], now[0])
        else:
            assert torch.equal(was[0], now[0]) if isinstance(a, torch.Tensor) else was == now


def test_the_rest_predicts():
    """Dropout is off, as it is when the statistics are used; torch's leaves it on."""
    norm, data = bnext.BatchNorm1d(5).double(), batches(5)
    model = nn.Sequential(nn.Dropout(0.5), norm, nn.Dropout(0.5)).train()
    modes = []
    model[2].register_forward_hook(lambda m, args, y: modes.append(m.training))
    bnext.update_bn(data, model)
    assert_statistics_of(norm, torch.cat(data))
    assert not any(modes)
    assert all(m.training for m in model.modules())


def test_what_is_frozen_or_does_not_track_is_left_alone():
    model = network()
    frozen, tracked, late = model[1], model[4], bnext.BatchNorm2d(4).double()
    model.extend([late, bnext.BatchNorm2d(4, track_running_stats=False).double()])
    frozen.frozen_stats, late.track_running_stats = True, False
    before = state(frozen), state(late)
    bnext.update_bn(batches(3, 6, 6), model)
    assert_unchanged(frozen, before[0])
    assert_unchanged(late, before[1])
    assert tracked.num_batches_tracked == 2 * len(SIZES)


def test_a_guarded_layer_counts_from_then_on():
    norm, data = bnext.BatchNorm2d(5, skip_nonfinite=True).double(), batches(5, 4, 6)
    norm(data[0] * torch.nan)
    with pytest.raises(ValueError, match="inf or NaN"):
        bnext.update_bn([data[0] * torch.nan], norm)
    assert norm.skipped_batches.tolist() == [1] * 5
    bnext.update_bn(data, norm)
    assert not norm.skipped_batches.any()


def test_what_saw_nothing_is_left_alone_and_named(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = bnext.BatchNorm2d(5).double(), bnext.BatchNorm2d(5)

        def forward(self, x):
            return self.used(input=x)

    model, data = Model(), batches(5, 4, 6)
    before = state(model.unused)
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.update_bn(data, model)
    assert [r.getMessage() for r in caplog.records] == ["update_bn: left as they are, for they saw no values: unused"]
    assert_unchanged(model.unused, before)
    assert_statistics_of(model.used, torch.cat(data))


def test_a_model_without_batch_norms_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.update_bn(itertools.repeat(None), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    (record,) = caplog.records
    assert "no batch norm" in record.getMessage()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_model_is_not_compiled_for_it():
    graphs = []
    model = network()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    data = batches(3, 6, 6)
    found = inputs(model, data)
    compiled.eval()(data[0])
    before = len(graphs)
    bnext.update_bn(data, compiled)
    assert len(graphs) == before > 0
    for norm, x in zip(norms(model), found, strict=True):
        assert_statistics_of(norm, x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_part_frozen_by_torchscript_has_no_mode():
    norm, data = bnext.BatchNorm2d(5).double(), batches(5, 4, 6)
    script = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Dropout()).eval()))
    bnext.update_bn(data, nn.Sequential(norm, script))
    assert_statistics_of(norm, torch.cat(data))


def of_one_rank(rank, folder):
    torch.manual_seed(0)
    data, found = batches(5, 4, 6), {}
    for name, mine in {"some": data[rank::2], "none": [] if rank else data, "nobody": []}.items():
        norm = bnext.BatchNorm2d(5).double()
        try:
            bnext.update_bn(mine, norm)
            found[name] = norm.state_dict()
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_ranks_are_combined(tmp_path):
    in_two_ranks(of_one_rank, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    whole = torch.cat(batches(5, 4, 6))
    for name in ("some", "none"):
        norm = nn.BatchNorm2d(5).double()
        norm.load_state_dict(found[0][name])
        assert_statistics_of(norm, whole)
        assert norm.num_batches_tracked == len(SIZES)
        assert all(torch.equal(found[0][name][key], found[1][name][key]) for key in found[0][name])
    assert "got none" in found[0]["nobody"]
    assert "got none" in found[1]["nobody"]
