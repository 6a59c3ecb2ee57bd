"""BatchNormAct1d/2d/3d: bnext's layers, with a residual and an activation; and what torch's tools make of them."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE, assert_same_state, layers, torch_ops, values
from test_act import by_act, by_residual, composed
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import bnext
from bnext import activation, reference

pytestmark = [
    pytest.mark.bnext("BatchNormAct is bnext's own"),
    pytest.mark.usefixtures("one_thread"),
]

SHAPE = (4, 5, 3, 6)


class Composed(nn.Module):
    """torch's batch norm, addition and activation."""

    def __init__(self, norm, act):
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x, residual=None):
        z = self.norm(x)
        return reference.activate(z if residual is None else z + residual, *activation.parse(self.act))


def pair(act="relu", dim=2, **keywords):
    """A layer of bnext's, and torch's composition in the same state."""
    norm = layers(5, dim, **keywords)[1]
    layer = getattr(bnext, f"BatchNormAct{dim}d")(5, **keywords, act=act)
    layer.load_state_dict(norm.state_dict(), strict=True)
    return layer, Composed(norm, act)


def tensors(adds=True, shape=SHAPE):
    return [values(shape, torch.float32).requires_grad_() for _ in range(1 + adds)]


@by_residual
@by_act
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_trains_and_evaluates_as_torchs_composition(dim, act, adds):
    ours, theirs = pair(act, dim)
    shape = (4, 5, 6, 3, 2)[: 2 + dim]
    for training in (True, True, False):
        inputs, dy, found = tensors(adds, shape), torch.randn(shape), []
        for layer in (ours, theirs):
            layer.train(training).zero_grad()
            y = layer(*inputs)
            found.append((y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        assert_same_state(ours, theirs.norm)
    theirs.norm.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("keywords", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str)
def test_arguments_of_batch_norm(keywords):
    ours, theirs = pair(**keywords)
    for training in (True, False):
        x, residual = tensors()
        torch.testing.assert_close(ours.train(training)(x, residual), theirs.train(training)(x, residual))
        assert_same_state(ours, theirs.norm)


def test_what_a_layer_is():
    layer = bnext.BatchNormAct2d(5, act=("leaky_relu", 0.1))
    assert isinstance(layer, bnext.BatchNorm2d)
    assert repr(layer) == repr(nn.BatchNorm2d(5)).replace("BatchNorm2d", "BatchNormAct2d")[:-1] + (
        ", act=('leaky_relu', 0.1))"
    )
    x = tensors(False)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    del layer.act  # as of a pickle from before there were others
    assert torch.equal(layer.eval()(x), layer(x).relu())


def test_frozen_and_guarded():
    layer, _ = pair()
    x, residual = tensors()
    bnext.freeze_batchnorm(layer)
    expected = composed(
        x, layer.running_mean, layer.running_var, residual=residual, weight=layer.weight, bias=layer.bias
    )
    torch.testing.assert_close(layer.train()(x, residual), expected)
    guarded = bnext.BatchNormAct2d(5, skip_nonfinite=True)
    with torch.no_grad():
        x[0, 1, 0, 0] = torch.nan
    guarded(x, residual)
    assert guarded.skipped_batches.tolist() == [0, 1, 0, 0, 0]
    assert guarded.running_mean.isfinite().all()


def test_recalibrated():
    layer, _ = pair()
    x = torch.randn(64, 5, 3, 6)
    bnext.update_bn([x], layer)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("tanh", "expected act to be 'identity', .*, got 'tanh'"),
        ("leaky_relu", "expected act to be .*, got 'leaky_relu'"),
        (("relu", 0.1), "expected act to be .*, got "),
        (None, "expected act to be .*, got None"),
        (("leaky_relu", "0.1"), "expected the slope of leaky_relu in act to be a finite number, got '0.1'"),
        (("leaky_relu", float("nan")), "expected the slope of leaky_relu in act to be a finite number, got nan"),
    ],
    ids=str,
)
def test_activations_that_are_none(act, message):
    with pytest.raises(ValueError, match=message):
        bnext.BatchNormAct2d(5, act=act)
    with pytest.raises(ValueError, match=message):
        bnext.batch_norm_act(torch.randn(SHAPE), None, None, training=True, act=act)
    if isinstance(act, str) and act != "leaky_relu":
        with pytest.raises(ValueError, match="expected act to be one of"):
            bnext.ops.batch_norm_act_train(*[torch.randn(SHAPE), *[None] * 5], 0.1, 1e-5, None, act, 0.0, False)


