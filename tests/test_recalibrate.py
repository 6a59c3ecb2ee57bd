"""update_bn: statistics of all batches as if they were one, and nothing else changed, whatever goes wrong."""

import copy
import itertools
import logging

import pytest
import torch
from helpers import HALF, WIDE, by_layout, float_id, modules, norms, values
from ranks import in_two_ranks
from torch import distributed, nn
from torch.optim import swa_utils
from torch.testing import assert_close

import bnext
from bnext import recalibrate

pytestmark = [pytest.mark.bnext("bnext.update_bn"), pytest.mark.usefixtures("one_thread")]

SIZES = (3, 1, 8)
CLASSES = {"bnext": bnext.BatchNorm2d, "torch": nn.BatchNorm2d, "SyncBatchNorm": nn.SyncBatchNorm}


def batches(*shape, dtype=torch.float64, layout="contiguous", sizes=SIZES):
    return [values((n, *shape), dtype, layout) for n in sizes]


def network(norm=bnext.BatchNorm2d, **keywords):
    """In use: statistics, modes and momentum of its own, the second norm called twice."""
    twice = norm(4, momentum=None, **keywords)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm(4, **keywords), nn.ReLU(), nn.Conv2d(4, 4, 1), twice, nn.Sequential(twice)
    ).double()
    for x in batches(3, 6, 6, sizes=(2, 2)):
        model(x)
    model[2].eval()
    return model


def state(model):
    """Everything that the pass could change and must not, statistics included."""
    own = ("training", "momentum", "track_running_stats")
    return [
        *[(t, t.clone()) for t in model.state_dict(keep_vars=True).values()],
        *[(m, [getattr(m, name, None) for name in own], len(m._forward_hooks)) for m in model.modules()],
    ]


def assert_unchanged(model, before):
    for (a, *was), (b, *now) in zip(before, state(model), strict=True):
        assert a is b
        assert torch.equal(was[0], now[0]) if isinstance(a, torch.Tensor) else was == now


def inputs(model, data):
    """All that each norm is given, normalising by the batch, as one batch."""
    twin, seen = copy.deepcopy(model).eval(), {}
    for norm in norms(twin):
        norm.training, norm.track_running_stats = True, False
        norm.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].detach()))
    for x in data:
        twin(x)
    return [torch.cat(seen[norm]) for norm in norms(twin)]


def assert_statistics_of(norm, x):
    """Of x [N, C, *], to the rounding of the buffers."""
    x, tolerance = x.double(), {"rtol": max(1e-13, torch.finfo(norm.running_var.dtype).eps), "atol": 1e-14}
    dims = [d for d in range(x.dim()) if d != 1]
    assert_close(norm.running_mean.double(), x.mean(dims), **tolerance)
    assert_close(norm.running_var.double(), x.var(dims), **tolerance)


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


def broken_loader():
    yield values((2, 3, 6, 6), torch.float64)
    raise OSError("the disk is gone")


def broken_model(model, batch):
    model(batch)
    raise OSError("the model is gone")


good = values((2, 3, 6, 6), torch.float64)
ERRORS = {
    "loader": ((broken_loader,), {}, OSError, "the disk is gone"),
    "forward": (([good],), {"forward": broken_model}, OSError, "the model is gone"),
    "no batches": (([],), {}, ValueError, "at least one batch, got none"),
    "num_batches": (([good],), {"num_batches": 0}, ValueError, "num_batches to be at least 1, or None for all, got 0"),
    "one value": (([good[:1, :, :3, :3]],), {}, ValueError, "inf or NaN in running_var of 1"),
    "NaN": (([good, good * torch.nan],), {}, ValueError, "inf or NaN in running_mean of 1"),
    "channels": (([good, good[:, :2]],), {}, RuntimeError, "channels"),
    "a dict": (([{"image": good}],), {}, TypeError, "got dict: say how to call the model by forward="),
}


@pytest.mark.parametrize("name", ERRORS)
def test_after_an_error_all_is_as_before(name):
    (loader,), keywords, error, match = ERRORS[name]
    model = network()
    before = state(model)
    with pytest.raises(error, match=match):
        bnext.update_bn(loader() if callable(loader) else loader, model, **keywords)
    assert_unchanged(model, before)


def test_a_variance_beyond_the_buffers_is_an_error():
    norm = nn.BatchNorm2d(5).half()
    with pytest.raises(ValueError, match=r"inf or NaN in running_var of \(root\)"):
        bnext.update_bn([1000 * x for x in batches(5, 4, 6, dtype=torch.float16)], norm)


def test_a_lazy_layer_is_an_error():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="lazy layers: 0"):
        bnext.update_bn(batches(5, 4, 6), model)
    model.double()(batches(5, 4, 6)[0])
    bnext.update_bn(batches(5, 4, 6), model)


@pytest.mark.parametrize("num_batches", [1, 2, 3, 9])
def test_no_batch_is_drawn_in_vain(num_batches):
    norm, data, drawn = bnext.BatchNorm2d(5).double(), batches(5, 4, 6), []
    bnext.update_bn((drawn.append(x) or x for x in data), norm, num_batches=num_batches)
    assert len(drawn) == min(num_batches, len(data))
    assert_statistics_of(norm, torch.cat(drawn))


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x, 1), lambda x: [x, x], lambda x: {"image": x}])
def test_kinds_of_batches(kind):
    norm, data = bnext.BatchNorm2d(5).double(), batches(5, 4, 6)
    forward = (lambda model, batch: model(batch["image"])) if isinstance(kind(0), dict) else None
    bnext.update_bn(map(kind, data), norm, forward=forward)
    assert_statistics_of(norm, torch.cat(data))


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x, {"labels": [x, 1]})])
def test_tensors_of_a_batch_are_moved(kind, caplog):
    seen = []
    bnext.update_bn([kind(good)], network(), "meta", forward=lambda model, batch: seen.append(batch))
    leaves = [t for t in torch.utils._pytree.tree_leaves(seen) if isinstance(t, torch.Tensor)]
    assert leaves
    assert all(t.is_meta for t in leaves)


def test_an_empty_batch_is_a_batch_of_nothing():
    norm, data = bnext.BatchNorm2d(5).double(), batches(5, 4, 6, sizes=(3, 0, 2))
    bnext.update_bn(data, norm)
    assert_statistics_of(norm, torch.cat(data))
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("name", ["bnext", "torch"])
@pytest.mark.parametrize("call", [lambda norm, x: norm(x), lambda norm, x: norm(input=x)], ids=["", "keyword"])
def test_a_batch_of_one_value_per_channel(name, call):
    """As a loader's last may be, which torch refuses in training: normalised by itself it is 0, and it counts."""
    data, outputs = batches(5), []
    norm = nn.BatchNorm1d(5).double()
    nn.init.uniform_(norm.bias)
    if name == "bnext":
        bnext.convert_batchnorm(norm)
    norm.register_forward_hook(lambda *hooked: outputs.append(hooked[-1]))
    bnext.update_bn(data, norm, forward=call)
    assert_statistics_of(norm, torch.cat(data))
    assert norm.num_batches_tracked == len(SIZES)
    assert [y.shape for y in outputs] == [x.shape for x in data]
    assert_close(outputs[1][0], norm.bias.detach())


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
        bnext.update_bn(itertools.repeat(good), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
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
