"""What torch refuses, bnext refuses: the same class of error, naming the argument, before anything is written.

What torch refuses is what it refuses on the CPU: its CUDA kernels take more of what is wrong, by their own lights.
"""

import functools
import math

import pytest
import subject
import torch
import torch.nn.functional as F
from helpers import DEVICE, layers

NAMES = ("running_mean", "running_var", "weight", "bias")


def arguments(**changes):
    """Good arguments of a batch norm in training, changed."""
    good = {
        "input": torch.randn(4, 3, 2, 2),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }
    return {**good, **changes}


def whole(dtype):
    return torch.ones(4, 3, 2, 2).to(dtype)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


# name: (changes, what the message names)
REFUSED = {
    "int32 input": ({"input": whole(torch.int32)}, ["batch_norm", "Int", "input"]),
    "int64 input": ({"input": whole(torch.int64)}, ["Long"]),
    "uint8 input": ({"input": whole(torch.uint8)}, ["Byte"]),
    "bool input": ({"input": whole(torch.bool)}, ["Bool"]),
    "complex input": ({"input": whole(torch.complex64)}, ["Complex"]),
    "one dimension": ({"input": torch.randn(3), "training": False}, ["2 dimensions", "[3]"]),
    "one dimension, training": ({"input": torch.randn(3)}, ["2 dimensions", "[3]"]),
    "scalar, training": ({"input": torch.tensor(1.0)}, ["2 dimensions"]),
    "running_mean size": ({"running_mean": zeros(4)}, ["running_mean", "3", "4"]),
    "running_var size": ({"running_var": zeros(2)}, ["running_var", "3", "2"]),
    "weight size": ({"weight": zeros(5)}, ["weight", "3", "5"]),
    "bias size": ({"bias": zeros(1)}, ["bias", "3", "1"]),
    "weight size, eval": ({"weight": zeros(5), "training": False}, ["weight", "3", "5"]),
    "weight dtype": ({"weight": zeros(3, dtype=torch.float64)}, ["scalar type", "Float", "Double"]),
    "running_mean dtype": ({"running_mean": zeros(3, dtype=torch.float64)}, ["Float", "Double"]),
    "running_var dtype": ({"running_var": zeros(3, dtype=torch.float16)}, ["Float", "Half"]),
    "bias dtype, eval": ({"bias": zeros(3, dtype=torch.bfloat16), "training": False}, ["Float", "BFloat16"]),
    "half input, double weight": ({"input": whole(torch.half), "weight": zeros(3, dtype=torch.float64)}, ["Double"]),
    "half input, mixed parameters": ({"input": whole(torch.half), "bias": zeros(3, dtype=torch.half)}, ["Half"]),
    "half input, half weight": ({"input": whole(torch.half), "weight": zeros(3, dtype=torch.half)}, ["Half"]),
    "half input, mixed buffers": (
        {"input": whole(torch.half), "running_var": zeros(3, dtype=torch.half), "training": False},
        ["Half", "Float"],
    ),
    "bfloat16 input, float16 weight": (
        {"input": whole(torch.bfloat16), "weight": zeros(3, dtype=torch.half), "bias": None, "training": False},
        ["Half"],
    ),
    "half input, one value": ({"input": torch.ones(1, 3, 1, 1).half()}, ["more than 1 value per channel"]),
    "float64 input, float32 parameters": ({"input": whole(torch.float64)}, ["Float", "Double"]),
    "float8 input": ({"input": whole(torch.float8_e4m3fn)}, ["Float8"]),
    "list for input": ({"input": [[1.0, 2.0, 3.0]], "training": False}, ["input", "Tensor", "list"]),
    "None for input": ({"input": None, "training": False}, ["input", "Tensor", "NoneType"]),
    "half weight": ({"weight": zeros(3, dtype=torch.float16), "bias": None}, ["Half"]),
    "2-D running_mean": ({"running_mean": zeros(1, 3)}, ["running_mean", "1 dim"]),
    "no buffers, eval": ({"running_mean": None, "running_var": None, "training": False}, ["running_mean"]),
    "no running_var, eval": ({"running_var": None, "training": False}, ["running_var"]),
    "no running_var": ({"running_var": None}, ["running_mean", "running_var"]),
    "no running_mean": ({"running_mean": None}, ["running_mean", "running_var"]),
    "one value": ({"input": torch.randn(1, 3, 1, 1)}, ["more than 1 value per channel", "[1, 3, 1, 1]"]),
    "one value, 2-D": ({"input": torch.randn(1, 3)}, ["more than 1 value per channel", "[1, 3]"]),
    "eps 0": ({"eps": 0.0}, ["eps", "0"]),
    "eps negative": ({"eps": -1.0}, ["eps", "-1"]),
    "eps negative, eval": ({"eps": -1.0, "training": False}, ["eps", "-1"]),
    "momentum None": ({"momentum": None}, ["momentum", "NoneType"]),
    "momentum str": ({"momentum": "fast"}, ["momentum", "str"]),
    "momentum str, eval": ({"momentum": "fast", "training": False}, ["momentum", "str"]),
    "momentum list": ({"momentum": [0.1], "training": False}, ["momentum", "list"]),
    "momentum complex": ({"momentum": 1j, "training": False}, ["momentum", "complex"]),
    "momentum of three": ({"momentum": torch.ones(3), "training": False}, ["momentum", "Tensor"]),
    "eps None, eval": ({"eps": None, "training": False}, ["eps", "NoneType"]),
    "eps object": ({"eps": object(), "training": False}, ["eps", "object"]),
    "eps str": ({"eps": "small"}, ["eps", "str"]),
    "training int": ({"training": 1}, ["training", "bool", "int"]),
    "no channels": (
        {"input": zeros(2, 0, 2, 2), **{k: zeros(0) for k in ("running_mean", "running_var", "weight", "bias")}},
        ["channel"],
    ),
    "weight on another device": ({"weight": torch.ones(3, device="meta")}, []),
    "running_mean wants a gradient": (
        {"running_mean": torch.zeros(3, requires_grad=True), "weight": torch.ones(3, requires_grad=True)},
        ["running_mean", "requires_grad"],
    ),
}