@pytest.mark.parametrize("device", [DEVICE, "meta"], ids=str)
@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.randn(4, 5, 1, 1), "residual to have the shape of input"),
        (torch.randn(5, 3, 6), "residual to have the shape of input"),
        (torch.randn(SHAPE, dtype=torch.float64), "residual to be .* on .* as input, got"),
        (torch.randn(SHAPE).to(memory_format=torch.channels_last), "residual to have the memory format of input"),
    ],
    ids=["broadcast", "dimensions", "dtype", "memory format"],
)
def test_residuals_that_are_not_like_input(residual, message, act, device):
    """The batch is counted, as torch counts one that it refuses; nothing else moves."""
    layer = bnext.BatchNormAct2d(5, act=act, device=device)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"expected {message}"):
        layer(torch.randn(SHAPE).to(device), residual.to(device))
    if device == DEVICE:
        after = layer.state_dict()
        assert all(torch.equal(after[k], before[k] + (k == "num_batches_tracked")) for k in before)


def test_a_residual_that_is_not_dense():
    layer, other = pair()
    x, residual = torch.randn(4, 5, 3, 12)[..., ::2], torch.randn(8, 5, 3, 6)[::2]
    torch.testing.assert_close(layer(x, residual), other(x, residual))


@pytest.mark.parametrize("act", ["relu", ("leaky_relu", 0.1), "silu"], ids=str)
@by_residual
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_traced_and_exported(act, adds):
    layer, _ = pair(act)
    inputs = [t.detach() for t in tensors(adds)]
    expected = layer.eval()(*inputs)
    with torch_ops():
        torch.testing.assert_close(torch.jit.script(layer)(*inputs), expected)
        torch.testing.assert_close(torch.jit.trace(layer, inputs, check_trace=False)(*inputs), expected)
        torch.testing.assert_close(torch.export.export(layer, tuple(inputs)).module()(*inputs), expected)
        if adds:
            with pytest.raises(torch.jit.Error, match="residual to have the shape of input"):
                torch.jit.script(layer)(inputs[0], inputs[1][:1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_function_scripted():
    x, residual = (t.detach() for t in tensors())
    buffers = torch.zeros(5), torch.ones(5)
    function = torch.jit.script(bnext.batch_norm_act)
    for act in ("relu", ("leaky_relu", 0.1)):
        expected = bnext.batch_norm_act(x, *buffers, residual=residual, act=act)
        torch.testing.assert_close(function(x, *buffers, residual=residual, act=act), expected)


def test_a_leaf_of_fx():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bnext.BatchNormAct2d(5)

        def forward(self, x, y):
            return self.norm(self.norm(x), y)

    x, residual = tensors()
    traced = fx.symbolic_trace(Block().eval())
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["norm", "norm"]
    assert torch.equal(traced(x, residual), traced.norm(traced.norm(x), residual))


def test_compiled_layers_know_their_eps():
    """What refuses other tools in its eps does not stand in a compiler's way."""
    torch._dynamo.reset()
    layer = bnext.BatchNormAct2d(5, eps=0.5)
    x = tensors(False)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    assert layer.eps == vars(layer)["eps"] == 0.5


def test_tools_that_would_drop_the_activation_fail():
    model = nn.Sequential(nn.Conv2d(5, 5, 1), bnext.BatchNormAct2d(5))
    with pytest.raises(TypeError, match="convert_sync_batchnorm would drop the activation of BatchNormAct2d"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(TypeError, match="fuse_conv_bn_eval would drop the activation of BatchNormAct2d"):
        fuse_conv_bn_eval(*model.eval())
    with pytest.raises(ValueError, match=r"revert_batchnorm: expected no layers with an activation, .*, got 1"):
        bnext.revert_batchnorm(model)


def test_converting_leaves_them_without_a_warning(caplog):
    model = nn.Sequential(nn.BatchNorm2d(5), bnext.BatchNormAct2d(5))
    bnext.convert_batchnorm(model)
    assert not caplog.records
    assert [type(m) for m in model] == [bnext.BatchNorm2d, bnext.BatchNormAct2d]
