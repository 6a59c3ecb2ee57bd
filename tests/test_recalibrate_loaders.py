"""update_bn: what it draws and takes, and what an error leaves."""

import sys

import pytest
import torch
from helpers import values
from recalibration import SIZES, assert_statistics_of, assert_unchanged, batches, network, state
from torch import nn
from torch.testing import assert_close

import bnext

pytestmark = [pytest.mark.bnext("bnext.update_bn"), pytest.mark.usefixtures("one_thread")]


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


@pytest.mark.parametrize(
    ("loader", "num_batches", "shown"), [(list, None, "100%"), (list, 2, "100%"), (iter, None, "")]
)
def test_progress(loader, num_batches, shown, capsys):
    pytest.importorskip("rich")
    data, norm, expected = batches(5, 4, 6), *(bnext.BatchNorm2d(5, dtype=torch.float64) for _ in range(2))
    bnext.update_bn(loader(data), norm, num_batches=num_batches, progress=True)
    bar = capsys.readouterr()
    assert bar.out == ""
    assert "update_bn" in bar.err
    assert shown in bar.err
    bnext.update_bn(data, expected, num_batches=num_batches)
    assert capsys.readouterr().err == ""
    assert torch.equal(norm.running_var, expected.running_var)


def test_progress_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    norm = bnext.BatchNorm2d(5)
    with pytest.raises(ImportError, match="pip install rich"):
        bnext.update_bn(batches(5, 4, 6), norm, progress=True)
    assert norm.num_batches_tracked == 0


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
