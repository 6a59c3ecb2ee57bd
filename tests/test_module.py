"""BatchNorm1d/2d/3d are torch's modules in everything but the forward."""

import copy
import inspect
import pickle

import pytest
import subject
import torch
from helpers import DEVICE, assert_same_state, bnext_ops, layers, modules, values
from torch import nn

DIMS = (1, 2, 3)
SHAPES = {1: (4, 5), 2: (4, 5, 3, 3), 3: (4, 5, 2, 3, 3)}
by_dim = pytest.mark.parametrize("dim", DIMS)


@by_dim
def test_is_torchs_class(dim):
    ours, theirs = modules(dim)
    assert issubclass(ours, theirs)
    assert isinstance(ours(3), nn.modules.batchnorm._BatchNorm)
    signatures = (inspect.signature(cls).parameters.values() for cls in (ours, theirs))
    mine, torchs = ([(p.name, p.default, p.kind) for p in parameters] for parameters in signatures)
    if subject.is_bnext:
        mine.remove(("skip_nonfinite", False, inspect.Parameter.KEYWORD_ONLY))
    assert mine == torchs
    assert ours._version == theirs._version
    assert ours.__name__ == theirs.__name__


@by_dim
@pytest.mark.parametrize(
    "keywords",
    [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-3, "momentum": None}, {"bias": False}],
    ids=str,
)
def test_same_repr_state_and_result(dim, keywords):
    if "bias" in keywords and "bias" not in inspect.signature(modules(dim)[1]).parameters:
        pytest.skip("this torch has no bias keyword")
    ours, theirs = layers(5, dim, **keywords)
    assert repr(ours) == repr(theirs)
    assert_same_state(ours, theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = values(SHAPES[dim], torch.float32)
    with bnext_ops("train"):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    assert_same_state(ours, theirs)
    assert set(vars(ours)) == set(vars(theirs))


def test_three_dimensional_input_of_1d():
    ours, theirs = layers(5, 1)
    x = values((4, 5, 7), torch.float32)
    with bnext_ops("train"):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))


@by_dim
def test_state_dict_loads_both_ways(dim):
    ours, theirs = layers(5, dim)
    assert list(ours.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for source, target in ((ours, modules(dim)[1](5)), (theirs, modules(dim)[0](5))):
        source(values(SHAPES[dim], torch.float32))
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(target, source)


def test_strict_load_refuses_what_torch_refuses():
    ours, theirs = layers()
    state = theirs.state_dict()
    state["extra"] = state.pop("weight")
    messages = []
    for layer in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            layer.load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_checkpoint_from_before_the_counter():
    ours, _ = layers()
    ours.num_batches_tracked.fill_(3)
    state = nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    ours.load_state_dict(state, strict=True)
    assert (ours.running_var == 1).all()
    state._metadata[""]["version"] = 2
    state.pop("num_batches_tracked", None)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(state, strict=True)


def copies(layer, tmp_path):
    """layer through every way of copying it."""
    torch.save(layer, tmp_path / "module.pt")
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(tmp_path / "module.pt", weights_only=False),
    }


@pytest.mark.parametrize("training", [True, False])
def test_copies(training, tmp_path):
    layer, theirs = (m.train(training) for m in layers(momentum=None, eps=1e-2))
    x = values(SHAPES[2], torch.float32)
    for name, twin in copies(layer, tmp_path).items():
        assert type(twin) is subject.BatchNorm2d, name
        assert twin.training == training, name
        assert (twin.eps, twin.momentum) == (1e-2, None), name
        assert twin.weight is not layer.weight, name
        assert_same_state(twin, layer)
        with bnext_ops("train" if training else "eval"):
            y = twin(x)
        torch.testing.assert_close(y, copy.deepcopy(theirs)(x))


def test_a_torch_pickle_takes_our_class():
    twin = pickle.loads(pickle.dumps(layers()[1]))
    twin.__class__ = subject.BatchNorm2d
    with bnext_ops("train"):
        twin(values(SHAPES[2], torch.float32))


def test_hooks_run():
    layer, _ = layers()
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, out: out * 2)
    layer.register_full_backward_hook(lambda m, gi, go: seen.append(("back", len(gi), len(go))))
    x = values(SHAPES[2], torch.float32).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert seen == ["pre", ("back", 1, 1)]
    torch.testing.assert_close(y, 2 * layer.forward(x))


def test_tied_parameters():
    a, b = subject.BatchNorm2d(5), subject.BatchNorm2d(5)
    b.weight = a.weight
    x = values(SHAPES[2], torch.float32)
    g = torch.randn_like(x)
    a(b(x)).backward(g)
    c, d = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    d.weight = c.weight
    c(d(x)).backward(g)
    torch.testing.assert_close(a.weight.grad, c.weight.grad, rtol=1e-4, atol=1e-4)
    assert b.weight.grad is a.weight.grad


@by_dim
@pytest.mark.parametrize("rank", range(7))
def test_rank_errors(dim, rank):
    x = torch.randn([2, 5, 2, 2, 2, 2][:rank])
    outcomes = []
    for layer in layers(5, dim):
        try:
            outcomes.append(tuple(layer(x).shape))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_device_and_dtype_keywords():
    for dtype in (torch.float64, torch.float32):
        layer = subject.BatchNorm2d(5, device=DEVICE, dtype=dtype)
        assert layer.weight.dtype == layer.bias.dtype == layer.running_var.dtype == dtype
        assert layer.num_batches_tracked.dtype == torch.int64
        assert layer(values(SHAPES[2], dtype)).dtype == dtype
    meta = subject.BatchNorm2d(5, device="meta")
    assert meta.weight.is_meta
    y = meta(torch.empty(SHAPES[2], device="meta"))
    assert y.is_meta
    assert y.shape == SHAPES[2]


def test_skipped_initialisation():
    """As model zoos build what they load a checkpoint into."""
    ours, theirs = (nn.utils.skip_init(cls, 5) for cls in modules())
    assert type(ours) is modules()[0]
    for layer in (ours, theirs):
        assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    state, x = layers()[1].state_dict(), values(SHAPES[2], torch.float32)
    for layer in (ours, theirs):
        layer.load_state_dict(state)
    torch.testing.assert_close(ours(x), theirs(x))
    assert_same_state(ours, theirs)


def test_moving_between_dtypes():
    ours, theirs = (m.double() for m in layers())
    x = values(SHAPES[2], torch.float64)
    with bnext_ops("train"):
        y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    assert ours.num_batches_tracked.dtype == torch.int64


def test_usual_initialisation():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), subject.BatchNorm2d(5))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.fill_(0.5)
            nn.init.constant_(m.bias, 2.0)
    y = model(torch.randn(4, 3, 6, 6))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.full((5,), 2.0))
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.full((5,), 0.5), rtol=1e-3, atol=0)


def test_fusing_with_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), layers()[0]).eval()
    x = torch.randn(2, 3, 6, 6)
    fused = nn.utils.fuse_conv_bn_eval(*model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_sync_batch_norm_conversion():
    layer, _ = layers()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))[0]
    assert type(converted) is nn.SyncBatchNorm
    assert converted.weight is layer.weight
    assert converted.running_mean is layer.running_mean


def test_functional_has_torchs_signature():
    ours, theirs = inspect.signature(subject.batch_norm), inspect.signature(nn.functional.batch_norm)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
