"""bnext.checkpoint_context: with it a checkpointed network is, to the last bit, one that is not (pytorch#96136)."""

import copy
import functools
import threading

import pytest
import torch
from helpers import DEVICE, assert_same_state, bnext_ops, by_mode, values
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnext

pytestmark = [pytest.mark.bnext("bnext.checkpoint_context"), pytest.mark.usefixtures("one_thread")]

once = functools.partial(checkpoint, use_reentrant=False, context_fn=bnext.checkpoint_context)
by_momentum = pytest.mark.parametrize("momentum", [0.1, None])


def network(momentum=0.1):
    """Ends with what saves for its backward: early stop leaves the recomputation from inside that layer."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), bnext.BatchNorm2d(5, momentum=momentum), nn.ReLU(), bnext.BatchNorm2d(5, momentum=momentum)
    )


def batch(n=4):
    return values((n, 3, 6, 5), torch.float32)


def calls(model):
    """A list that grows with every forward of the first batch norm, finished or not."""
    seen = []
    model[1].register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def step(forward, model, x):
    x = x.clone().requires_grad_()
    y = forward(model, x)
    model.zero_grad()
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_once(forward, model, recomputed=1, dtype=torch.float32):
    """forward(model, x) gives what model(x) does, gradients and buffers included, after so many recomputations."""
    twin = copy.deepcopy(model)
    seen = calls(model)
    for n in (4, 2, 3):
        x = batch(n)
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            found, expected = step(forward, model, x), step(nn.Module.__call__, twin, x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert len(seen) == 3 * (1 + recomputed)


@by_momentum
@by_mode
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_network(momentum, training, early_stop):
    assert_once(functools.partial(once, early_stop=early_stop), network(momentum).train(training))


def test_autocast():
    assert_once(once, network(), dtype=torch.bfloat16)


@by_momentum
def test_nested(momentum):
    def inner(model, x):
        return once(model[2:], once(model[:2], x))

    assert_once(lambda model, x: once(inner, model, x), network(momentum), recomputed=2)


def test_one_recomputation_within_another():
    """A gradient inside is computed by one of its own; the layer behind it still belongs to the outer one."""

    def penalised(model, x):
        hidden = once(model[:2], x)
        (grad,) = torch.autograd.grad(hidden.sin().sum(), x, create_graph=True)
        return model[3](hidden) + grad.square().mean()

    model = network()
    twin = copy.deepcopy(model)
    seen = calls(model)
    x = batch()
    step(functools.partial(once, penalised), model, x)
    twin(x)
    assert len(seen) > 2
    assert model[1].num_batches_tracked == 1
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    assert model[3].num_batches_tracked == 1


def test_a_graph_that_is_retained():
    model, x = network(), batch().requires_grad_()
    twin, seen = copy.deepcopy(model), calls(model)
    y, z = once(model, x), twin(x)
    for retain in (True, False):
        found, expected = (torch.autograd.grad(t.square().sum(), x, retain_graph=retain) for t in (y, z))
        assert torch.equal(*found, *expected)
    assert len(seen) == 3
    assert_same_state(model, twin)


def test_the_function():
    buffers = torch.zeros(5), torch.ones(5)

    def function(x):
        return bnext.batch_norm(x, *buffers, training=True).sin()

    x = values((4, 5, 6), torch.float32).requires_grad_()
    function(x)
    expected = [b.clone() for b in buffers]
    buffers[0].zero_()
    buffers[1].fill_(1)
    with bnext_ops("train", "train", "backward"):
        once(function, x).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))


def test_a_backward_in_another_thread():
    """As on CUDA, whose backward has a thread of torch's."""
    model, x = network(), batch()
    twin, seen = copy.deepcopy(model), calls(model)
    other = threading.Thread(target=once(model, x.requires_grad_()).sum().backward)
    other.start()
    other.join()
    twin(x)
    assert len(seen) == 2
    assert_same_state(model, twin)


def test_other_threads_count_meanwhile():
    """While this thread computes again, a batch of another thread is one of its own."""
    model, other, x = network(), network(), batch()

    def function(x):
        worker = threading.Thread(target=other, args=(x.detach(),))
        worker.start()
        worker.join()
        return model(x)

    once(function, x.requires_grad_()).sum().backward()
    assert model[1].num_batches_tracked == 1
    assert other[1].num_batches_tracked == 2


def test_a_recomputation_that_fails_is_over():
    model, x = network(), batch().requires_grad_()
    seen = []

    def function(x):
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return model(x)

    y = once(function, x)
    with pytest.raises(RuntimeError, match="out of memory"):
        y.sum().backward()
    model(x)
    assert model[1].num_batches_tracked == 2


def test_reentrant_is_refused():
    with pytest.raises(ValueError, match="context_fn"):
        checkpoint(network(), batch(), use_reentrant=True, context_fn=bnext.checkpoint_context)
