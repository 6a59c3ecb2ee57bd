"""Derivatives to second order, and the rules of the graph: what was saved, when it may change."""

import pytest
import subject
import torch
import torch.nn.functional as F
from helpers import bnext_ops, by_layout, by_mode, channel_arguments, in_layout, layers, values
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from bnext import reference

SHAPES = [(3, 2), (2, 3, 4), (3, 2, 2, 3), (2, 2, 2, 1, 3)]
NO_WEIGHT = pytest.mark.bnext("torch's own double backward fails where there is a bias and no weight")
GIVEN = [("weight", "bias"), ("weight",), pytest.param(("bias",), marks=NO_WEIGHT), ()]


def problem(shape, given=("weight", "bias"), layout="contiguous"):
    """Float64 leaves (input and those given) and a function of them for each batch norm and mode."""
    a = channel_arguments(shape[1], torch.float64)
    leaves = [values(shape, torch.float64, layout), *[a[name] for name in given]]

    def function(batch_norm, training):
        def f(input, *parameters):
            named = dict(zip(given, parameters, strict=True))
            buffers = a["running_mean"].clone(), a["running_var"].clone()
            return batch_norm(input, *buffers, training=training, **named)

        return f

    return [t.detach().requires_grad_() for t in leaves], function


@by_mode
@by_layout
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_to_second_order(shape, given, layout, training):
    leaves, function = problem(shape, given, layout)
    f = function(subject.batch_norm, training)
    assert gradcheck(f, leaves)
    grad_output = in_layout(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    assert gradgradcheck(f, leaves, grad_output)


@by_mode
@pytest.mark.parametrize("wanted", range(3))
def test_gradgradcheck_of_one_leaf(wanted, training):
    leaves, function = problem((3, 2, 4))
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(leaves)]
    assert gradgradcheck(function(subject.batch_norm, training), leaves)


@by_mode
def test_second_derivative_is_torchs(training):
    leaves, function = problem((4, 5, 3, 6))
    found = []
    for batch_norm in (subject.batch_norm, F.batch_norm):
        y = function(batch_norm, training)(*leaves)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_double_backward_calls_the_kernel_for_the_first_derivative():
    leaves, function = problem((4, 5, 3, 6))
    with bnext_ops("train", "backward"):
        y = function(subject.batch_norm, True)(*leaves)
        torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


