"""What runs and why: python -m bnext, backend_for, is_cuda_available, and a torch that bnext was not built for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import bnext
from bnext import _build, backend, selfcheck
from bnext.__main__ import main

pytestmark = pytest.mark.bnext("bnext's environment")

ROOT = Path(__file__).parent.parent
on_cpu = pytest.mark.only("cpu", "about the CPU")


def python(*words, path=ROOT, **environment):
    """In a process of its own, which finds modules in path."""
    environment = {**os.environ, "PYTHONPATH": str(path)} | environment
    words = [sys.executable, *words]
    return subprocess.run(words, cwd=path, env=environment, capture_output=True, text=True, check=False)


def test_a_torch_that_it_was_not_built_for_is_one_sentence():
    """Before the extension is loaded, since that can also pass, or crash: the same symbols, other structs.

    What follows the + in a version, such as cpu or cu130, does not matter.
    """
    script = """
import sys, torch
version = torch.__version__.partition("+")[0]
for other in ("2.1.0", version + ".dev20260101+cu130"):
    torch.__version__ = other
    try:
        import bnext
    except ImportError as error:
        print(error)
    assert "bnext._C" not in sys.modules
torch.__version__ = version + "+other"
import bnext
"""
    done = python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, other in zip(lines, ("2.1.0", ".dev"), strict=True):
        assert other in line
        assert f"(it was built with torch {_build.torch}): rebuild it with pip install" in line


@on_cpu
def test_report(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("BNEXT_CPU_ISA", bnext.ops.cpu_isa)
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["bnext", bnext.__version__]
    report = {line[:20].strip(): line[20:] for line in lines}
    assert report["built with torch"] == report["torch"] == torch.__version__
    assert report["extension"] == bnext._C.__file__
    assert (report["cpu isa"], report["cpu isa forced"]) == (bnext.ops.cpu_isa, "True")
    assert {"OMP_NUM_THREADS=7", f"BNEXT_CPU_ISA={bnext.ops.cpu_isa}"} <= set(report["variables"].split(", "))
    assert report["self-check on cpu"] == "passed"
    assert ("cuda archs" in report) != ("no cuda kernels" in report)


@on_cpu
def test_report_as_json(capsys, monkeypatch):
    monkeypatch.delenv("BNEXT_CPU_ISA", raising=False)
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_check"]["cpu"] == "passed"
    assert (report["cpu_isa"], report["cpu_isa_forced"]) == (bnext.ops.cpu_isa, False)
    assert report["cuda_archs"] == _build.cuda_archs


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"eps": 2e-5}, "output of torch.float32, torch.contiguous_format, is off by"),
        ({"momentum": 0.11}, "running_mean of"),
    ],
)
def test_the_self_check_can_fail(change, found, capsys, monkeypatch):
    class Wrong(bnext.BatchNorm2d):
        def __init__(self, channels, eps, momentum, device):
            super().__init__(channels, **{"eps": eps, "momentum": momentum, **change}, device=device)

    monkeypatch.setattr(selfcheck, "BatchNorm2d", Wrong)
    assert main([]) == 1
    assert f"self-check on cpu   failed: {found}" in capsys.readouterr().out


def test_the_self_check_is_caught(capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: no kernel image is available\nand more")

    monkeypatch.setattr(selfcheck, "fault", broken)
    assert main(["--json"]) == 1
    assert (
        json.loads(capsys.readouterr().out)["self_check"]["cpu"] == "failed: CUDA error: no kernel image is available"
    )


@on_cpu
def test_a_report_of_what_does_not_load(tmp_path):
    """Not built, built for another torch, told nonsense, crashing, no torch: the rest is there, and no traceback."""
    shutil.copytree(ROOT / "bnext", tmp_path / "bnext", ignore=shutil.ignore_patterns("_C.*", "_build.py"))

    def report(path, **environment):
        done = python("-m", "bnext", "--json", path=path, **environment)
        assert (done.returncode, done.stderr) == (1, "")
        found = json.loads(done.stdout)
        assert found["self_check"]["cpu"] == f"failed: {found['extension']}"
        assert found["bnext"] == bnext.__version__
        return found

    assert "_build" in report(tmp_path)["built_with"]
    (tmp_path / "bnext/_build.py").write_text("torch, nvcc, cuda_archs, no_cuda = '2.1.0', '12.1.66', ['sm_90'], ''")
    found = report(tmp_path)
    assert (found["built_with_torch"], found["built_with_nvcc"], found["cuda_archs"]) == ("2.1.0", "12.1.66", ["sm_90"])
    assert "(it was built with torch 2.1.0): rebuild it" in found["extension"]
    assert "expected scalar, avx2" in report(ROOT, BNEXT_CPU_ISA="nonsense")["extension"]
    done = python("-mbnext", path=tmp_path)  # in one word
    assert (done.returncode, done.stderr) == (1, "")
    (tmp_path / "bnext/_build.py").write_text(f"torch = {torch.__version__!r}")  # as of another Python's extension
    sentence = report(tmp_path)["extension"]
    assert sentence.startswith(f"bnext's compiled part, in {tmp_path / 'bnext'}, does not load with torch")
    assert "(No module named 'bnext._C')" in sentence
    (tmp_path / "bnext/_C.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    assert report(tmp_path)["extension"] == "bnext's compiled part ends Python by SIGILL"
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    assert report(tmp_path)["torch"] == "no torch here"
    done = python("-m", "bnext", "stats", "model.pt", path=tmp_path)
    assert (done.returncode, done.stderr) == (1, "python -m bnext stats: no torch here\n")
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open\\nand more')")
    assert report(tmp_path)["torch"] == "libtorch.so: cannot open"
    done = python("-m", "bnext", "stats", "model.pt", path=tmp_path)
    assert (done.returncode, done.stderr) == (1, "python -m bnext stats: libtorch.so: cannot open\n")


def test_a_package_that_imports_bnext_runs_with_bnext_as_a_word(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/__init__.py").write_text("import bnext\nbnext.BatchNorm2d")
    (tmp_path / "train/__main__.py").touch()
    done = python("-m", "train", "--norm", "bnext", path=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stderr) == (0, "")


@on_cpu
def test_backend_for(monkeypatch):
    monkeypatch.delenv("BNEXT_CPU_ISA", raising=False)
    x = torch.randn(2, 3)
    assert bnext.backend_for(x) == ("cpu", bnext.ops.cpu_isa)
    assert bnext.backend_for(x.to("meta")).name == "meta"
    monkeypatch.setenv("BNEXT_CPU_ISA", bnext.ops.cpu_isa)
    assert bnext.backend_for(x).reason == f"{bnext.ops.cpu_isa}, as BNEXT_CPU_ISA says"
    assert bnext.backend_for(x.int()) == ("none", '"batch_norm" not implemented for torch.int32')
    assert bnext.backend_for(x[0]).name == "none"
    assert bnext.backend_for(x.to_sparse()) == ("none", "bnext has no kernels for torch.sparse_coo tensors")
    with pytest.raises(TypeError, match="expected x to be a Tensor, got list"):
        bnext.backend_for([1.0])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when forward-mode AD starts
def test_backend_for_names_the_fallbacks():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    found = []

    def see(x):
        found.append(bnext.backend_for(x))
        return x.sum()

    x = torch.randn(2, 3)
    torch.func.vmap(see)(x[None])
    with forward_ad.dual_level():
        see(forward_ad.make_dual(x, x))
    see(x.as_subclass(Own))
    reasons = ("a functorch transform", "forward-mode AD", "Own has a __torch_function__ of its own")
    assert found == [("torch", reason) for reason in reasons]


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        (["sm_80", "sm_90"], (9, 0), "sm_90"),
        (["sm_80", "sm_90"], (8, 9), "sm_80"),  # binaries run on later GPUs of their major version
        (["sm_89"], (8, 0), None),
        (["sm_90"], (10, 0), None),
        (["sm_90", "compute_90"], (12, 0), "compute_90"),  # PTX is compiled for later ones when it is loaded
        (["sm_100", "compute_100"], (9, 0), None),
        (["sm_90a"], (9, 0), "sm_90a"),
        (["sm_100a", "compute_100a"], (10, 3), None),
        ([], (9, 0), None),
    ],
)
def test_gpus_that_are_covered(archs, capability, covered, monkeypatch):
    monkeypatch.setattr(_build, "cuda_archs", archs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert bnext.is_cuda_available() == (covered is not None)
    found = backend.on_cuda(capability)
    assert found == ("cuda", covered) if covered else found.name == "none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not bnext.is_cuda_available()
