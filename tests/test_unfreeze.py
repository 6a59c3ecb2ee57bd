"""unfreeze_batchnorm gives back what freeze_batchnorm took, and revert_batchnorm does not do so by accident."""

import copy
import io
import pickle

import pytest
import torch
from helpers import norms
from test_freeze import AFFINE, BUFFERS, assert_frozen, batch, layer, network, switched_off
from test_freezing import moved, state
from torch import nn

import bnext

pytestmark = [pytest.mark.bnext("bnext.unfreeze_batchnorm"), pytest.mark.usefixtures("one_thread")]


def test_unfreezing_restores_what_each_parameter_was():
    model = network()
    model[0][1].weight.requires_grad_(False)
    model[0][0].requires_grad_(False)
    before = switched_off(model)
    for calls in ([{}], [{"stats": False}, {"affine": False}], [{"affine": False}, {}], [{}, {}, {"stats": False}]):
        for keywords in calls:
            bnext.freeze_batchnorm(model, **keywords)
        assert switched_off(model) == before | AFFINE
        assert [norm.frozen_stats for norm in norms(model)] == [True, True]
        assert bnext.unfreeze_batchnorm(model) is model
        assert switched_off(model) == before
    bnext.unfreeze_batchnorm(model.requires_grad_(False))  # of what is not frozen
    assert switched_off(model) == {name for name, _ in model.named_parameters()}


def saved(norm):
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda norm: pickle.loads(pickle.dumps(norm)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_frozen_and_thaw_alone(how):
    norm = bnext.freeze_batchnorm(layer())
    found = COPIES[how](norm)
    assert_frozen(found)
    bnext.unfreeze_batchnorm(found)
    assert not switched_off(found)
    assert switched_off(norm) == {"weight", "bias"}
    assert_frozen(norm)
    before = state(found)
    found(batch())
    assert moved(found, before) == {"running_mean", "running_var", "num_batches_tracked"}


def test_unfreezing_one_of_several():
    model = bnext.freeze_batchnorm(network())
    bnext.unfreeze_batchnorm(model[0][3])
    assert switched_off(model) == {"0.1.weight", "0.1.bias"}
    before = state(model)
    model(batch())
    assert moved(model, before) == {key for key in BUFFERS if key.startswith("0.3")}


TIES = {
    "at once": (lambda m: [m], lambda m: [m]),
    "one by one": (lambda m: [m[0], m[1]], lambda m: [m[0], m[1]]),
    "the other way round": (lambda m: [m[0], m[1]], lambda m: [m[1], m[0]]),
    "frozen one by one": (lambda m: [m[0], m[1]], lambda m: [m]),
    "only one thaws": (lambda m: [m], lambda m: [m[1]]),
}


@pytest.mark.parametrize("tie", TIES)
def test_tied_parameters(tie):
    model = nn.Sequential(layer(), layer())
    model[1].weight = model[0].weight
    freeze, unfreeze = TIES[tie]
    for part in freeze(model):
        bnext.freeze_batchnorm(part)
    assert switched_off(model) == {"0.weight", "0.bias", "1.bias"}
    for part in unfreeze(model):
        bnext.unfreeze_batchnorm(part)
    assert model[0].weight.requires_grad
    assert model[1].bias.requires_grad


def test_parameters_replaced_meanwhile():
    norm = bnext.freeze_batchnorm(layer())
    norm.load_state_dict(layer().state_dict(), assign=True)  # new Parameters, which take over requires_grad
    assert switched_off(norm) == {"weight", "bias"}
    norm.weight = nn.Parameter(torch.ones(3))
    bnext.freeze_batchnorm(norm)  # the new one too
    assert switched_off(norm) == {"weight", "bias"}
    norm.bias = None
    bnext.unfreeze_batchnorm(norm)
    assert not switched_off(norm)


@pytest.mark.parametrize("keywords", [{}, {"stats": False}, {"affine": False}], ids=["both", "affine", "stats"])
def test_reverting_would_thaw_and_is_refused(keywords):
    model = bnext.convert_batchnorm(network())
    bnext.freeze_batchnorm(model[0][3], **keywords)
    with pytest.raises(ValueError, match=r"frozen.*got 0\.3; unfreeze_batchnorm"):
        bnext.revert_batchnorm(model)
    assert [type(model[0][i]) for i in (1, 3)] == [bnext.BatchNorm2d] * 2
    bnext.revert_batchnorm(bnext.unfreeze_batchnorm(model))
    assert [type(model[0][i]) for i in (1, 3)] == [nn.BatchNorm2d] * 2


def test_older_pickles_are_not_frozen():
    """They know nothing of it; neither do layers that were torch's."""
    norm = bnext.convert_batchnorm(nn.BatchNorm2d(3))
    assert norm.frozen_stats is False
    assert norm.frozen_affine == ()
    assert not {"frozen_stats", "frozen_affine"} & set(vars(norm))
