"""torch.ao.quantization goes by torch's exact classes: after revert_batchnorm its flows give what they give torch's."""

import copy

import pytest
import torch
from helpers import by_mode
from torch import nn

import bnext

ao = pytest.importorskip("torch.ao.quantization")
fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

ENGINE = next((e for e in ("x86", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines), None)

pytestmark = [
    pytest.mark.bnext("bnext.revert_batchnorm"),
    pytest.mark.only("cpu", "quantized operators of the CPU"),
    pytest.mark.skipif(ENGINE is None, reason="torch has no quantized operators here"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # torch.ao is deprecated, and says so in many words
]

FUSED = [["0", "1", "2"], ["3", "4"]]


def batch():
    return torch.rand(4, 3, 6, 5)


def network():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    model(batch())
    return model


def eager(model, x):
    fused = (ao.fuse_modules_qat if model.training else ao.fuse_modules)(model, FUSED)
    fused.qconfig = (ao.get_default_qat_qconfig if model.training else ao.get_default_qconfig)(ENGINE)
    prepared = (ao.prepare_qat if model.training else ao.prepare)(ao.QuantWrapper(fused))
    prepared(x)
    return ao.convert(prepared.eval())


def by_graph(model, x):
    mapping = (ao.get_default_qat_qconfig_mapping if model.training else ao.get_default_qconfig_mapping)(ENGINE)
    prepared = (fx.prepare_qat_fx if model.training else fx.prepare_fx)(model, mapping, (x,))
    prepared(x)
    return fx.convert_fx(prepared.eval())


@by_mode
@pytest.mark.parametrize("flow", [eager, by_graph])
def test_a_reverted_network(flow, training, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", ENGINE)
    theirs, x, outputs = network(), batch(), []
    ours = bnext.revert_batchnorm(bnext.convert_batchnorm(copy.deepcopy(theirs)))
    for model in (ours, theirs):
        quantized = flow(model.train(training), x)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in quantized.modules())
        outputs.append(quantized(x))
    assert torch.equal(*outputs)


def test_fusing_before_reverting_is_an_error():
    with pytest.raises(AssertionError, match=r"fuser method.*bnext\.modules\.BatchNorm2d"):
        ao.fuse_modules(bnext.convert_batchnorm(network()).eval(), FUSED)