ACCEPTED = {
    "momentum True": {"momentum": True},
    "momentum int": {"momentum": 1},
    "momentum tensor": {"momentum": torch.tensor(0.25)},
    "momentum nan": {"momentum": math.nan},
    "momentum above 1": {"momentum": 1.5},
    "eps tensor": {"eps": torch.tensor(0.5)},
    "eps int": {"eps": 1},
    "eps 0, eval": {"eps": 0, "training": False},
    "eps nan": {"eps": math.nan},
    "2-D weight": {"weight": torch.ones(1, 3) * 2},
    "6-D": {"input": torch.randn(2, 3, 2, 2, 2, 2)},
    "one value, eval": {"input": torch.randn(1, 3, 1, 1), "training": False},
    "empty batch": {"input": torch.zeros(0, 3, 2, 2)},
    "empty batch, eval": {"input": torch.zeros(0, 3, 2, 2), "training": False},
    "empty planes": {"input": torch.zeros(2, 3, 0, 2)},
    "empty rows": {"input": torch.zeros(0, 3)},
    "no buffers": {"running_mean": None, "running_var": None},
    "nothing in one dimension": {"input": zeros(0), **dict.fromkeys(NAMES)},
    "nothing in one dimension, eval": {
        "input": zeros(0),
        "running_mean": zeros(0),
        "running_var": zeros(0),
        "weight": None,
        "bias": None,
        "training": False,
    },
    **{
        f"{half} input, {params} parameters": {
            "input": torch.arange(48.0).reshape(4, 3, 2, 2).to(half),
            **{name: torch.ones(3, dtype=params) for name in NAMES},
        }
        for half in (torch.bfloat16, torch.float16)
        for params in (half, torch.float32)
    },
}


def needs_functional():
    if not subject.has_functional:
        pytest.skip("the errors of F.batch_norm: needs --functional")


def on_cpu(given):
    """The same arguments with their tensors on the CPU, but for those on meta."""
    real = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    return {**given, **{k: v.detach().cpu().requires_grad_(v.requires_grad) for k, v in real.items()}}