@by_mode
def test_upstream_that_depends_on_the_input(training):
    leaves, function = problem((4, 5, 6))
    found = []
    for batch_norm in (subject.batch_norm, F.batch_norm):
        input = leaves[0]
        y = function(batch_norm, training)(*leaves)
        upstream = input.sin() * leaves[1].reshape(1, -1, 1)
        (first,) = torch.autograd.grad(y, input, upstream, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaves[:2]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.bnext("torch's own third derivative is another")
def test_third_derivative_is_that_of_the_formula():
    """Of torch's own it is not: its second derivative takes the saved mean and invstd for constants."""

    def formula(x, *_, training):
        mean, _, invstd = reference.batch_stats(x, 1e-5)
        return reference.normalize(x, None, None, mean, invstd)

    x = values((3, 2, 4), torch.float64).requires_grad_()
    direction = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    found = []
    for batch_norm in (subject.batch_norm, formula):
        g = batch_norm(x, None, None, training=True).pow(4).sum()
        for d in direction:
            g = (torch.autograd.grad(g, x, create_graph=True)[0] * d).sum()
        found.append(torch.autograd.grad(g, x)[0])
    torch.testing.assert_close(*found)


@by_mode
@pytest.mark.parametrize("name", ["input", "weight"])
def test_what_was_saved_may_not_change(name, training):
    for layer in layers():
        x = values((4, 5, 3, 6), torch.float32)
        y = layer.train(training)(x.requires_grad_())
        with torch.no_grad():
            (x if name == "input" else layer.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.bnext("torch saves the running buffers")
def test_what_was_not_saved_may_change():
    layer, _ = layers()
    x = values((4, 5, 3, 6), torch.float32).requires_grad_()
    g = torch.randn(4, 5, 3, 6)
    (expected,) = torch.autograd.grad(layer(x), x, g)
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
        layer.running_mean.add_(1)
        layer.running_var.mul_(2)
        y.mul_(0)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


def test_output_may_be_overwritten_in_place():
    layer, _ = layers()
    x = values((4, 5, 3, 6), torch.float32).requires_grad_()
    g = torch.randn(4, 5, 3, 6)
    (expected,) = torch.autograd.grad(layer(x).relu(), x, g)
    assert torch.equal(torch.autograd.grad(layer(x).relu_(), x, g)[0], expected)


@by_mode
def test_called_twice_before_one_backward(training):
    ours, theirs = (m.train(training) for m in layers())
    a, b, g = (values((4, 5, 3, 6), torch.float32) for _ in range(3))
    found = []
    for layer in (ours, theirs):
        x, z = a.clone().requires_grad_(), b.clone().requires_grad_()
        ((layer(x) + 2 * layer(z)) * g).sum().backward()
        found.append((x.grad, z.grad, layer.weight.grad, layer.bias.grad))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.bnext("torch saves the running buffers, and refuses")
def test_eval_backward_keeps_the_statistics_of_its_forward():
    layer, _ = layers()
    x, g = values((4, 5, 3, 6), torch.float32).requires_grad_(), torch.randn(4, 5, 3, 6)
    leaves = [x, layer.weight, layer.bias]
    layer.eval()
    expected = torch.autograd.grad(layer(x), leaves, g)
    y = layer(x)
    layer.train()(torch.randn(4, 5, 3, 6) * 100 + 7)  # moves the running buffers
    for before, after in zip(expected, torch.autograd.grad(y, leaves, g), strict=True):
        assert torch.equal(before, after)
    moved = torch.autograd.grad(layer.eval()(x), leaves, g)
    assert not torch.allclose(moved[0], expected[0])


@by_mode
def test_retain_graph(training):
    layer, _ = layers()
    x, g = values((4, 5, 3, 6), torch.float32).requires_grad_(), torch.randn(4, 5, 3, 6)
    y = layer.train(training)(x)
    with bnext_ops("backward", "backward"):
        first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(y, x, g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, g)


@by_mode
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_buffers_are_not_differentiable(name, training):
    for batch_norm in (subject.batch_norm, F.batch_norm):
        a = channel_arguments(5, torch.float32)
        before = {k: v.clone() for k, v in a.items()}
        a[name].requires_grad_()
        a["weight"].requires_grad_()
        with pytest.raises(RuntimeError, match=f"not differentiable with respect to argument '{name}'"):
            batch_norm(torch.randn(4, 5, 3), training=training, **a)
        assert all(torch.equal(a[k], before[k]) for k in a)


@by_mode
def test_inference_mode(training):
    ours, theirs = (m.train(training) for m in layers())
    x = values((4, 5, 3, 6), torch.float32)
    with torch.inference_mode(), bnext_ops("train" if training else "eval"):
        y = ours(x)
    assert y.is_inference()
    torch.testing.assert_close(y, theirs(x).detach(), rtol=1e-5, atol=1e-5)


@by_layout
def test_checkpointing_recomputes_the_same(layout):
    layer, _ = layers(track_running_stats=False)
    x = values((4, 5, 3, 6), torch.float32, layout).requires_grad_()
    g = torch.randn(4, 5, 3, 6)
    (expected,) = torch.autograd.grad(layer(x), x, g)
    with bnext_ops("train", "train", "backward"):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(found, expected)


@by_mode
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, when forward-mode AD starts
def test_tangent_that_comes_through_the_gradient(training):
    """Only what follows the layer has a tangent: the backward must carry it on."""
    leaves, function = problem((4, 5, 6))
    w, v = torch.randn(2, 4, 5, 6, dtype=torch.float64).unbind()
    found = []
    for batch_norm in (subject.batch_norm, F.batch_norm):
        for create_graph in (False, True):
            y = function(batch_norm, training)(*leaves)
            with forward_ad.dual_level():
                loss = (y * forward_ad.make_dual(w, v)).square().sum()
                grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
                found.append([forward_ad.unpack_dual(g).tangent for g in grads])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@by_mode
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of a custom op, as torch says
def test_derivative_of_a_jacobian(vectorize, training):
    leaves, function = problem((3, 2, 2))
    found = []
    for batch_norm in (subject.batch_norm, F.batch_norm):
        f = function(batch_norm, training)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, f=f: f(x, *leaves[1:]).flatten()[:3] * x.flatten()[:3],
            leaves[0],
            create_graph=True,
            vectorize=vectorize,
        )
        found.append((jacobian, *torch.autograd.grad(jacobian.square().sum(), leaves[1])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_double_backward_of_nothing(shape):
    for layer in layers(5, 1):
        x = torch.empty(shape, requires_grad=True)
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        assert (layer.weight.grad == 0).all()
        assert x.grad.shape == shape
