"""Networks in training beside torch's: half precision, optimizers, compilers."""

import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DEVICE,
    HALF,
    assert_same_state,
    bnext_ops,
    bring_into_use,
    by_mode,
    float_id,
    modules,
    norms,
    torch_ops,
    values,
)
from torch import nn
from torch.testing import assert_close

import bnext

pytestmark = pytest.mark.usefixtures("one_thread")


def network(norm):
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        norm(5),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(5, 4, 3, bias=False), norm(4, momentum=None)),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def batch(dtype=torch.float32, n=6):
    return values((n, 3, 8, 8), dtype)


def networks(dtype=torch.float32):
    """The subject's and torch's, in the same state, which is not the initial one."""
    ours, theirs = (network(cls).to(dtype) for cls in modules())
    bring_into_use(ours, theirs, [batch(dtype)])
    return ours, theirs


@by_mode
@pytest.mark.parametrize("half", HALF, ids=float_id)
@pytest.mark.parametrize("kind", ["autocast", "float32 norms", "all half"])
def test_half_precision(kind, half, training):
    """Dtypes are torch's, and no buffer is cast; values differ by a few roundings."""
    op = "train" if training else "eval"
    x = batch(torch.float32 if kind == "autocast" else half)
    found, seen = [], []
    for model in networks():
        model.train(training).to(torch.float32 if kind == "autocast" else half)
        for norm in norms(model):
            if kind == "float32 norms":
                norm.float()
            norm.register_forward_hook(lambda m, a, y: seen.append((a[0].dtype, y.dtype, m.running_var.dtype)))
        mine = type(norms(model)[0]) is modules()[0]
        with bnext_ops(op, op, "backward", "backward") if mine else contextlib.nullcontext():
            with torch.autocast(DEVICE.type, half, enabled=kind == "autocast"):
                y = model(x)
            y.float().square().mean().backward()
        found.append(
            [y.detach(), *(p.grad for p in model.parameters()), *(b for m in norms(model) for b in m.buffers())]
        )
    assert seen == [(half, half, half if kind == "all half" else torch.float32)] * 4
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(half).eps * theirs.abs().max().item())


