"""bn_stats: each figure of each layer, in models and in checkpoints as people keep them."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import bnext
from bnext.inspect import Range

pytestmark = pytest.mark.bnext("bnext's inspection")


def layer(channels=4, **keywords):
    """With figures to be told apart."""
    made = bnext.BatchNorm2d(channels, **keywords)
    with torch.no_grad():
        for i, tensor in enumerate(t for t in made.state_dict().values() if t.dim()):
            tensor.copy_(torch.arange(1, channels + 1) * 10.0**i)
    return made


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))


def test_figures_of_a_module():
    made = layer()
    made.num_batches_tracked.fill_(7)
    (row,) = bnext.bn_stats(made)
    assert (row.name, row.kind, row.channels, row.frozen) == ("", "bnext.BatchNorm2d", 4, False)
    assert (row.weight, row.bias) == (Range(1, 2.5, 4, 0), Range(10, 25, 40, 0))
    assert (row.running_mean, row.running_var) == (Range(100, 250, 400, 0), Range(1000, 2500, 4000, 0))
    assert (row.dead, row.exploding, row.nonfinite, row.num_batches_tracked) == (0, 0, 0, 7)
    made.frozen_stats = True
    assert bnext.bn_stats(made)[0].frozen


def test_a_state_dict_tells_the_same_but_kind_and_frozen():
    of_module, of_dict = bnext.bn_stats(model()), bnext.bn_stats(model().state_dict())
    assert [row.name for row in of_module] == [row.name for row in of_dict] == ["1", "2.0"]
    assert [row.kind for row in of_module] == ["bnext.BatchNorm2d", "torch.BatchNorm2d"]
    for theirs, ours in zip(of_module, of_dict, strict=True):
        assert (ours.kind, ours.frozen) == (None, None)
        assert {**vars(theirs), "kind": None, "frozen": None} == vars(ours)


def test_channels_that_are_dead_or_exploding():
    made = layer(6)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1, -2e-3, -9e-4, 0, 1, 1]))
        made.running_var.copy_(torch.tensor([1, 2e-7, 1, 0, 9e-8, 2e6]))
    (row,) = bnext.bn_stats(made)
    assert (row.dead, row.exploding) == (3, 1)  # a channel that is dead for two reasons counts once


def test_what_is_not_finite_is_counted_and_left_out():
    made = layer()
    with torch.no_grad():
        made.running_mean[:2] = torch.tensor([math.nan, math.inf])
        made.bias.fill_(-math.inf)
    (row,) = bnext.bn_stats(made)
    assert row.running_mean == Range(300, 350, 400, 2)
    assert row.nonfinite == 6
    assert row.bias.nonfinite == 4
    assert all(math.isnan(figure) for figure in (row.bias.min, row.bias.mean, row.bias.max))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_what_a_layer_has_not_is_none(affine, tracks):
    (row,) = bnext.bn_stats(nn.BatchNorm2d(3, affine=affine, track_running_stats=tracks))
    assert row.channels == 3
    assert (row.weight is None, row.bias is None) == (not affine, not affine)
    assert (row.running_mean is None, row.num_batches_tracked is None) == (not tracks, not tracks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    (row,) = bnext.bn_stats(layer().to(dtype))
    assert row.weight == Range(1, 2.5, 4, 0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, when torch.compile is loaded
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.DataParallel(torch.compile(m)),
        checkpoint_wrapper,
    ],
)
def test_names_are_those_of_the_model_in_its_wrappers(wrap):
    wrapped = wrap(model())
    assert [row.name for row in bnext.bn_stats(wrapped)] == ["1", "2.0"]
    assert [row.name for row in bnext.bn_stats(wrapped.state_dict())] == ["1", "2.0"]
    (alone,) = bnext.bn_stats(wrap(layer()).state_dict())
    assert alone.name == ""


def test_names_are_those_of_the_model_inside_of_fsdp():
    wrapped = {f"_fsdp_wrapped_module.1._fsdp_wrapped_module.{key}": t for key, t in layer().state_dict().items()}
    assert bnext.bn_stats(wrapped)[0].name == "1"


def test_state_dicts_inside_of_checkpoints():
    nested = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}, "model": model().state_dict()}
    assert [row.name for row in bnext.bn_stats(nested)] == ["1", "2.0"]
    nested["ema"] = {"module": model()}
    assert [row.name for row in bnext.bn_stats(nested)] == ["model.1", "model.2.0", "ema.module.1", "ema.module.2.0"]


def test_other_layers_with_running_statistics():
    found = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d(3), nn.SyncBatchNorm(3), nn.LayerNorm(3)
    )
    assert [row.kind for row in bnext.bn_stats(found)] == ["torch.InstanceNorm2d", "torch.SyncBatchNorm"]
    assert [row.name for row in bnext.bn_stats(found.state_dict())] == ["0", "2"]
    others = ("running_mean", "warm_running_mean", "warm_running_var")
    assert bnext.bn_stats(dict.fromkeys(others, torch.ones(2))) == []


def test_what_is_no_tensor_is_not_there():
    """bias=True beside statistics, in a class of somebody's own; a counter that is an int, as other formats have it."""

    class Normalizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = 1.0, True
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

    (row,) = bnext.bn_stats(Normalizer())
    assert (row.channels, row.weight, row.bias) == (3, None, None)
    (row,) = bnext.bn_stats({**layer().state_dict(), "num_batches_tracked": 5})
    assert row.num_batches_tracked is None


def test_nothing_is_changed():
    made = model().double()  # which is read without a copy
    before = {name: t.clone() for name, t in made.state_dict().items()}
    bnext.bn_stats(made)
    assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())


@pytest.mark.parametrize("without", [nn.BatchNorm2d(3, device="meta"), nn.LazyBatchNorm2d()], ids=["meta", "lazy"])
def test_tensors_without_values_are_refused(without):
    found = nn.Sequential(nn.Identity(), without)
    for source in (found, found.state_dict()):
        with pytest.raises(ValueError, match=r"expected running_mean of 1 to have values, got a lazy or meta tensor"):
            bnext.bn_stats(source)


def test_tensors_of_different_sizes_are_refused():
    torn = {**nn.Sequential(layer()).state_dict(), "0.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"expected the tensors of 0 to be of one size, got \[3, 4\]"):
        bnext.bn_stats(torn)


def test_what_is_neither_is_refused():
    with pytest.raises(TypeError, match=r"expected an nn.Module or a state dict, got str"):
        bnext.bn_stats("resnet50.pth")
