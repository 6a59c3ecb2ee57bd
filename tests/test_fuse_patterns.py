"""fuse_batchnorm_act: what of a forward is fused, and what is left as it is and named in a warning."""

import copy
import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state
from torch import nn
from vision import DenseLayer

import bnext

pytestmark = [
    pytest.mark.bnext("bnext.fuse_batchnorm_act"),
    pytest.mark.only("cpu", "there are no CUDA kernels of it"),
    pytest.mark.usefixtures("one_thread"),
]


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
        self.lone = nn.Sequential(nn.BatchNorm2d(3))
        self.norms = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.0)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.seen = []


def body(forward):
    return type("Body", (Body,), {"forward": forward})().double()


def batch(model):
    dims = {nn.BatchNorm1d: (5,), nn.BatchNorm3d: (5, 2, 4)}
    kinds = [dims[type(m)] for m in model.modules() if type(m) in dims]
    return torch.randn(4, 3, *(kinds or [(5, 5)])[0], dtype=torch.float64)


def fuse(model, x):
    """Fuses, and compares with the model unfused in both modes; the acts of its batch norms, by name."""
    twin = bnext.convert_batchnorm(copy.deepcopy(model))
    bnext.fuse_batchnorm_act(model)
    for training in (True, False):
        xs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m.train(training)(+x) for m, x in zip((model, twin), xs, strict=True)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
    assert_same_state(model, twin)
    return {name: layer.act for name, layer in model.named_modules() if "act" in vars(layer)}


ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), ("leaky_relu", 0.2)),
    "nn.SiLU": (nn.SiLU(inplace=True), "silu"),
    "nn.Hardswish": (nn.Hardswish(), "hardswish"),
    "F.relu": (F.relu, "relu"),
    "F.relu(inplace)": (lambda x: F.relu(x, inplace=True), "relu"),
    "F.relu(input=)": (lambda x: F.relu(input=x), "relu"),
    "F.relu_": (F.relu_, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "relu()": (lambda x: x.relu(), "relu"),
    "relu_()": (lambda x: x.relu_(), "relu"),
    "F.relu6": (F.relu6, "relu6"),
    "F.leaky_relu": (F.leaky_relu, ("leaky_relu", 0.01)),
    "F.leaky_relu(slope)": (lambda x: F.leaky_relu(x, 0.3), ("leaky_relu", 0.3)),
    "F.leaky_relu(negative_slope=)": (lambda x: F.leaky_relu(x, negative_slope=0.3), ("leaky_relu", 0.3)),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, 0.3), ("leaky_relu", 0.3)),
    "F.silu": (F.silu, "silu"),
    "F.hardswish": (F.hardswish, "hardswish"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, caplog):
    """Behind a batch norm, and behind a sum: the one module in two places of a forward."""
    activation, act = ACTIVATIONS[name]

    def forward(self, x):
        x = self.activation(self.norm(self.conv(x)))
        return self.activation(self.other(self.conv(x)) + x)

    model = body(forward)
    model.activation = activation
    assert fuse(model, batch(model)) == {"norm": act, "other": act}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def sum_in_place(self, x):
    out = self.norm(self.conv(x))
    out += x
    return self.relu(out)


def counts(self, x):
    self.count.add_(1)
    return F.relu(self.norm(x)) * self.count


def annotated():
    class Local:
        """Has no name to be imported by."""

    def forward(self, x: Local) -> Local:
        return F.relu(self.norm(x))

    return forward


