"""The package as people meet it: names and the build's switches."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnext

pytestmark = pytest.mark.bnext("bnext's package")

ROOT = Path(__file__).parent.parent


def test_public_names():
    assert sorted(bnext.__all__) == sorted(name for name in bnext.__all__ if hasattr(bnext, name))
    assert re.fullmatch(r"\d+\.\d+\.\d+", bnext.__version__)


def test_built_for_this_torch():
    assert bnext._build.torch == torch.__version__


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout")
@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"BNEXT_FORCE_CPU": "1", "BNEXT_FORCE_CUDA": "1"}, "exclude each other"),
        ({"BNEXT_FORCE_CUDA": "1", "CUDA_HOME": "/no/such/toolkit"}, "/no/such/toolkit has no CUDA headers"),
        ({"CXX": "/no/such/compiler"}, "needs a C++ compiler"),
    ],
    ids=["both", "cuda", "compiler"],
)
def test_refused_builds_say_why(switches, sentence, tmp_path):
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, **switches},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode != 0
    assert sentence in build.stderr.strip().splitlines()[-1]
    assert "Traceback" not in build.stderr


@pytest.mark.skipif(bnext._build.cuda_archs, reason="about builds without CUDA kernels")
@pytest.mark.only("cpu", "about builds without CUDA kernels")
@pytest.mark.parametrize("op", ["train", "eval", "backward"])
def test_cuda_tensors_without_cuda_kernels(op):
    """What a CUDA tensor would meet: the op's implementation for CUDA, called directly."""
    operator = getattr(torch.ops.bnext, f"batch_norm_{op}").default
    x, mean, var = torch.randn(2, 3), torch.zeros(3), torch.ones(3)
    arguments = {
        "train": (x, None, None, None, None, None, 0.1, 1e-5),
        "eval": (x, None, None, mean, var, 1e-5),
        "backward": (x, x, None, mean, var, True, [True, True, True]),
    }
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match="this bnext was built without CUDA kernels: rebuild it"):
        operator.redispatch(cuda, *arguments[op])


def test_torch_missing_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    build = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode != 0
    assert "pip install torch" in build.stderr
    assert "Traceback" not in build.stderr
