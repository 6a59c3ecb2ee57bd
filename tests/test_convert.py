"""convert_batchnorm and revert_batchnorm change classes in place and nothing else."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, bnext_ops, torch_ops
from torch import nn
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import bnext

pytestmark = pytest.mark.bnext("bnext.convert_batchnorm")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.ModuleDict({"norm": nn.BatchNorm2d(4, affine=False)})

    def forward(self, x):
        return x + self.second["norm"](self.first(x))


def network():
    return nn.Sequential(
        Residual(),
        nn.BatchNorm2d(4, momentum=None, eps=1e-3),
        nn.Flatten(2),
        nn.BatchNorm1d(4),
        nn.Unflatten(2, (2, 2, 9)),
        nn.BatchNorm3d(4, track_running_stats=False),
    )


def batch():
    return torch.randn(3, 4, 6, 6)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def test_classes_there_and_back():
    model = network()
    before = [type(m) for m in model.modules()]
    assert bnext.convert_batchnorm(model) is model
    assert [type(m) for m in norms(model)] == [
        bnext.BatchNorm2d,
        bnext.BatchNorm2d,
        bnext.BatchNorm2d,
        bnext.BatchNorm1d,
        bnext.BatchNorm3d,
    ]
    assert bnext.revert_batchnorm(model) is model
    assert [type(m) for m in model.modules()] == before


def test_outputs_and_gradients():
    model, twin = network(), None
    twin = copy.deepcopy(model)
    bnext.convert_batchnorm(model)
    x = batch()
    with bnext_ops(*["train"] * 5, *["backward"] * 5):
        y = model(x)
        y.square().sum().backward()
    z = twin(x)
    z.square().sum().backward()
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-2, msg=lambda m, name=name: f"{name}: {m}")
    assert_same_state(model, twin)


def test_round_trip_gives_torchs_own_bits():
    model = network()
    x, twin = batch(), copy.deepcopy(model)
    bnext.revert_batchnorm(bnext.convert_batchnorm(model))
    with torch_ops():
        assert torch.equal(model(x), twin(x))


def test_same_objects():
    model = network()
    objects = [id(m) for m in model.modules()]
    tensors = [id(t) for t in model.state_dict(keep_vars=True).values()]
    contents = [{k: v for k, v in vars(m).items() if k != "training"} for m in norms(model)]
    for change in (bnext.convert_batchnorm, bnext.revert_batchnorm):
        change(model)
        assert [id(m) for m in model.modules()] == objects
        assert [id(t) for t in model.state_dict(keep_vars=True).values()] == tensors
        assert [{k: v for k, v in vars(m).items() if k != "training"} for m in norms(model)] == contents


def test_hooks_and_modes_stay():
    model = network()
    seen = []
    layers = norms(model)
    layers[0].register_forward_hook(lambda *_: seen.append(0))
    layers[1].eval()
    layers[2].weight.requires_grad_(False)
    for change in (bnext.convert_batchnorm, bnext.revert_batchnorm):
        change(model)
        model(batch())
        assert [m.training for m in layers] == [True, False, True, True, True]
        assert not layers[2].weight.requires_grad
    assert seen == [0, 0]
    assert layers[1].num_batches_tracked == 0


def test_optimizer_stays_valid():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnext.convert_batchnorm(model)
    before = [p.detach().clone() for p in model.parameters()]
    output = model(batch())
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    for p, old in zip(norms(model)[0].parameters(), [before[2], before[3]], strict=True):
        assert not torch.equal(p, old)


@pytest.mark.parametrize("theirs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_root_module(theirs):
    layer = theirs(4)
    assert bnext.convert_batchnorm(layer) is layer
    assert type(layer) is getattr(bnext, theirs.__name__)
    assert bnext.revert_batchnorm(layer) is layer
    assert type(layer) is theirs


def test_layer_used_twice_and_idempotence():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    for _ in range(2):
        bnext.convert_batchnorm(model)
        assert model[0] is model[2] is shared
        assert type(shared) is bnext.BatchNorm2d
    for _ in range(2):
        bnext.revert_batchnorm(model)
        assert type(shared) is nn.BatchNorm2d


def test_an_ours_built_layer_reverts():
    layer = bnext.BatchNorm2d(4)
    bnext.revert_batchnorm(layer)
    assert type(layer) is nn.BatchNorm2d
    with torch_ops():
        layer(batch())


class Own(nn.BatchNorm2d):
    pass


class OwnOfOurs(bnext.BatchNorm2d):
    pass


OTHERS = {
    "subclass": lambda: Own(4),
    "subclass of ours": lambda: OwnOfOurs(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "lazy": nn.LazyBatchNorm2d,
    "quantized": lambda: torch.ao.nn.quantized.BatchNorm2d(4),
    "parametrized": lambda: register_parametrization(nn.BatchNorm2d(4), "weight", nn.Softplus()),
    "parametrized ours": lambda: register_parametrization(bnext.BatchNorm2d(4), "weight", nn.Softplus()),
    "scripted": lambda: torch.jit.script(nn.BatchNorm2d(4)),
    "traced": lambda: torch.jit.trace(nn.BatchNorm2d(4).eval(), (batch(),)),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("change", [bnext.convert_batchnorm, bnext.revert_batchnorm])
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone_and_named(name, change, caplog):
    other = OTHERS[name]()
    model = nn.ModuleDict({"block": nn.Sequential(nn.ReLU(), other), "plain": nn.BatchNorm2d(4)})
    kind = type(other)
    with caplog.at_level(logging.WARNING, logger="bnext"):
        change(model)
    assert type(other) is kind
    if name == "InstanceNorm":
        return  # no batch norm: whether it is named does not matter
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.name == "bnext"
    assert "block.1" in record.getMessage()
    assert kind.__name__ in record.getMessage()
    assert "plain" not in record.getMessage()


@pytest.mark.parametrize(
    ("change", "kind"),
    [(bnext.convert_batchnorm, nn.BatchNorm2d), (bnext.revert_batchnorm, bnext.BatchNorm2d)],
    ids=["convert", "revert"],
)
def test_a_forward_of_its_own_is_left_alone_and_named(change, kind, caplog):
    """As accelerate's hooks set it on a layer, where no change of class reaches it: the layer would run the old one."""
    model = nn.Sequential(kind(4))
    model[0].forward = model[0].forward
    with caplog.at_level(logging.WARNING, logger="bnext"):
        change(model)
    assert type(model[0]) is kind
    assert f"0: {kind.__module__}.BatchNorm2d" in caplog.text
    model(batch())


