"""From autograd to the ops by csrc/autograd.cpp or by Python: the same ops and bits, and whoever watches sees them."""

import itertools

import pytest
import torch
from helpers import bnext_ops, by_layout, by_mode, channel_arguments, layers, values
from torch._dynamo import compiled_autograd
from torch.overrides import TorchFunctionMode

import bnext

pytestmark = pytest.mark.bnext("bnext's own two routes")

SHAPE = (4, 5, 3, 6)
CPP, PYTHON = bnext.ops.batch_norm, bnext.BatchNormFunction.apply


class Watching(TorchFunctionMode):
    """Notes bnext's ops that Python calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "bnext":
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def arguments(given, wanted, layout="contiguous", shape=(5,)):
    """Those of BatchNormFunction.apply before training: parameters that are not given are None."""
    a = channel_arguments(5, torch.float32)
    leaves = [values(SHAPE, torch.float32, layout), a["weight"].reshape(shape), a["bias"].reshape(shape)]
    leaves = [
        t.detach().clone().requires_grad_(name in wanted) if name in given else None
        for name, t in zip(("input", "weight", "bias"), leaves, strict=True)
    ]
    return *leaves, a["running_mean"].clone(), a["running_var"].clone(), torch.tensor(3)


SUBSETS = [s for n in range(4) for s in itertools.combinations(("input", "weight", "bias"), n)]


@by_mode
@by_layout
@pytest.mark.parametrize("shape", [(5,), (1, 5)], ids=str)
@pytest.mark.parametrize("given", [s for s in SUBSETS if "input" in s], ids=str)
def test_same_bits(given, shape, layout, training):
    for wanted in (s for s in SUBSETS if s and set(s) <= set(given)):
        found = []
        state = torch.get_rng_state()
        for route in (CPP, PYTHON):
            torch.set_rng_state(state)
            a = arguments(given, wanted, layout, shape)
            dy = values(SHAPE, torch.float32, layout)
            with bnext_ops("train" if training else "eval", "backward") as recorder:
                y = route(*a, training, None, 1e-5)
                y.backward(dy)
            assert list(recorder.bnext[-1][1][-1]) == [name in wanted for name in ("input", "weight", "bias")]
            found.append([y.detach(), *a[3:], *[t if t is None else t.grad for t in a[:3]]])
        for cpp, python in zip(*found, strict=True):
            assert (cpp is None) == (python is None)
            assert cpp is None or (torch.equal(cpp, python) and cpp.stride() == python.stride())


@by_mode
@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("route", [CPP, PYTHON], ids=["C++", "Python"])
def test_what_was_saved_may_not_change(route, name, training):
    a = arguments(("input", "weight", "bias"), ("input",))
    y = route(*a, training, 0.1, 1e-5)
    with torch.no_grad():
        a[0 if name == "input" else 1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wanted", [("input",), ("bias",), ("input", "bias")], ids=str)
@pytest.mark.parametrize("given", [("input", "bias"), ("input", "weight", "bias")], ids=str)
def test_only_what_a_call_of_autograd_asks_for_is_computed(given, wanted):
    names = ("input", "weight", "bias")
    a = arguments(given, names)
    y = CPP(*a, True, 0.1, 1e-5)
    with bnext_ops("backward") as recorder:
        torch.autograd.grad(y.sum(), [a[names.index(n)] for n in wanted])
    assert list(recorder.bnext[0][1][-1]) == [n in wanted for n in names]


@by_mode
def test_a_mode_sees_the_op(training):
    layer, _ = layers()
    layer.train(training)
    x = values(SHAPE, torch.float32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Watching() as mode:
            layer(x)
        op = torch.ops.bnext.batch_norm_train if training else torch.ops.bnext.batch_norm_eval
        assert mode.seen == [op.default]


@by_mode
def test_compiled_autograd(training):
    layer, _ = layers()
    x = values(SHAPE, torch.float32).requires_grad_()
    leaves = [x, layer.weight, layer.bias]
    dy = torch.randn(SHAPE)
    expected = torch.autograd.grad(layer.train(training)(x), leaves, dy)
    y = layer(x)
    with compiled_autograd._enable(torch.compile(backend="eager")), bnext_ops("backward"):
        y.backward(dy)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


class NoGradient(torch.autograd.Function):
    """Whose backward has none to give."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@by_mode
@pytest.mark.parametrize("route", [CPP, PYTHON, torch.nn.functional.batch_norm], ids=["C++", "Python", "torch"])
def test_where_no_gradient_comes_in_none_goes_out(route, training):
    """A parameter without one is not touched by an optimizer, one of zeros is."""
    a = arguments(("input", "weight", "bias"), ("input", "weight", "bias"))
    if route is torch.nn.functional.batch_norm:
        y = route(a[0], a[3], a[4], a[1], a[2], training)
    else:
        y = route(*a, training, 0.1, 1e-5)
    NoGradient.apply(y).sum().backward()
    assert [t.grad for t in a[:3]] == [None] * 3
