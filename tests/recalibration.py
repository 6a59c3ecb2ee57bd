"""What the tests of update_bn share: data, networks, and the statistics that they should have."""

import copy

import torch
from helpers import norms, values
from torch import nn
from torch.testing import assert_close

import bnext

SIZES = (3, 1, 8)
CLASSES = {"bnext": bnext.BatchNorm2d, "torch": nn.BatchNorm2d, "SyncBatchNorm": nn.SyncBatchNorm}


def batches(*shape, dtype=torch.float64, layout="contiguous", sizes=SIZES):
    return [values((n, *shape), dtype, layout) for n in sizes]


def network(norm=bnext.BatchNorm2d, **keywords):
    """In use: statistics, modes and momentum of its own, the second norm called twice."""
    twice = norm(4, momentum=None, **keywords)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm(4, **keywords), nn.ReLU(), nn.Conv2d(4, 4, 1), twice, nn.Sequential(twice)
    ).double()
    for x in batches(3, 6, 6, sizes=(2, 2)):
        model(x)
    model[2].eval()
    return model


def state(model):
    """Everything that the pass could change and must not, statistics included."""
    own = ("training", "momentum", "track_running_stats")
    return [
        *[(t, t.clone()) for t in model.state_dict(keep_vars=True).values()],
        *[(m, [getattr(m, name, None) for name in own], len(m._forward_hooks)) for m in model.modules()],
    ]


def assert_unchanged(model, before):
    for (a, *was), (b, *now) in zip(before, state(model), strict=True):
        assert a is b
        assert torch.equal(was[0], now[0]) if isinstance(a, torch.Tensor) else was == now


def inputs(model, data):
    """All that each norm is given, normalising by the batch, as one batch."""
    twin, seen = copy.deepcopy(model).eval(), {}
    for norm in norms(twin):
        norm.training, norm.track_running_stats = True, False
        norm.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].detach()))
    for x in data:
        twin(x)
    return [torch.cat(seen[norm]) for norm in norms(twin)]


def assert_statistics_of(norm, x):
    """Of x [N, C, *], to the rounding of the buffers."""
    x, tolerance = x.double(), {"rtol": max(1e-13, torch.finfo(norm.running_var.dtype).eps), "atol": 1e-14}
    dims = [d for d in range(x.dim()) if d != 1]
    assert_close(norm.running_mean.double(), x.mean(dims), **tolerance)
    assert_close(norm.running_var.double(), x.var(dims), **tolerance)
