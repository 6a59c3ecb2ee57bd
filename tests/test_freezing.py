"""What freezes a batch norm and what does not: the failures that tutorials show, step by step beside torch's layers."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import bring_into_use, by_layout, in_layout, layers, modules, norms, values
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from bnext import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (6, 5, 3, 4)
DIMS = (0, 2, 3)


def network(norm):
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 3), norm(4))
    return nn.Sequential(backbone, nn.Flatten(), nn.Linear(64, 3)).double()


def batches(n):
    return [values((6, 3, 8, 8), torch.float64) for _ in range(n)]


def networks():
    """The subject's and torch's in the same state, after two batches and with parameters of their own."""
    ours, theirs = (network(cls) for cls in modules())
    bring_into_use(ours, theirs, batches(2))
    return ours, theirs


def state(module):
    return copy.deepcopy(dict(module.state_dict()))


def moved(module, before):
    """The keys whose tensors have other bits than before."""
    return {key for key, tensor in module.state_dict().items() if not torch.equal(tensor, before[key])}


def predict(model, x):
    """In evaluation, by a copy: model keeps its modes."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def norms_in_eval(model):
    for norm in norms(model):
        norm.eval()
    return model


def with_norms(model, **attributes):
    for norm in norms(model):
        vars(norm).update(attributes)
    return model


# What is done to a model before it runs: whether its predictions then drift, and whether its batches are counted.
HABITS = {
    "training": (lambda m: m.train(), True, True),
    "requires_grad=False": (lambda m: m.requires_grad_(False).train(), True, True),
    "norms in eval": (lambda m: norms_in_eval(m.train()), False, False),
    "train() after norms in eval": (lambda m: norms_in_eval(m).train(), True, True),
    "momentum=0": (lambda m: with_norms(m.train(), momentum=0.0), False, True),
    "track_running_stats=False": (lambda m: with_norms(m.train(), track_running_stats=False), False, False),
    "teacher in training": (lambda m: torch.no_grad()(m.train().forward), True, True),
    "teacher in eval": (lambda m: torch.no_grad()(m.eval().forward), False, False),
    "eval with gradients": (lambda m: m.eval(), False, False),
}


@pytest.mark.parametrize("habit", HABITS)
def test_predictions_of_a_fixed_batch_from_epoch_to_epoch(habit):
    """Nothing but running the models: parameters keep their bits, only statistics can move."""
    prepare, drifts, counts = HABITS[habit]
    models, (fixed,), predictions = networks(), batches(1), []
    before, counters = state(models[0]), [norm.num_batches_tracked.item() for norm in norms(models[0])]
    for epoch in range(4):
        assert [n.num_batches_tracked.item() for n in norms(models[0])] == [c + 2 * epoch * counts for c in counters]
        mine, theirs = (predict(model, fixed) for model in models)
        assert_close(mine, theirs)
        predictions.append(mine)
        for x in batches(2):
            assert_close(*(prepare(model)(x) for model in models))
        assert_close(*map(state, models))
    assert {key.rpartition(".")[2] for key in moved(models[0], before)} == {
        *["running_mean", "running_var"] * drifts,
        *["num_batches_tracked"] * counts,
    }
    if drifts:
        assert all((b - a).abs().max() > 1e-3 for a, b in pairwise(predictions))
    else:
        assert all(torch.equal(a, b) for a, b in pairwise(predictions))


def test_momentum_zero_still_normalises_by_the_batch():
    for layer in layers(momentum=0.0, dtype=torch.float64):
        x, before = values(SHAPE, torch.float64), state(layer)
        y = layer(x)
        assert moved(layer, before) == {"num_batches_tracked"}
        mean, _, invstd = reference.batch_stats(x, layer.eps)
        assert_close(y, reference.normalize(x, layer.weight, layer.bias, mean, invstd))
        assert (layer.eval()(x) - y).abs().max() > 0.1


@by_layout
def test_gradients_through_a_frozen_layer_are_those_of_a_constant_affine_map(layout):
    x, dy = (in_layout(values(SHAPE, torch.float64), layout) for _ in range(2))
    found = []
    for layer in layers(dtype=torch.float64):
        slope = layer.weight / (layer.running_var + layer.eps).sqrt()
        normalised = (x - layer.running_mean[:, None, None]) / (layer.running_var[:, None, None] + layer.eps).sqrt()
        expected = [dy * slope[:, None, None], (dy * normalised).sum(DIMS), dy.sum(DIMS)]
        for training in (False, True):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = layer.train(training)(leaf)
            grads = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
            found.append(grads)
            if training:  # the batch's mean takes the constant out of the gradient
                assert_close(grads[0].sum(DIMS), torch.zeros(5).double())
                assert grads[0].sub(expected[0]).abs().max() > 0.1
            else:
                assert_close(list(grads), expected)
    assert_close(found[:2], found[2:])


