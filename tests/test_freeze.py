"""freeze_batchnorm: what of a model then stays, and through what."""

import copy
import logging
import warnings

import pytest
import torch
from helpers import bnext_ops, torch_ops
from test_freezing import moved, state
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import bnext

pytestmark = [pytest.mark.bnext("bnext.freeze_batchnorm"), pytest.mark.usefixtures("one_thread")]

LAYERS = ("0.1", "0.3")  # the batch norms of network()
BUFFERS = {f"{name}.{key}" for name in LAYERS for key in ("running_mean", "running_var", "num_batches_tracked")}
AFFINE = {f"{name}.{key}" for name in LAYERS for key in ("weight", "bias")}


def batch(n=6):
    return 3 * torch.randn(n, 3, 6, 6) + 1


def network():
    """torch's layers, after two batches and with parameters of their own, in training."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4, momentum=None)
    )
    model = nn.Sequential(backbone, nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model(batch()), model(batch())
        for name in AFFINE:
            model.get_parameter(name).uniform_(0.5, 1.5)
    return model


def layer(**keywords):
    """A bnext layer after a batch, with parameters of its own, in training."""
    norm = bnext.BatchNorm2d(3, **keywords)
    norm(batch())
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return norm


def evaluated(model, x):
    """By a copy, in evaluation."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def switched_off(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def assert_frozen(norm):
    """In training it computes what it computes in evaluation, and moves nothing."""
    x, before = batch(), state(norm)
    assert torch.equal(norm.train()(x), evaluated(norm, x))
    assert norm.training
    assert not moved(norm, before)


@pytest.mark.parametrize("stats", [True, False], ids=["stats", ""])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", ""])
def test_what_trains_and_what_stays(stats, affine):
    model = network()
    everything = set(model.state_dict())
    assert bnext.freeze_batchnorm(model, stats=stats, affine=affine) is model
    assert switched_off(model) == (AFFINE if affine else set())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = state(model)
    for _ in range(2):
        x = batch()
        model.eval().train()
        same = torch.equal(model(x), evaluated(model, x))
        assert same == stats
        optimizer.zero_grad()
        (model(x) * torch.randn(6, 3)).sum().backward()
        optimizer.step()
    assert moved(model, before) == everything - (BUFFERS if stats else set()) - (AFFINE if affine else set())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("affine", [True, False], ids=["affine", ""])
