"""The only places where torch's own batch norm runs instead: each is detected, and gives torch's result."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, bnext_ops, layers, torch_ops
from torch import func
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import bnext

pytestmark = pytest.mark.bnext("bnext's list of fallbacks")


@pytest.fixture(autouse=True)
def _torch_jit_is_deprecated():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        yield


def pair(**keywords):
    ours, theirs = layers(5, **keywords)
    return ours, theirs, torch.randn(4, 5, 6, 7)


def test_outside_of_them_bnext_runs():
    ours, _, x = pair()
    with bnext_ops("train"):
        ours(x)


@pytest.mark.parametrize("training", [True, False])
def test_func_grad(training):
    ours, theirs, x = pair(track_running_stats=not training)  # torch refuses to update captured buffers

    def loss(layer):
        buffers = {k: v.clone() for k, v in layer.named_buffers()}

        def of(parameters, x):
            return functional_call(layer, {**parameters, **buffers}, (x,)).square().sum()

        return grad(of)(dict(layer.named_parameters()), x)

    ours.train(training), theirs.train(training)
    with torch_ops():
        found = loss(ours)
    expected = loss(theirs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_functional_call_without_a_transform_is_bnext():
    ours, _, x = pair()
    with bnext_ops("train"):
        functional_call(ours, dict(ours.named_parameters()), (x,))


def test_vmap():
    ours, theirs, _ = pair()
    ours.eval(), theirs.eval()
    x = torch.randn(3, 4, 5, 6, 7)
    with torch_ops():
        found = vmap(ours)(x)
    torch.testing.assert_close(found, vmap(theirs)(x))


def test_jvp():
    ours, theirs, x = pair(track_running_stats=False)
    tangent = torch.randn_like(x)
    with torch_ops():
        found = jvp(ours, (x,), (tangent,))
    torch.testing.assert_close(found, jvp(theirs, (x,), (tangent,)))


def of_parameters(layer):
    """layer as a function of its parameters and its input."""
    return lambda parameters, x: functional_call(layer, parameters, (x,))


def vector_jacobian(layer, x):
    output, pull = func.vjp(of_parameters(layer), dict(layer.named_parameters()), x)
    return output, pull(output.detach().cos())


def gradient_of_each_sample(layer, x):
    def loss(parameters, sample):
        return of_parameters(layer)(parameters, sample[None]).square().sum()

    return vmap(grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)


TRANSFORMS = {
    "vjp": vector_jacobian,
    "vmap of grad": gradient_of_each_sample,
    "jacrev": lambda layer, x: func.jacrev(layer)(x),
    "jacfwd": lambda layer, x: func.jacfwd(layer)(x),
    "hessian": lambda layer, x: func.hessian(lambda x: layer(x).sin().sum())(x),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, training):
    found = []
    for layer in layers(3, track_running_stats=not training):
        x = torch.linspace(-1, 1, 24).sin().reshape(2, 3, 2, 2)
        with torch_ops():
            found.append(TRANSFORMS[name](layer.train(training), x))
    torch.testing.assert_close(*found)


def test_transforms_refuse_to_update_captured_buffers():
    errors = []
    for layer in layers(5):
        with pytest.raises(RuntimeError, match="mutate a captured Tensor") as error:
            grad(lambda x, layer=layer: layer(x).sum())(torch.randn(4, 5, 6, 7))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_an_ensemble_without_running_statistics():
    """What torch's errors advise: replace_all_batch_norm_modules_, then vmap over stacked parameters."""
    x, found = torch.randn(4, 5, 6, 7), []
    for pairs in zip(*(layers(5) for _ in range(3)), strict=True):
        members = [func.replace_all_batch_norm_modules_(torch.nn.Sequential(layer)) for layer in pairs]
        assert all(m[0].running_mean is m[0].num_batches_tracked is None for m in members)
        parameters, buffers = func.stack_module_state(members)
        assert not buffers
        skeleton = copy.deepcopy(members[0]).to("meta")
        with torch_ops():
            found.append(vmap(of_parameters(skeleton), in_dims=(0, None))(parameters, x))
        torch.testing.assert_close(found[-1], torch.stack([m(x) for m in members]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dual", ["input", "weight"])
def test_forward_ad(dual):
    x, weight, bias = torch.randn(4, 5, 6), torch.randn(5), torch.randn(5)
    tangents = {"input": torch.randn(4, 5, 6), "weight": torch.randn(5)}
    found = []
    with forward_ad.dual_level():
        for batch_norm in (bnext.batch_norm, F.batch_norm):
            given = {"input": x, "weight": weight}
            given[dual] = forward_ad.make_dual(given[dual], tangents[dual])
            with torch_ops():
                y = batch_norm(given["input"], None, None, given["weight"], bias, training=True)
            found.append(forward_ad.unpack_dual(y))
        with bnext_ops("train"):  # no tangent, no reason
            bnext.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(found[0].primal, found[1].primal)
    torch.testing.assert_close(found[0].tangent, found[1].tangent)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    ours, theirs, x = pair()
    ours.train(training), theirs.train(training)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert "bnext" not in str(program.graph)
    larger = torch.randn(9, 5, 6, 7)
    torch.testing.assert_close(program.module()(larger), theirs(larger))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_script(dim):
    ours, theirs = layers(5, dim)
    model = torch.nn.Sequential(ours, torch.nn.ReLU())
    scripted = torch.jit.script(model)
    assert type(model[0]) is type(ours)  # the eager model keeps its layers
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"bnext::" not in file.getvalue()
    file.seek(0)
    loaded = torch.jit.load(file)
    x = torch.randn(4, 5, *[6] * dim)
    for training in (True, False):
        loaded.train(training), theirs.train(training)
        with torch_ops():
            y = loaded(x)
        torch.testing.assert_close(y, theirs(x).relu())
    assert_same_state(getattr(loaded, "0"), theirs)


def test_trace():
    ours, theirs, x = pair()
    ours.eval(), theirs.eval()
    traced = torch.jit.trace(ours, (x,))
    assert "aten::batch_norm" in str(traced.graph)
    assert "bnext::" not in str(traced.graph)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(x), theirs(x))


def test_fx_keeps_the_layer_as_a_leaf():
    ours, theirs, x = pair()
    model = torch.nn.Sequential(torch.nn.Sequential(ours), torch.nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    calls = [(n.op, n.target) for n in traced.graph.nodes]
    assert ("call_module", "0.0") in calls
    assert traced.get_submodule("0.0") is ours
    with bnext_ops("train"):
        y = traced(x)
    torch.testing.assert_close(y, theirs(x).relu())


def test_fx_cannot_trace_a_layer_alone():
    for layer in layers(5):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(layer)


def test_fx_traces_the_function():
    class Net(torch.nn.Module):
        def forward(self, x):
            return bnext.batch_norm(x, None, None, training=True)

    traced = torch.fx.symbolic_trace(Net())
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [bnext.batch_norm]
    x = torch.randn(4, 3, 2)
    with bnext_ops("train"):
        traced(x)


def test_tensor_subclasses_go_through_torch_function():
    class Marked(torch.Tensor):
        pass

    x = torch.randn(4, 3, 2).as_subclass(Marked)
    with bnext_ops("train"):
        y = bnext.batch_norm(x, None, None, training=True)
    assert type(y) is Marked


def test_a_copy_of_a_converted_layer_scripts_too():
    layer = copy.deepcopy(bnext.convert_batchnorm(torch.nn.BatchNorm2d(5))).eval()
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_in_the_place_of_torchs_own(monkeypatch):
    """What falls back must find torch's function, not itself."""
    _, theirs, x = pair()
    expected = jvp(theirs.eval(), (x,), (x,))
    monkeypatch.setattr(F, "batch_norm", bnext.batch_norm)
    torch.testing.assert_close(jvp(theirs, (x,), (x,)), expected)
    with bnext_ops("eval"):
        theirs(x)


def scripted(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, training: bool) -> torch.Tensor:
    return bnext.batch_norm(x, mean, var, None, None, training, 0.3).relu()


@pytest.mark.parametrize("training", [True, False])
def test_the_function_scripts(training):
    x, mean, var = torch.randn(4, 5, 6), torch.randn(5), torch.rand(5)
    found, expected = (f(x, mean.clone(), var.clone(), training) for f in (torch.jit.script(scripted), scripted))
    torch.testing.assert_close(found, expected)


def test_a_class_that_waits_for_nothing():
    class Marked(torch.Tensor):
        pass

    ours, _, x = pair()
    with bnext_ops("train"):
        y = ours(x.as_subclass(Marked))
    assert y.shape == x.shape


def test_a_class_that_waits_for_torchs_names():
    seen = []

    class Logging(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, theirs, x = pair()
    torch.testing.assert_close(ours(x.as_subclass(Logging)), theirs(x.as_subclass(Logging)))
    assert seen.count(F.batch_norm) == 2
    assert_same_state(ours, theirs)
