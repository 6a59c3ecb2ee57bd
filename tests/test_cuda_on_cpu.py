"""The execution of CUDA kernels on the CPU: it runs good kernels rightly and notices planted bugs."""

import shutil
import subprocess

import pytest
from cuda_on_cpu import build

pytestmark = [
    pytest.mark.bnext("about CUDA kernels"),
    pytest.mark.only("cpu", "about their execution on the CPU"),
    pytest.mark.skipif(
        shutil.which("nvcc") is None and build.toolkit_headers() is None,
        reason="neither nvcc nor the CUDA toolkit's headers",
    ),
]


@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_selftest(mode: build.Mode):
    selftest = build.build("selftest", [build.HERE / "selftest.cu"], mode)
    run = subprocess.run([selftest], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.rstrip().endswith(" passed, 0 failed")
