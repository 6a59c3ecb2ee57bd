"""The batch norm samples that PyTorch's wheel ships for its own tests, under the checks that its tests make of them."""

import copy
import io
import itertools
import warnings

import pytest
import subject
import torch
from helpers import DEVICE, HALF, OUTPUTS, assert_accurate, assert_same_state, assert_strides, modules
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.testing import assert_close

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest: see requirements-dev.txt")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Fail to import hypothesis", category=ImportWarning)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

DIMS = (1, 2, 3)
INFOS = {dim: next(info for info in module_db if info.module_cls is modules(dim)[1]) for dim in DIMS}
OPS = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
FORMATS = {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}

by_check = pytest.mark.parametrize("check", [gradcheck, gradgradcheck])


def words(dtype, training):
    return f"{str(dtype).removeprefix('torch.')}-{'train' if training else 'eval'}"


def settings(only=None):
    """(dim, dtype, training) of each ModuleInfo, with an id."""
    return [
        pytest.param((dim, dtype, training), id=f"{dim}d-{words(dtype, training)}")
        for dim, training in itertools.product(DIMS, (True, False))
        for dtype in INFOS[dim].supported_dtypes(DEVICE.type)
        if only in (None, dtype)
    ]


def module_inputs(dim, dtype, training):
    return INFOS[dim].module_inputs_func(INFOS[dim], DEVICE.type, dtype, True, training)


def by_module_input(only=None):
    """case: the arguments of module_inputs, and an index into the ModuleInputs that it returns."""
    cases = [
        pytest.param((*setting.values[0], i), id=f"{setting.id}-{sample.desc or 'default'}")
        for setting in settings(only)
        for i, sample in enumerate(module_inputs(*setting.values[0]))
    ]
    return pytest.mark.parametrize("case", cases)


def build(case):
    """The subject's layer and torch's in the same state, none of it initial; the input; the ModuleInput."""
    dim, dtype, training, index = case
    sample = module_inputs(dim, dtype, training)[index]
    given = sample.constructor_input
    ours, theirs = (cls(*given.args, **given.kwargs).to(dtype).train(training) for cls in modules(dim))
    with torch.no_grad():
        for t in theirs.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    (x,) = sample.forward_input.args
    return ours, theirs, x.detach(), sample


