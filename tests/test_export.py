"""What is exported needs no bnext: torch.export, TorchScript and ONNX hold torch's batch norm, or the field's."""

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import layers
from torch import nn

pytestmark = [
    pytest.mark.bnext("bnext's fallbacks"),
    pytest.mark.only("cpu", "files of the CPU"),
    pytest.mark.usefixtures("one_thread"),
]

LOAD = """
import sys
import warnings
sys.modules["bnext"] = None
import torch
warnings.simplefilter("ignore", DeprecationWarning)
x, expected = torch.load("x.pt"), torch.load("expected.pt")
for model in torch.export.load("model.pt2").module(), torch.jit.load("traced.pt"), torch.jit.load("scripted.pt"):
    torch.testing.assert_close(model(x), expected)
"""


def network():
    """In evaluation, and torch's twin of it; the sigmoid keeps exporters from fusing."""
    ours, theirs = layers(5)
    models = [nn.Sequential(nn.Sigmoid(), layer).eval() for layer in (ours, theirs)]
    return *models, torch.randn(4, 5, 6, 7)


def test_files_load_without_bnext(tmp_path):
    ours, theirs, x = network()
    torch.save(x, tmp_path / "x.pt")
    torch.save(theirs(x), tmp_path / "expected.pt")
    torch.export.save(torch.export.export(ours, (x,)), tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        torch.jit.save(torch.jit.trace(ours, (x,)), tmp_path / "traced.pt")
        torch.jit.save(torch.jit.script(ours), tmp_path / "scripted.pt")
    subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, check=True)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporters' own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    ours, theirs, x = network()
    path = tmp_path / "model.onnx"
    dynamic = {"dynamic_shapes": ({0: "n"},)} if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(ours, (x[:2],), path, dynamo=dynamo, verbose=False, **dynamic)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [(n.domain, n.op_type) for n in model.graph.node] == [("", "Sigmoid"), ("", "BatchNormalization")]
    assert not model.functions
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), theirs(x))
