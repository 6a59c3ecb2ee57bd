"""Life around a layer: checkpoints, copies, ties and hooks of a model."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from helpers import assert_same_state, bnext_ops, layers, modules, values
from torch import nn
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 5, 3, 6)


def network(norm, names=("stem", "trunk")):
    """Two blocks in float64; their batch norms share a weight, the second block uses its one twice."""
    first, twice = norm(5), norm(5, momentum=None)
    twice.weight = first.weight
    blocks = [nn.Conv2d(3, 5, 3, padding=1), first], [twice, nn.ReLU(), nn.Conv2d(5, 5, 1), twice]
    named = zip(names, (nn.Sequential(*block) for block in blocks), strict=True)
    return nn.Sequential(OrderedDict(named)).double()


def batch():
    return values((4, 3, 6, 5), torch.float64)


def networks(**keywords):
    """The subject's and torch's in the same state, which is not the initial one."""
    ours, theirs = (network(cls, **keywords) for cls in modules())
    for _ in range(3):
        theirs(batch())
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(model, x):
    """A backward of model on x; its output."""
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return y.detach()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}


def assert_same_life(ours, theirs):
    """Outputs, gradients and states agree, of one batch in training and one in evaluation."""
    for training in (True, False):
        x = batch()
        found = []
        for model in (ours, theirs):
            model.train(training).zero_grad()
            found.append((step(model, x), list(gradients(model).values())))
        assert_close(*found)
    assert_same_state(ours, theirs)


def outcome(action):
    try:
        return str(action())
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("metadata", [True, False], ids=["version 2", "no metadata"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
def test_checkpoint_of_a_model_from_before_the_counters(strict, metadata):
    ours, theirs = networks()
    state = theirs.state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    for model in (ours, theirs):
        step(model, torch.ones(4, 3, 6, 5).double())
    found = [outcome(lambda m=m: m.load_state_dict(state if metadata else dict(state), strict)) for m in (ours, theirs)]
    assert found[0] == found[1]
    assert ("trunk.3.num_batches_tracked" in found[0]) == metadata
    assert (ours[0][1].num_batches_tracked, ours[1][0].num_batches_tracked) == (4, 8)
    assert_same_life(ours, theirs)


@pytest.mark.parametrize("source", [0, 1], ids=["from ours", "from torch's"])
def test_strict_loading_of_a_model(source):
    saved, other = networks()[source], networks()[1 - source]
    with pytest.raises(AssertionError):
        assert_same_state(saved, other)
    assert not other.load_state_dict(saved.state_dict(), strict=True).missing_keys
    assert_same_life(other, saved)


def test_loading_into_renamed_modules():
    renamed, source = networks(names=("backbone", "neck"))[0], networks()[1]
    renames = {"stem": "backbone", "trunk": "neck"}
    state = {key.replace((name := key.split(".")[0]), renames[name]): t for key, t in source.state_dict().items()}
    renamed.load_state_dict(state, strict=True)
    for ours, theirs in zip(renamed.state_dict().values(), source.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    x = batch()
    assert_close(step(renamed, x), step(source, x))


def test_loading_by_assignment():
    """Onto the meta device, where nothing can be copied to: the layer computes with the checkpoint's tensors."""
    source = networks()[1]
    found = []
    for cls in modules():
        state = copy.deepcopy(source.state_dict())
        with torch.device("meta"):
            model = network(cls)
        model.load_state_dict(state, assign=True)
        for key, tensor in model.state_dict().items():
            assert tensor.data_ptr() == state[key].data_ptr(), key
        found.append((model, state))
    assert_same_life(*(model for model, _ in found))
    assert found[0][1]["trunk.0.num_batches_tracked"] == 8
    assert_close(*(dict(state) for _, state in found))


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_file], ids=["deepcopy", "pickle", "file"]
)
def test_copies_of_a_model_in_mid_training(duplicate):
    models, x = networks(), batch()
    for model in models:
        step(model, x)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    twins = [duplicate(model) for model in models]
    for twin in twins:
        assert twin[0][1].weight is twin[1][0].weight
        assert twin[1][0] is twin[1][3]
    assert type(twins[0][0][1]) is modules()[0]
    assert_close(*map(gradients, twins))  # a deepcopy takes them along
    assert_same_life(*twins)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())  # the twins share nothing


