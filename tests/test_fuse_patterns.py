"""fuse_batchnorm_act: what of a forward is fused."""

import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from bodies import batch, body, fuse
from torch import nn

import bnext

pytestmark = [
    pytest.mark.bnext("bnext.fuse_batchnorm_act"),
    pytest.mark.usefixtures("one_thread"),
]

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


def test_a_shared_block_is_fused():
    """Both calls of it are of a batch norm and its activation."""
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model = nn.Sequential(block, nn.Conv2d(3, 3, 1), block).double()
    assert fuse(model, batch(model)) == {"0.0": "relu"}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_other_dimensions(norm):
    model = nn.Sequential(norm(3), nn.ReLU()).double()
    assert fuse(model, batch(model)) == {"0": "relu"}