def test_overflowing_gradients_reach_neither_parameters_nor_buffers():
    models, x, scales = networks(), batch(), []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=64.0)
        for overflow in (False, True, False):
            before = copy.deepcopy(norms(model)[0].weight)
            optimizer.zero_grad()
            y = model(x)
            if overflow:
                y.register_hook(lambda g: g * float("inf"))
            scaler.scale(y.square().mean()).backward()
            assert all(norm.weight.grad.isfinite().all() != overflow for norm in norms(model))
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(norms(model)[0].weight, before) == overflow
            scales.append(scaler.get_scale())
    assert scales == [64, 32, 32] * 2
    assert_close(*(dict(model.state_dict()) for model in models), rtol=1e-4, atol=1e-4)
    assert norms(models[0])[0].num_batches_tracked == 4


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}
by_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def train(model, optimizer, batches, accumulate=1):
    """The losses; an optimizer step after every `accumulate` batches."""
    losses = []
    for i, x in enumerate(batches, 1):
        loss = F.log_softmax(model.train()(x), 1)[:, 0].neg().mean()
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@by_optimizer
@pytest.mark.parametrize("accumulate", [1, 2], ids=["each batch", "accumulated"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=["64", "32"])
def test_five_optimizer_steps(dtype, tolerance, accumulate, optimizer):
    models, batches = networks(dtype), [batch(dtype) for _ in range(5 * accumulate)]
    start = copy.deepcopy(models[0].state_dict())
    losses = [train(model, OPTIMIZERS[optimizer](model.parameters()), batches, accumulate) for model in models]
    near = {"rtol": tolerance, "atol": tolerance}
    assert_close(*losses, **near)
    assert_close(*(dict(model.state_dict()) for model in models), **near)
    assert_close(*(model.eval()(batches[0]) for model in models), **near)
    assert losses[0][-1] < losses[0][0]
    assert not any(torch.equal(t, start[key]) for key, t in models[0].state_dict().items())


@by_optimizer
def test_training_resumes_in_the_other_library(optimizer, tmp_path):
    """Two steps, files exchanged, three steps: the end of five steps without a break."""
    models, batches = networks(torch.float64), [batch(torch.float64) for _ in range(5)]
    unbroken = copy.deepcopy(models[1])
    train(unbroken, OPTIMIZERS[optimizer](unbroken.parameters()), batches)
    for i, model in enumerate(models):
        own = OPTIMIZERS[optimizer](model.parameters())
        train(model, own, batches[:2])
        torch.save([model.state_dict(), own.state_dict()], tmp_path / str(i))
    for i, cls in enumerate(modules()):
        state, progress = torch.load(tmp_path / str(1 - i), weights_only=True)
        model = network(cls).double()
        model.load_state_dict(state)
        own = OPTIMIZERS[optimizer](model.parameters())
        own.load_state_dict(progress)
        train(model, own, batches[2:])
        assert_close(dict(model.state_dict()), dict(unbroken.state_dict()), rtol=1e-10, atol=1e-10)


def normalise_by_half(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, training: bool) -> torch.Tensor:
    if x.size(0) > 4:
        x = x * 0.5
    return bnext.batch_norm(x, mean, var, training=training, momentum=0.5).relu()


def through_a_file(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"bnext::" not in file.getvalue()
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.bnext("scripts bnext.batch_norm")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_function():
    loaded = through_a_file(torch.jit.script(normalise_by_half))
    for n, training in ((3, True), (6, True), (6, False)):
        x, found = batch(n=n), []
        for function in (loaded, normalise_by_half):
            leaf, buffers = x.clone().requires_grad_(), [torch.zeros(3), torch.ones(3)]
            with torch_ops() if function is loaded else bnext_ops("train" if training else "eval"):
                y = function(leaf, *buffers, training)
            y.square().sum().backward()
            found.append((y.detach(), leaf.grad, buffers))
        assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_trains_and_freezes():
    ours, theirs = networks(torch.float64)
    loaded = through_a_file(torch.jit.script(ours))
    x = batch(torch.float64)
    for model in (loaded, theirs):
        train(model, OPTIMIZERS["SGD"](model.parameters()), [x, x.abs()])
    assert_close(dict(loaded.state_dict()), dict(theirs.state_dict()))
    assert_close(torch.jit.freeze(loaded.eval())(x), theirs.eval()(x))


def test_a_traced_model_is_traced_again_within_a_larger_one():
    ours, theirs = networks()
    traced = torch.fx.symbolic_trace(ours)
    again = torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), copy.deepcopy(traced)))
    assert [n.target for n in traced.graph.nodes if "3" in str(n.target)] == ["3.0", "3.1"]
    assert type(again.get_submodule("1.3.1")) is modules()[0]
    x = batch()
    for training in (True, False):
        op = "train" if training else "eval"
        with bnext_ops(op, op):
            y = again.train(training)(x)
        assert_close(y, theirs.train(training)(x), rtol=1e-4, atol=1e-4)
    assert_same_state(again.get_submodule("1"), theirs)


@pytest.mark.bnext("momentum=None breaks torch's own graph")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own, while it compiles
def test_a_compiled_model_changes_batch_size_and_mode():
    torch._dynamo.reset()
    ours, theirs = networks(torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for n, training in ((6, True), (6, False), (3, True), (5, True), (7, False), (4, True), (1, False)):
        x, found = batch(torch.float64, n), []
        for model in (compiled, theirs):
            model.train(training).zero_grad()
            y = model(x)
            y.square().mean().backward()
            found.append((y.detach(), [p.grad for p in model.parameters()]))
        assert_close(*found)
        assert_same_state(ours, theirs)
    assert norms(ours)[0].num_batches_tracked == 5