FUSED = {
    "+": (lambda self, x: F.relu(self.norm(self.conv(x)) + x), ["norm"]),
    "+, the other way": (lambda self, x: F.relu(self.conv(x) + self.norm(self.conv(x))), ["norm"]),
    "+=": (sum_in_place, ["norm"]),
    "operator.iadd": (lambda self, x: F.relu(operator.iadd(self.norm(self.conv(x)), x)), ["norm"]),
    "torch.add": (lambda self, x: torch.add(x, self.norm(self.conv(x))).relu(), ["norm"]),
    "add()": (lambda self, x: x.add(self.norm(self.conv(x))).relu(), ["norm"]),
    "add_()": (lambda self, x: self.norm(self.conv(x)).add_(x).relu(), ["norm"]),
    "the first of two batch norms": (lambda self, x: F.relu(self.norm(self.conv(x)) + self.other(x)), ["norm"]),
    "a batch norm before a Sequential": (lambda self, x: F.relu(self.branch(x) + self.norm(x * 2)), ["norm"]),
    "a Sequential's last": (lambda self, x: F.relu(self.branch(x) + x), ["branch.1.0"]),
    "a Sequential of one": (lambda self, x: F.relu(self.lone(self.conv(x)) + x), ["lone.0"]),
    "in a ModuleList": (lambda self, x: F.relu(self.norms[1](self.norms[0](x))), ["norms.1"]),
    "through nn.Identity": (
        lambda self, x: F.silu(self.identity(self.norm(x * 3)) + F.relu(self.identity(self.other(x * 2)))),
        ["norm", "other"],
    ),
    "a residual that was fused": (
        lambda self, x: self.relu(self.other(self.conv(x)) + self.relu(self.norm(self.conv(x)))),
        ["norm", "other"],
    ),
    "unpacked arguments": (lambda self, *args: F.relu(self.norm(args[0])), ["norm"]),
    "a default": (lambda self, x, scale=2.0: F.relu(self.norm(x)) * scale, ["norm"]),
    "annotated": (annotated(), ["norm"]),
    "counts in a buffer": (counts, ["norm"]),
    "with a buffer": (lambda self, x: F.relu(self.norm(x)) + self.count, ["norm"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_forwards(name, caplog):
    forward, expected = FUSED[name]
    model = body(forward)
    assert list(fuse(model, batch(model))) == expected
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def twice(self, x):
    return self.relu(self.norm(self.relu(self.norm(x))))


def used_elsewhere(self, x):
    out = self.norm(x)
    return self.relu(out) + out


def sum_used_elsewhere(self, x):
    out = self.norm(x) + self.conv(x)
    return self.relu(out) + out


def term_used_elsewhere(self, x):
    out = self.norm(self.conv(x))
    return self.relu(out + x) * out


def into_the_other(self, x):
    out = self.conv(x)
    out += self.norm(self.conv(x))
    return self.relu(out)


def input_used_between(self, x):
    out = self.norm(x)
    return self.relu(out + self.conv(x))


def of_mode(self, x):
    out = F.relu(self.norm(x))
    return F.dropout(out, 0.0, training=self.training)


def of_chance(self, x):
    """Stochastic depth, which a trace would decide once and for all."""
    if self.training and torch.rand(()) < 0.5:
        return F.relu(self.norm(x))
    return F.relu(self.norm(x))


def of_grad_mode(self, x):
    return F.relu(self.norm(x)) + (0 if torch.is_grad_enabled() else self.count)


def under_no_grad(self, x):
    with torch.no_grad():
        scale = self.conv(x)
    return F.relu(self.norm(x)) * scale


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.norm(x))


def with_grad(self, x):
    with torch.enable_grad():
        return F.relu(self.norm(x))


def of_shape(self, x):
    return F.relu(self.norm(x)) if x.shape[0] > 1 else x


def of_type(self, x):
    x = x if isinstance(x, torch.Tensor) else x[0]
    return F.relu(self.norm(x))


def of_none(self, x, residual=None):
    out = self.norm(x)
    return F.relu(out + x if residual is None else out + residual)


def with_a_counter(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(self.norm(x))


def keeps(self, x):
    self.seen = [F.relu(self.norm(x))]
    return self.seen[0]


def appends(self, x):
    self.seen.append(F.relu(self.norm(x)))
    return self.seen[-1]


def keyword_only(self, x, *, scale=2.0):
    return F.relu(self.norm(x)) * scale


REFUSED = {
    "called twice": (twice, "in several places"),
    "output used elsewhere": (used_elsewhere, "its output is used elsewhere, too"),
    "sum used elsewhere": (sum_used_elsewhere, "its output is used elsewhere, too"),
    "term used elsewhere": (term_used_elsewhere, "its output is used elsewhere, too"),
    "sum into the other term": (into_the_other, "a sum in place of the other term"),
    "alpha": (lambda self, x: F.relu(torch.add(self.norm(x), x, alpha=2)), "a sum with keywords"),
    "sum with a parameter": (lambda self, x: F.relu(self.norm(x) + self.scale), "a parameter, a buffer or itself"),
    "sum with itself": (lambda self, x: F.relu(operator.add(*[self.norm(x)] * 2)), "a parameter, a buffer or itself"),
    "input used before the sum": (input_used_between, "its input is used again"),
    "keywords": (lambda self, x: F.relu(self.norm(input=x)), "called with keywords"),
    "mode": (of_mode, "depends on training mode"),
    "mode and chance": (of_chance, "depends on training mode"),
    "grad mode": (of_grad_mode, "another one under torch.no_grad()"),
    "no_grad": (under_no_grad, "switches gradients or autocast"),
    "enable_grad": (with_grad, "switches gradients or autocast"),
    "autocast": (without_autocast, "switches gradients or autocast"),
    "shapes": (of_shape, "torch.fx cannot trace its forward, TraceError: symbolically traced variables"),
    "types": (of_type, "asks for the type of a value"),
    "None": (of_none, "may be None"),
    "a counter": (with_a_counter, "its forward changes calls"),
    "what it computes": (keeps, "its forward changes seen"),
    "what it computes, in a list": (appends, "its forward changes seen"),
    "keyword-only": (keyword_only, "changes the arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, caplog):
    forward, reason = REFUSED[name]
    model = body(forward)
    kind, state = type(model), vars(model) | {"seen": []}
    bnext.fuse_batchnorm_act(model)
    assert type(model) is kind
    assert vars(model) == state
    assert all(m.training for m in model.modules())
    assert "norm" in caplog.text.split("not fused: ")[1].partition("(")[0]
    assert reason in caplog.text
    assert fuse(model, torch.randn(4, 3, 5, 5).double()) == {}


SEEN = []


def keeps_elsewhere(self, x):
    SEEN.append(F.relu(self.norm(x)))
    return SEEN[-1]


def test_a_forward_that_keeps_what_it_computes(caplog):
    bnext.fuse_batchnorm_act(body(keeps_elsewhere))
    assert "norm (its forward keeps what it computes)" in caplog.text
    SEEN.clear()


@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("of", [0, 1])
def test_hooks(kind, of, caplog):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    getattr(model[of], f"register_{kind}")(lambda *_: None)
    bnext.fuse_batchnorm_act(model)
    assert type(model[0]) is bnext.BatchNorm2d
    assert "not fused: 0 (hooks, or a forward set on the object)" in caplog.text


@pytest.mark.parametrize("of", ["model", "0", "1"])
def test_a_forward_set_on_the_object(of, caplog):
    model = bnext.convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    layer = model if of == "model" else model[int(of)]
    layer.forward = layer.forward
    bnext.fuse_batchnorm_act(model)
    assert type(model[0]) is bnext.BatchNorm2d
    assert "set on the object" in caplog.text


def test_dropout_between_is_no_pattern(caplog):
    model = body(lambda self, x: F.relu(self.dropout(self.norm(x))))
    assert fuse(model, batch(model)) == {}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_sequential_with_one_activation_everywhere():
    """The module stays for its other uses, and each place of a fused one gets a copy."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu, nn.BatchNorm2d(3), relu).double()
    assert fuse(model, batch(model)) == {"0": "relu", "4": "relu"}
    assert model[3] is relu
    assert type(relu) is nn.ReLU
    bnext.revert_batchnorm(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.BatchNorm2d, nn.ReLU]


class Taps(nn.Module):
    """Takes a Sequential for a list: here its batch norm is one's end."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return taps[1]


def test_a_sequential_taken_for_a_list(caplog):
    model = Taps().double()
    assert fuse(model, batch(model)) == {}
    assert "features.1 (in several places)" in caplog.text


def test_shared_batch_norm(caplog):
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(norm, nn.ReLU()), nn.Sequential(norm, nn.ReLU())).double()
    assert fuse(model, batch(model)) == {}
    assert "0.0 (in several places)" in caplog.text


def test_a_batch_norm_with_two_names(caplog):
    """Whoever has it by the other name may call it without the activation."""
    model = body(lambda self, x: F.relu(self.norm(x)))
    model.norms.append(model.norm)
    assert fuse(model, batch(model)) == {}
    assert "norm (in several places)" in caplog.text


def test_a_shared_block_is_fused():
    """Both calls of it are of a batch norm and its activation."""
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(block, nn.Conv2d(3, 3, 1), block).double()
    assert fuse(model, batch(model)) == {"0.0": "relu"}


def test_dense_layer_with_dropout(caplog):
    bnext.fuse_batchnorm_act(DenseLayer(3, 2, drop_rate=0.5))
    assert "norm1, norm2 (its forward depends on training mode)" in caplog.text


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("other", [Own, nn.SyncBatchNorm])
def test_other_batch_norms_are_named(other, caplog):
    model = nn.Sequential(other(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    bnext.fuse_batchnorm_act(model)
    assert type(model[0]) is other
    assert type(model[1]) is nn.ReLU
    assert "act" in vars(model[2])
    assert f"0: {other.__module__}.{other.__name__}" in caplog.text


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_other_dimensions(norm):
    model = nn.Sequential(norm(3), nn.ReLU()).double()
    assert fuse(model, batch(model)) == {"0": "relu"}


class Reduces(Body):
    def forward(self, x):
        return F.relu(self.norm(x))

    def __reduce__(self):
        return Reduces, ()


def test_a_class_that_pickles_by_itself(caplog):
    model = Reduces()
    bnext.fuse_batchnorm_act(model)
    assert type(model) is Reduces
    assert "norm (its class pickles in a way of its own)" in caplog.text
