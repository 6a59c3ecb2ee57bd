"""fuse_batchnorm_act: what is left as it is, and named in a warning with the reason."""

import operator

import pytest
import torch
import torch.nn.functional as F
from bodies import Body, batch, body, fuse
from torch import nn
from vision import DenseLayer

import bnext

pytestmark = [
    pytest.mark.bnext("bnext.fuse_batchnorm_act"),
    pytest.mark.usefixtures("one_thread"),
]


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