def constant(norm):
    """The affine map that a frozen layer is, as a convolution of one by one."""
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    conv = nn.Conv2d(norm.num_features, norm.num_features, 1).double()
    conv.weight.data = slope.detach().diag()[:, :, None, None]
    conv.bias.data = (norm.bias - norm.running_mean * slope).detach()
    return conv.requires_grad_(False)


def fine_tune(model, x, **keywords):
    """Three steps with every parameter in the optimizer, the norms in eval."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **keywords)
    for _ in range(3):
        optimizer.zero_grad()
        norms_in_eval(model.train())(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["plain", "weight decay"])
def test_fine_tuning_the_head_on_a_frozen_backbone(weight_decay):
    models, (x,) = networks(), batches(1)
    before = state(models[0])
    for model in models:
        model[0].requires_grad_(False)
        fine_tune(model, x, weight_decay=weight_decay)
    assert moved(models[0], before) == {"2.weight", "2.bias"}
    assert_close(*map(state, models))


def test_a_backbone_below_a_frozen_norm_learns_as_below_its_affine_map():
    models, (x,) = networks(), batches(1)
    twin = copy.deepcopy(models[0])
    twin[0][1], twin[0][4] = constant(twin[0][1]), constant(twin[0][4])
    before = state(models[0])
    for model in (*models, twin):
        for norm in norms(model):
            norm.requires_grad_(False)
        fine_tune(model, x, weight_decay=0.1)
    assert moved(models[0], before) == {"0.0.weight", "0.3.weight", "0.3.bias", "2.weight", "2.bias"}
    assert_close(*map(state, models))
    for key in moved(models[0], before):
        assert_close(models[0].get_parameter(key), twin.get_parameter(key))


@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
def test_weight_decay_reaches_frozen_parameters_through_a_gradient_left_behind(set_to_none):
    models, (x,) = networks(), batches(1)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        norms_in_eval(model.train())(x).square().mean().backward()
        for norm in norms(model):
            norm.requires_grad_(False)
        optimizer.zero_grad(set_to_none=set_to_none)
        before = state(model)
        model(x).square().mean().backward()
        optimizer.step()
        assert ("0.1.weight" in moved(model, before)) == (not set_to_none)
        assert not moved(model, before) & {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert_close(*map(state, models))


@by_layout
def test_only_in_training_does_an_image_depend_on_its_batch(layout):
    x = in_layout(values(SHAPE, torch.float32), layout)
    for layer in layers():
        for image in range(SHAPE[0]):
            alone = x[image : image + 1]
            others = torch.cat([alone, 9 * x.flip(0)])
            found = [layer.eval()(batch)[i] for batch, i in ((x, image), (alone, 0), (others, 0))]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
            assert (layer.train()(x)[image] - layer(others)[0]).abs().max() > 0.1
            assert (layer(x)[image] - layer(alone)[0]).abs().max() > 1e-2


def test_running_statistics_approach_those_of_a_batch_seen_again_and_again():
    """By momentum at each step, until evaluation gives what training gives."""
    x = values((50, *SHAPE[1:]), torch.float64)
    for layer in layers(momentum=0.1, dtype=torch.float64):
        mean, var = x.mean(DIMS), x.var(DIMS)
        start = layer.running_mean - mean, layer.running_var - var
        for n in range(1, 301):
            y = layer(x)
            if n in (1, 7, 30):
                assert_close((layer.running_mean - mean, layer.running_var - var), tuple(0.9**n * d for d in start))
        count = x.numel() // 5
        z = layer.eval()(x)
        assert (z - y).abs().max() > 1e-6  # of the unbiased variance
        layer.running_var.mul_((count - 1) / count)
        assert_close(layer(x), y)


def test_a_pass_without_momentum_leaves_the_average_of_its_batches():
    """torch's update_bn, as after averaging weights: earlier statistics are forgotten, momentum comes back."""
    models, data = networks(), batches(4)
    for model in models:
        model.train()(100 * data[0])
        update_bn(data, model.eval())
        assert not model.training
        assert [(n.momentum, n.num_batches_tracked.item()) for n in norms(model)] == [(0.1, 4)] * 2
    with torch.no_grad():
        features = [models[1][0][0](x) for x in data]
    first = models[0][0][1]
    assert_close(first.running_mean, torch.stack([f.mean(DIMS) for f in features]).mean(0))
    assert_close(first.running_var, torch.stack([f.var(DIMS) for f in features]).mean(0))
    assert_close(*map(state, models))
