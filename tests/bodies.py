"""Modules of which a test writes the forward, fused and compared with themselves unfused."""

import copy

import torch
from helpers import assert_same_state
from torch import nn

import bnext


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