def pair(*arguments, **keywords):
    """(layer, device) of the subject's, and of torch's on the CPU."""
    ours, theirs = layers(*arguments, **keywords)
    return (ours, DEVICE), (theirs.cpu(), "cpu")


assert_close = functools.partial(torch.testing.assert_close, equal_nan=True, check_device=False)


def outcome(batch_norm, given):
    """Result or error, and the buffers afterwards."""
    copies = {k: v.clone() if isinstance(v, torch.Tensor) and not v.requires_grad else v for k, v in given.items()}
    try:
        result = batch_norm(**copies)
    except Exception as error:
        result = error
    return result, copies["running_mean"], copies["running_var"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    needs_functional()
    changes, named = REFUSED[name]
    given = arguments(**changes)
    theirs, *_ = outcome(F.batch_norm, on_cpu(given))
    ours, *buffers = outcome(subject.batch_norm, given)
    assert isinstance(theirs, Exception), "torch accepts this"
    assert type(ours) is type(theirs), f"{ours!r} is not {theirs!r}"
    if not subject.is_bnext:
        return  # torch's own messages say less, and it writes before it refuses
    for word in named:
        assert word in str(ours), f"{word!r} not in {ours}"
    for key, after in zip(("running_mean", "running_var"), buffers, strict=True):
        assert after is None or torch.equal(after, given[key])


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    needs_functional()
    given = arguments(**ACCEPTED[name])
    theirs, ours = outcome(F.batch_norm, on_cpu(given)), outcome(subject.batch_norm, given)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


@pytest.mark.parametrize(
    ("input", "error"),
    [
        (torch.randn(1, 5, 1, 1), ValueError),
        (torch.randn(2, 4, 3, 3), RuntimeError),
        (torch.ones(2, 5, 3, 3, dtype=torch.int32), NotImplementedError),
        (torch.randn(2, 5, 3, 3, dtype=torch.float64), RuntimeError),
    ],
    ids=["one value", "channels", "int32", "float64"],
)
def test_a_refused_batch_is_counted(input, error):
    for layer, device in pair(5):
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        with pytest.raises(error):
            layer(input.to(device))
        assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
        for key in ("running_mean", "running_var"):
            assert torch.equal(layer.state_dict()[key], before[key])


# attribute: values that make a layer's call fail, or not, with everything else good
ATTRIBUTES = {
    "momentum": ["a", [0.1], 1j, 10**400, None, True, 2, torch.tensor(0.5), float("nan")],
    "eps": ["a", None, 1j, -1.0, 0.0, 10**400, torch.tensor(0.5)],
    "training": ["a", 1, 0, None],
    "track_running_stats": [0, 1, None],
    "weight": [None],
    "bias": [None],
    "running_mean": [None],
    "running_var": [None],
    "num_batches_tracked": [None],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ATTRIBUTES.items() for v in values], ids=str)
def test_attributes_set_later(name, value, training):
    """Result or class of error, buffers and counter, all as torch's."""
    x = torch.randn(4, 5, 3, 3)
    found = []
    for layer, device in pair(5):
        layer.train(training)
        setattr(layer, name, value)
        try:
            result = layer(x.to(device))
        except Exception as error:
            result = error
        found.append((result, list(layer.buffers())))
    (ours, buffers), (theirs, expected) = found
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r} is not {theirs!r}"
    else:
        assert_close(ours, theirs)
    assert_close(buffers, expected)


@pytest.mark.only("cpu", "on CUDA the counter is read by the kernel, which cannot raise")
def test_a_counter_that_comes_to_zero():
    for layer in layers(5, momentum=None):
        layer.num_batches_tracked.fill_(-1)
        before = layer.running_mean.clone()
        with pytest.raises((ZeroDivisionError, ValueError)):  # torch's class, and one that an op can raise
            layer(torch.randn(4, 5, 3, 3))
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_rank_is_refused_and_not_counted(dim):
    for layer in layers(5, dim):
        with pytest.raises(ValueError, match=r"expected .*D.* input \(got .*D input\)"):
            layer(torch.randn(2, 5, *[3] * (dim % 3 + 1)))
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape, training):
    found = []
    for layer in layers(5):
        layer.train(training)
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        found.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