def outcome(layer, x, grad_output):
    """Output, and gradients of input and parameters after two backwards through one graph."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    for _ in range(2):
        y.backward(grad_output, retain_graph=True)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@by_module_input()
def test_as_torchs_module(case):
    ours, theirs, x, sample = build(case)
    for training in (case[2], not case[2], case[2]):
        ours.train(training), theirs.train(training)
        dy = torch.randn_like(x)
        assert_close(outcome(ours, x, dy), outcome(theirs, x, dy), check_stride=x.is_cpu)
        assert_same_state(ours, theirs)
    if sample.reference_fn is not None:
        assert_close(ours(x), sample.reference_fn(ours, x))


@by_module_input()
def test_factory_keywords(case):
    dim, dtype, _, index = case
    given = module_inputs(*case[:3])[index].constructor_input
    for device in (DEVICE.type, "meta"):
        found = []
        for cls in modules(dim):
            with torch.device(device):
                by_context = cls(*given.args, **given.kwargs).to(dtype)
            for layer in (by_context, cls(*given.args, **given.kwargs, device=device, dtype=dtype)):
                found.append([(k, t.device.type, t.dtype, t.shape) for k, t in layer.state_dict().items()])
        assert all(f == found[-1] for f in found)
        assert {t[1] for t in found[0]} <= {device}


@by_module_input()
def test_repr_pickle_and_checkpoint(case):
    ours, theirs, x, sample = build(case)
    assert (repr(ours), str(ours)) == (repr(theirs), str(theirs))
    given = sample.constructor_input
    loaded = type(ours)(*given.args, **given.kwargs).to(x.dtype).train(case[2])
    files = io.BytesIO(), io.BytesIO()
    torch.save(ours, files[0]), torch.save(ours.state_dict(), files[1])
    for file in files:
        file.seek(0)
    loaded.load_state_dict(torch.load(files[1], weights_only=True), strict=True)
    for twin in (torch.load(files[0], weights_only=False), loaded):
        assert type(twin) is type(ours)
        assert_same_state(twin, theirs)
        assert_close(twin(x), copy.deepcopy(theirs)(x))


@by_module_input()
@pytest.mark.parametrize("swap", [False, True], ids=["set", "swap"])
def test_to(case, swap, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
    ours, theirs, x, _ = build(case)
    x = x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)
    same = []
    for layer in (ours, theirs):
        before = [*layer.parameters(), *layer.buffers()]
        assert layer.to(x.dtype) is layer
        same.append([a is b for a, b in zip(before, [*layer.parameters(), *layer.buffers()], strict=True)])
    assert same[0] == same[1]
    assert_same_state(ours, theirs)
    assert_close(ours(x), theirs(x))
    ours.to("meta").to_empty(device=DEVICE.type).load_state_dict(theirs.state_dict())
    assert_close(ours(x), theirs(x))
    assert_same_state(ours, theirs)


@by_module_input()
def test_memory_format(case):
    ours, _, x, _ = build(case)
    dy = torch.randn_like(x)
    expected = outcome(copy.deepcopy(ours), x, dy)
    formats = FORMATS.get(x.dim(), [torch.contiguous_format])
    for of_input, of_module in itertools.product(formats, [torch.preserve_format, *formats]):
        layer = copy.deepcopy(ours).to(memory_format=of_module)
        found = outcome(layer, x.to(memory_format=of_input), dy.to(memory_format=of_input))
        assert_close(found, expected)
        assert found[0].is_contiguous(memory_format=of_input)
        assert found[1].is_contiguous(memory_format=of_input)


@by_module_input()
def test_non_contiguous(case):
    ours, _, x, _ = build(case)
    dy = torch.randn_like(x)
    expected = outcome(copy.deepcopy(ours), x, dy)
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, dy)]
    for input, grad_output in itertools.product((x, spread[0]), (dy, spread[1])):
        assert_close(outcome(copy.deepcopy(ours), input, grad_output), expected)


@by_module_input(only=torch.float64)
@by_check
def test_module_gradients(case, check):
    layer, _, x, _ = build(case)
    names = ["", *dict(layer.named_parameters())]
    for wanted in (names, *([n] for n in names)):
        leaves = [t.detach().requires_grad_(n in wanted) for n, t in zip(names, (x, *layer.parameters()), strict=True)]
        assert check(
            lambda x, *p: functional_call(layer, dict(zip(names[1:], p, strict=True)), (x,)),
            leaves,
            check_batched_grad=True,
            fast_mode=True,
        )


@pytest.mark.parametrize("setting", settings())
def test_module_errors(setting):
    info = INFOS[setting[0]]
    errors = info.module_error_inputs_func(info, DEVICE.type, setting[1], True, setting[2])
    assert errors
    for error in errors:
        assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
        given, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        layer = modules(setting[0])[0](*given.args, **given.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            layer(*forward.args, **forward.kwargs)


def op_inputs(op, dtype, requires_grad=False):
    """Sample inputs and, where the entry has more, reference inputs: the same values from call to call."""
    return list(op.reference_inputs(DEVICE.type, dtype, requires_grad=requires_grad))


def by_op_input(only=None):
    """op, dtype, and an index into op_inputs."""
    cases = [
        pytest.param(
            op, dtype, i, id=f"{words(dtype, s.kwargs.get('training'))}-{'x'.join(map(str, s.input.shape))}-{i}"
        )
        for op in OPS
        for dtype in sorted(op.supported_dtypes(DEVICE.type), key=str)
        if only in (None, dtype)
        for i, s in enumerate(op_inputs(op, dtype))
    ]
    return pytest.mark.parametrize(("op", "dtype", "index"), cases)


@by_op_input()
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_as_torchs_function(op, dtype, index, requires_grad, strided):
    sample = op_inputs(op, dtype, requires_grad)[index]
    sample = sample.noncontiguous() if strided else sample
    found = []
    for batch_norm, to in ((subject.batch_norm, dtype), (op.op, dtype), (op.op, torch.float64)):
        tensors = [t if t is None else copy.deepcopy(t.detach()).to(to) for t in (sample.input, *sample.args)]
        leaves = [tensors[0], *tensors[3:]]
        for t in leaves:
            if t is not None:
                t.requires_grad_(requires_grad)
        output = batch_norm(*tensors, **sample.kwargs)
        assert output.requires_grad == requires_grad
        if requires_grad:
            output.backward(torch.ones_like(output).cumsum(0))
        found.append([output.detach(), *tensors[1:3], *(t if t is None else t.grad for t in leaves)])
    for name, ours, theirs, oracle in zip(OUTPUTS, *found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_strides(name, ours, theirs, sample.input)
            if dtype in HALF:
                assert_accurate(name, ours, theirs, oracle)
            else:
                assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, when forward-mode AD starts
@by_op_input(only=torch.float64)
@by_check
def test_op_gradients(op, dtype, index, check):
    sample = op_inputs(op, dtype, True)[index]
    running, parameters = sample.args[:2], sample.args[2:]
    assert op.supports_forward_ad
    assert op.supports_fwgrad_bwgrad
    assert check(
        lambda x, *p: subject.batch_norm(x, *running, *p, **sample.kwargs),
        (sample.input, *parameters),
        check_batched_grad=True,
        **{"check_forward_ad" if check is gradcheck else "check_fwd_over_rev": True},
    )