@pytest.mark.parametrize("keywords", [{}, {"affine": False}, {"momentum": None}], ids=["plain", "no affine", "average"])
def test_gradients_are_those_of_evaluation(keywords, affine):
    frozen = layer(**keywords)
    twin = copy.deepcopy(frozen).eval()
    bnext.freeze_batchnorm(frozen, affine=affine)
    x, dy, found = batch(), batch(), []
    for norm in (frozen, twin):
        leaf = x.clone().requires_grad_()
        with bnext_ops("eval", "backward"):
            norm(leaf).backward(dy)
        found.append((leaf.grad, [p.grad for p in norm.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for mine, its in zip(found[0][1], found[1][1], strict=True):
        assert mine is None if affine else torch.equal(mine, its)


def test_a_teacher_stays_fixed():
    """No parameter of a teacher is trained, and yet its answers drift, once somebody calls train() on it."""
    fixed, teacher = batch(), network().requires_grad_(False)
    frozen = bnext.freeze_batchnorm(copy.deepcopy(teacher))
    before, answers = state(teacher), evaluated(teacher, fixed)
    for model in (teacher, frozen):
        pair = nn.ModuleDict({"teacher": model, "student": network()}).train()
        optimizer = torch.optim.SGD(pair["student"].parameters(), lr=0.1)
        for x in (batch(), batch(), batch()):
            optimizer.zero_grad()
            (pair["student"](x) - pair["teacher"](x)).square().mean().backward()
            optimizer.step()
    assert moved(teacher, before) == BUFFERS
    assert (evaluated(teacher, fixed) - answers).abs().max() > 1e-2
    assert not moved(frozen, before)
    assert_close(frozen(fixed), answers)


def test_visible_in_the_repr_and_only_there():
    model = bnext.convert_batchnorm(network())
    keys, text, inside = list(model.state_dict()), repr(model), [set(vars(m)) for m in model.modules()]
    bnext.freeze_batchnorm(model)
    assert repr(model).count("frozen_stats=True, frozen_affine=('weight', 'bias'))") == 2
    assert list(model.state_dict()) == keys
    bnext.unfreeze_batchnorm(model)
    assert repr(model) == text == repr(bnext.revert_batchnorm(model))
    assert [set(vars(m)) for m in model.modules()] == inside


def test_a_replica_is_frozen():
    """As torch.nn.parallel.replicate makes them, whose parameters are no leaves."""
    norm = bnext.freeze_batchnorm(layer())
    replica = norm._replicate_for_data_parallel()
    for name, tensor in norm.state_dict().items():
        setattr(replica, name, tensor.clone())
    before, x = replica.running_mean.clone(), batch()
    assert torch.equal(replica(x), evaluated(norm, x))
    assert torch.equal(replica.running_mean, before)


def test_other_peoples_recalibration_leaves_it():
    """torch's update_bn resets, trains and counts every batch norm that it finds."""
    model = bnext.convert_batchnorm(network())
    bnext.freeze_batchnorm(model[0][1])
    before = state(model)
    update_bn([batch(), batch(), batch()], model)
    assert moved(model, before) == {key for key in BUFFERS if key.startswith("0.3")}
    assert model[0][1].momentum == 0.1
    assert model[0][3].num_batches_tracked == 3


def test_resets():
    norm = layer()
    bnext.freeze_batchnorm(norm)
    before = state(norm)
    norm.reset_running_stats()
    assert not moved(norm, before)
    norm.reset_parameters()
    assert moved(norm, before) == {"weight", "bias"}
    bnext.unfreeze_batchnorm(norm).reset_running_stats()
    assert not moved(norm, nn.BatchNorm2d(3).state_dict())


def test_a_checkpoint_still_loads():
    norm, other = bnext.freeze_batchnorm(layer()), layer()
    norm.load_state_dict(other.state_dict())
    assert not moved(norm, other.state_dict())
    assert_frozen(norm)


def test_no_gradient_is_left_behind_for_weight_decay():
    """As an optimizer would find it after zero_grad(set_to_none=False), and move a parameter that is frozen."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(batch()).square().sum().backward()
    bnext.freeze_batchnorm(model)
    before = state(model)
    optimizer.zero_grad(set_to_none=False)
    model(batch()).square().sum().backward()
    optimizer.step()
    assert not moved(model, before) & (BUFFERS | AFFINE)


class Own(nn.BatchNorm2d):
    pass


class OwnOfOurs(bnext.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def frozen_with_warnings(model, caplog, **keywords):
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.freeze_batchnorm(model, **keywords)
    return [record.getMessage() for record in caplog.records]


def test_what_is_not_frozen_is_named(caplog):
    others = nn.ModuleDict({"own": Own(3), "sync": nn.SyncBatchNorm(3), "lazy": nn.LazyBatchNorm2d()})
    model = nn.ModuleDict({"others": others, "plain": nn.BatchNorm2d(3), "subclass": OwnOfOurs(3)})
    (message,) = frozen_with_warnings(model, caplog)
    for name, other in others.items():
        assert f"others.{name}: {type(other).__module__}.{type(other).__name__}" in message
        assert not hasattr(other, "frozen_stats")
        assert all(p.requires_grad for p in other.parameters())
    assert "plain" not in message
    assert "subclass" not in message
    assert type(model["plain"]) is bnext.BatchNorm2d
    assert_frozen(model["plain"])
    assert_frozen(model["subclass"])


def test_statistics_that_are_not_there(caplog):
    """By the batch in training and evaluation: such a layer has nothing that could be frozen but its parameters."""
    norm = bnext.BatchNorm2d(3, track_running_stats=False)
    (message,) = frozen_with_warnings(norm, caplog)
    assert "running_mean" in message
    assert "(root): bnext.modules.BatchNorm2d" in message
    assert not norm.frozen_stats
    assert switched_off(norm) == {"weight", "bias"}
    caplog.clear()
    assert not frozen_with_warnings(norm, caplog, stats=False)


def test_statistics_that_go_away_are_an_error():
    norm = torch.func.replace_all_batch_norm_modules_(bnext.freeze_batchnorm(layer()))
    with pytest.raises(RuntimeError, match="running_mean"):
        norm(batch())


def test_buffers_that_are_not_tracked_freeze():
    norm = layer()
    norm.track_running_stats = False
    assert_frozen(bnext.freeze_batchnorm(norm))


class Logging(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


FALLBACKS = {
    "vmap": lambda norm, x: torch.func.vmap(norm)(x[None])[0],
    "jvp": lambda norm, x: torch.func.jvp(norm, (x,), (x,))[0],
    "export": lambda norm, x: torch.export.export(norm, (x,)).module()(x),
    "trace": lambda norm, x: torch.jit.trace(norm, (x,), check_trace=False)(x),
    "script": lambda norm, x: torch.jit.script(norm)(x),
    "script beside a layer that is not frozen": lambda norm, x: getattr(
        torch.jit.script(nn.Sequential(bnext.BatchNorm2d(3), norm)), "1"
    )(x),
    "__torch_function__": lambda norm, x: norm(x.as_subclass(Logging)).as_subclass(torch.Tensor),
}


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_frozen_where_torchs_own_runs(fallback):
    norm, x = bnext.freeze_batchnorm(layer()), batch()
    before = state(norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        with torch_ops():
            found = FALLBACKS[fallback](norm, x)
    assert_close(found, evaluated(norm, x))
    assert norm.training
    assert not moved(norm, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
def test_compiled_code_follows():
    torch._dynamo.reset()
    model = bnext.convert_batchnorm(network())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, before = batch(), state(model)
        compiled(x)
        assert moved(model, before) == BUFFERS
        bnext.freeze_batchnorm(model)
        before = state(model)
        assert_close(compiled(x), evaluated(model, x))
        assert not moved(model, before)
        bnext.unfreeze_batchnorm(model)
