"""What only a GPU has: captured graphs, streams, tensors elsewhere, huge tensors; and the same bits from run to run."""

import copy

import pytest
import torch
from helpers import (
    LARGE,
    SMALL,
    by_dtypes,
    by_layout,
    channel_arguments,
    in_layout,
    run,
    values,
)
from torch import nn

import bnext

pytestmark = [
    pytest.mark.bnext("about bnext's CUDA kernels"),
    pytest.mark.only("cuda", "about the CUDA kernels: needs --device cuda"),
]

SHAPE = (32, 64, 14, 14)
MODELS = {
    "layer": lambda momentum: nn.Sequential(bnext.BatchNorm2d(64, momentum=momentum)),
    "guarded": lambda momentum: nn.Sequential(bnext.BatchNorm2d(64, momentum=momentum, skip_nonfinite=True)),
    "fused": lambda momentum: nn.Sequential(bnext.BatchNormAct2d(64, momentum=momentum)),
    "network": lambda momentum: nn.Sequential(
        nn.Conv2d(64, 32, 3, bias=False),
        bnext.BatchNorm2d(32, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
        bnext.BatchNorm2d(64, momentum=momentum),
    ),
}


def step(model, x, dy):
    """Output, and gradients of x and of the parameters."""
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def all_equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def batch(model, layout="contiguous"):
    """A leaf, and the gradient of the model's output."""
    x = values(SHAPE, torch.float32, layout).requires_grad_()
    return x, in_layout(torch.randn(copy.deepcopy(model)(x).shape), layout)


@by_layout
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", MODELS)
def test_a_captured_graph_replays_the_bits_of_eager_calls(name, momentum, layout):
    eager = MODELS[name](momentum)
    if layout == "channels_last":
        eager.to(memory_format=torch.channels_last)
    captured = copy.deepcopy(eager)
    x, dy = batch(eager, layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first calls set up must not be captured
        for _ in range(3):
            step(copy.deepcopy(captured), x, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(captured, x, dy)
    assert all_equal(captured.buffers(), eager.buffers())  # nothing has run
    for n in range(1, 5):
        new_x, new_dy = batch(eager, layout)
        with torch.no_grad():
            x.copy_(new_x), dy.copy_(new_dy)
        graph.replay()
        assert all_equal(found, step(eager, new_x, new_dy))
        assert all_equal(captured.buffers(), eager.buffers())
        assert captured[-1].num_batches_tracked == n


@by_layout
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_kernels_run_on_the_current_stream(training, layout):
    """Inputs are written there late: what ran elsewhere would not wait for them."""
    model = MODELS["layer"](0.1).train(training)
    source, upstream = batch(model, layout)
    expected = step(copy.deepcopy(model), source, upstream)
    x, dy = torch.zeros_like(source).requires_grad_(), torch.zeros_like(upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms
        with torch.no_grad():
            x.copy_(source)
        y = model(x)
        torch.cuda._sleep(50_000_000)
        dy.copy_(upstream)
        found = [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]
    stream.synchronize()
    assert all_equal(found, expected)


def test_streams_at_once_do_not_disturb_each_other():
    models = [MODELS["layer"](None) for _ in range(4)]
    batches = [batch(model) for model in models]
    twins = copy.deepcopy(models)
    # On leaves of their own: autograd remembers the stream on which a leaf was first in use.
    own = [(x.detach().clone().requires_grad_(), dy) for x, dy in batches]
    expected = [[step(twin, *given) for _ in range(20)] for twin, given in zip(twins, own, strict=True)]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    found = [[] for _ in models]
    for _ in range(20):
        for model, given, stream, results in zip(models, batches, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(model, *given))
    torch.cuda.synchronize()
    for mine, serial in zip(found, expected, strict=True):
        assert all(all_equal(a, b) for a, b in zip(mine, serial, strict=True))
    for model, twin in zip(models, twins, strict=True):
        assert all_equal(model.buffers(), twin.buffers())


@by_layout
@by_dtypes
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_same_bits_from_run_to_run(training, dtypes, layout):
    for shape in [*SMALL, *LARGE, (16, 64, 112, 112), (64, 256, 14, 14), (64, 2048, 7, 7)]:
        x, dy = values(shape, dtypes[0], layout), values(shape, dtypes[0], layout)
        arguments = channel_arguments(shape[1], dtypes[1])
        first = run(bnext.batch_norm, x, grad_output=dy, training=training, **arguments)
        for _ in range(4):
            again = run(bnext.batch_norm, x, grad_output=dy, training=training, **arguments)
            for name, value in first.items():
                assert torch.equal(again[name], value), f"{name} of {shape}"


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_what_is_left_on_the_cpu_is_named(name):
    arguments = channel_arguments(5, torch.float32)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(RuntimeError, match=f"expected {name} to be on cuda:0 as input, got cpu"):
        bnext.batch_norm(torch.randn(4, 5, 3), training=True, **arguments)


def test_a_layer_that_goes_back_to_the_cpu():
    model = MODELS["layer"](0.1)
    x, dy = batch(model)
    twin = copy.deepcopy(model).cpu()
    on_gpu, on_cpu = step(model, x, dy), step(twin, x.detach().cpu().requires_grad_(), dy.cpu())
    for a, b in zip([*on_gpu, *model.buffers()], [*on_cpu, *twin.buffers()], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


def test_more_elements_than_32_bits_can_count():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    x = torch.ones(2, 3, 2**29, dtype=torch.bfloat16)
    x[..., 1::2] = -1
    x = x.add_(torch.arange(3).view(3, 1)).requires_grad_()
    y = bnext.batch_norm(x, None, None, training=True)
    assert (y[..., ::2] == 1).all()
    assert (y[..., 1::2] == -1).all()
    (grad,) = torch.autograd.grad(y, x, y.detach())  # all of it is projected away
    assert grad.abs().max() < 0.01