def test_no_warning_where_nothing_is_left(caplog):
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.revert_batchnorm(bnext.convert_batchnorm(network()))
    assert not caplog.records


def test_instance_norm_is_not_reported_as_a_batch_norm(caplog):
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.convert_batchnorm(nn.Sequential(nn.InstanceNorm2d(4)))
    assert not caplog.records


def test_lazy_layer_converts_once_it_knows_its_channels():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(batch())
    bnext.convert_batchnorm(model)
    assert type(model[0]) is bnext.BatchNorm2d
    with bnext_ops("train"):
        model(batch())


RENAMED = {
    "weight_norm": (weight_norm, {"weight_g", "weight_v", "bias"}),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), {"weight_orig", "bias"}),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", RENAMED)
def test_layers_whose_weight_is_computed_before_each_forward(how):
    change, names = RENAMED[how]
    layer, x = change(nn.BatchNorm2d(4)).eval(), batch()
    expected = layer(x)
    bnext.convert_batchnorm(layer)
    assert type(layer) is bnext.BatchNorm2d
    with bnext_ops("eval", "backward"):
        y = layer(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == names


def test_ties_and_averages_stay():
    """One weight of two layers, and torch's average of the model, which pairs parameters by their order."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    average = torch.optim.swa_utils.AveragedModel(model)
    for change in (bnext.convert_batchnorm, bnext.revert_batchnorm):
        change(model)
        assert model[1].weight is model[0].weight
        nn.init.uniform_(model[0].weight)
        average.n_averaged.zero_()
        average.update_parameters(model)
        assert_same_state(average.module, model)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)])

    def forward(self, x):
        return self.norms[0](x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
def test_a_compiled_model_is_compiled_again(in_place):
    torch._dynamo.reset()
    model, graphs = Wrapped(), []

    def backend(graph, inputs):
        graphs.append(any(node.target is F.batch_norm for node in graph.graph.nodes))
        return graph.forward

    if in_place:
        model.compile(fullgraph=True, backend=backend)
    compiled = model if in_place else torch.compile(model, fullgraph=True, backend=backend)
    x = batch()
    expected = compiled(x)
    torch.testing.assert_close(bnext.convert_batchnorm(compiled)(x), expected)
    assert graphs == [True, False]
    assert torch.equal(bnext.revert_batchnorm(compiled)(x), expected)
