"""What a layer's graph saves: when it may change, where it may live, when it is freed and when it is computed again."""

import copy

import pytest
import torch
from helpers import DEVICE, assert_same_state, by_mode, layers, values
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 5, 3, 6)
by_saved = pytest.mark.parametrize("name", ["input", "weight"])


def both(function):
    """function(layer, x) of the subject's layer and of torch's."""
    x = values(SHAPE, torch.float64)
    return [function(layer, x.clone().requires_grad_()) for layer in layers(dtype=torch.float64)]


def seeds(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)


def gradients(y, layer, x):
    return torch.autograd.grad(y, [x, layer.weight, layer.bias], seeds(y))


@by_mode
@by_saved
def test_a_view_of_what_was_saved_may_not_change(name, training):
    def change(layer, x):
        y = layer.train(training)(x)
        with torch.no_grad():
            (x if name == "input" else layer.weight)[1:].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, layer, x)

    both(change)


@by_mode
@by_saved
def test_a_change_through_data_is_not_noticed(name, training):
    def change(layer, x):
        expected = gradients(layer.train(training)(x), layer, x)
        y = layer(x)
        (x if name == "input" else layer.weight).data.mul_(2)
        found = gradients(y, layer, x)
        moved = 1 if name == "input" else 0
        assert not torch.equal(found[moved], expected[moved])
        return found

    assert_close(*both(change))


def test_train_then_eval_then_one_backward():
    def twice(layer, x):
        return gradients(layer.train()(x) + 3 * layer.eval()(x), layer, x)

    assert_close(*both(twice))


@by_mode
def test_saved_tensors_live_elsewhere(training):
    def offload(layer, x):
        layer.train(training)
        expected, shelf = gradients(layer(x), layer, x), []

        def pack(t):
            shelf.append(t.detach().cpu().numpy().copy())
            return len(shelf) - 1

        for hooks in (saved_tensors_hooks(pack, lambda i: torch.from_numpy(shelf[i]).to(DEVICE)), save_on_cpu()):
            with hooks:
                y = layer(x)
            assert all(torch.equal(a, b) for a, b in zip(gradients(y, layer, x), expected, strict=True))
        assert [array.size for array in shelf].count(x.numel()) == 1  # the input, and not the output
        return expected

    assert_close(*both(offload))


@by_mode
def test_activations_are_freed(training):
    """The graph holds the input until its backward, and never the output."""

    def lives(layer, x):
        hidden = x * 2
        y = layer.train(training)(hidden)
        total = y.sum()
        storages = [StorageWeakRef(t.untyped_storage()) for t in (hidden, y)]
        del hidden, y
        before = [s.expired() for s in storages]
        total.backward()
        return before, [s.expired() for s in storages]

    assert both(lives) == [([False, True], [True, True])] * 2


TAILS = {"last": nn.Identity(), "relu": nn.ReLU(), "conv": nn.Conv2d(5, 5, 1).double()}


@pytest.mark.parametrize(
    ("reentrant", "tail"),
    [
        *[pytest.param(True, tail, id=f"reentrant-{tail}") for tail in TAILS],
        pytest.param(False, "last", id="early stop-last"),
        *[pytest.param(False, tail, id=f"early stop-{tail}") for tail in ("relu", "conv")],
    ],
)
def test_recomputation_counts_the_batch_again(reentrant, tail):
    twins = []

    def recompute(layer, x):
        for training in (False, True):
            plain = copy.deepcopy(layer.train(training))
            expected = gradients(TAILS[tail](plain(x)), plain, x)
            y = checkpoint(nn.Sequential(layer, TAILS[tail]), x, use_reentrant=reentrant)
            x.grad = None
            layer.zero_grad()
            y.backward(seeds(y))
            for found, gradient in zip((x, layer.weight, layer.bias), expected, strict=True):
                assert torch.equal(found.grad, gradient)
            plain(x)
            assert_same_state(layer, plain)
        twins.append(layer)

    both(recompute)
    assert twins[0].num_batches_tracked == 2
    assert_same_state(*twins)


def test_a_batch_whose_saving_fails_is_counted_once():
    def fail(layer, x):
        def pack(t):
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="the disk is full"), saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        assert layer.num_batches_tracked == 1

    both(fail)