def test_state_of_a_model_through_a_weights_only_file():
    ours, theirs = networks()
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    target = network(modules()[0])
    target.load_state_dict(torch.load(file, weights_only=True))
    assert_same_life(target, theirs)


def test_ties_and_a_layer_in_two_places():
    ours, theirs = networks()
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 7
    x = batch()
    with bnext_ops(*["train"] * 3, *["backward"] * 3):
        y = step(ours, x)
    assert_close(y, step(theirs, x))
    assert_close(gradients(ours), gradients(theirs))
    assert ours[1][0].num_batches_tracked == 8
    with torch.no_grad():
        ours[0][1].weight.mul_(2)
    assert torch.equal(ours.state_dict()["trunk.3.weight"], 2 * theirs.state_dict()["stem.1.weight"])


def watch(layer, x, log):
    """Hooks of every kind on layer and leaf x, each noting that it ran, most with an effect; their handles."""

    def note(*event, returns=None):
        log.append(event)
        return returns

    def strip(module, state, prefix, *_):
        note("load pre", prefix, state.pop(f"{prefix}extra"))

    return [
        layer.register_forward_pre_hook(
            lambda m, a, k: note("pre", len(a), sorted(k), returns=((k["input"] * 2,), {})), with_kwargs=True
        ),
        layer.register_forward_hook(
            lambda m, a, k, y: note("forward", len(a), sorted(k), returns=y + 1), with_kwargs=True
        ),
        layer.register_forward_hook(lambda m, a, y: note("always", y is None), always_call=True),
        layer.register_full_backward_pre_hook(lambda m, g: note("backward pre", len(g), returns=(g[0] * 3,))),
        layer.register_full_backward_hook(lambda m, gi, go: note("backward", len(gi), returns=(gi[0] * 5,))),
        layer.weight.register_hook(lambda g: note("weight", tuple(g.shape), returns=g * 7)),
        layer.bias.register_post_accumulate_grad_hook(lambda p: note("bias", tuple(p.grad.shape))),
        x.register_hook(lambda g: note("input", tuple(g.shape), returns=g * 11)),
        layer.register_state_dict_pre_hook(lambda m, prefix, keep: note("state pre", prefix, keep)),
        layer.register_state_dict_post_hook(
            lambda m, state, prefix, _: state.update({f"{prefix}extra": note("state")})
        ),
        layer.register_load_state_dict_pre_hook(strip),
        layer.register_load_state_dict_post_hook(lambda m, keys: note("load", *map(tuple, keys))),
    ]


def test_hooks_of_every_kind():
    """What they return counts, they run in torch's order, and once removed they are gone."""
    input, dy, found = values(SHAPE, torch.float64), torch.randn(SHAPE, dtype=torch.float64), []
    for layer in layers(dtype=torch.float64):
        x, log, results = input.clone().requires_grad_(), [], []
        handles = watch(layer, x, log)
        for _ in range(2):
            y = layer(input=x)
            y.register_hook(lambda g, log=log: log.append("output") or g * 13)
            y.backward(dy)
            results += [y.detach(), x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
            state = nn.ModuleDict({"layer": layer}).state_dict()
            if handles:
                nn.ModuleDict({"layer": layer}).load_state_dict(state)
                with pytest.raises(ValueError, match="expected 4D input"):
                    layer(input=x[0])
            for handle in handles:
                handle.remove()
            handles = []
        found.append((log, results, list(state)))
    assert_close(found[0][1], found[1][1])
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    kinds = [event if isinstance(event, str) else event[0] for event in found[0][0]]
    assert len(set(kinds)) == 13
    assert kinds.count("weight") == 1
    assert kinds[-1] == "output"  # the second round's only one
