"""The true CUDA extension, built for two architectures, with --all for four: no GPU is needed for that, nor to look at
what nvcc made.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Kernels for each architecture: 4 dtypes, 5 tiles, streaming or resident; in 3 dtypes and of 3 tiles ReLU's own.
PLAIN = ANY = 2 * 40
RELU = 3 * 18  # of the forward, and of the backward with and without a mask
INSTANCES = PLAIN + RELU + ANY

pytestmark = [
    pytest.mark.bnext("about bnext's CUDA kernels"),
    pytest.mark.only("cpu", "builds on the CPU"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
]


@pytest.fixture(scope="module")
def archs(request: pytest.FixtureRequest) -> list[str]:
    """Those that the extension is built for: without a wish and a GPU, or the two most used."""
    return ["80", "90", "100", "120"] if request.config.getoption("--all") else ["80", "90"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, archs: list[str]) -> tuple[Path, str]:
    """A folder with the package, and what the build printed. Of the CPU kernels little is asked, and -O1 is enough."""
    folder = tmp_path_factory.mktemp("cuda")
    flags = {"NVCC_APPEND_FLAGS": "-Xptxas -v -Werror all-warnings", "BNEXT_CXXFLAGS": "-O1"}
    environment = {**os.environ, "BNEXT_FORCE_CUDA": "1", **flags}
    for name in ("BNEXT_FORCE_CPU", "TORCH_CUDA_ARCH_LIST"):
        environment.pop(name, None)
    if len(archs) < 4:
        environment["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{arch[:-1]}.{arch[-1]}" for arch in archs)
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "temp"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    shutil.copytree(
        ROOT / "bnext", folder / "bnext", ignore=shutil.ignore_patterns("_C.*", "_build.py"), dirs_exist_ok=True
    )
    return folder, run.stdout


def test_loads_without_a_gpu(built, archs):
    """It links, loads, knows its architectures, has the ops for both devices, and its CPU kernels work."""
    code = """
import torch, bnext
print(bnext.__file__)
print(*bnext._build.cuda_archs)
for op in ("train", "eval", "backward", "act_train", "act_eval", "act_backward"):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bnext::batch_norm_{op}", key)
x = torch.randn(4, 3, 5, 5)
torch.testing.assert_close(
    bnext.batch_norm(x, None, None, training=True), torch.nn.functional.batch_norm(x, None, None, training=True)
)
"""
    folder, _ = built
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    names = [f"sm_{arch}" for arch in archs] + ["compute_100"] * (len(archs) == 4)
    assert run.stdout.split() == [str(folder / "bnext/__init__.py"), *names]


def test_nothing_spills(built, archs):
    """Registers suffice, but for a few words of kernels with eight channels in a thread and what follows them.

    The number of instances is what it is meant to be.
    """
    entry = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = entry.findall(built[1])
    wanted = dict.fromkeys((f"sm_{arch}" for arch in archs), INSTANCES + 1)  # and the probe of device.cu
    assert Counter(arch for _, arch, *_ in found) == wanted
    for name, arch, frame, *spilled, registers in found:
        columns = "Backward" in name and "Rows" in name and "float16" in name.lower()
        assert frame == "0" or (columns and "AfterE0" not in name and int(frame) <= 24), (name, arch, spilled)
        assert int(registers) <= 128, (name, arch)


@cache
def disassembly(library: Path, arch: str) -> dict[str, Counter[str]]:
    """How often each kernel has each access to global memory, by the kernel's template arguments."""
    spec = find_spec("nvidia")
    folders = [Path(p) / "cu13/bin" for p in (spec.submodule_search_locations or [])] if spec else []
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    if shutil.which("cuobjdump", path=path) is None:
        pytest.fail("cuobjdump is not there: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    sass = subprocess.run(
        [shutil.which("cuobjdump", path=path), "-sass", "-arch", arch, library],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    named = subprocess.run(["c++filt"], input=sass, capture_output=True, text=True, check=True).stdout
    kernels = {}
    for text in re.split(r"\n\s*Function : ", named)[1:]:
        name = re.search(r"kernel<(.*)>\(", text.split("\n", 1)[0])
        if name is None:
            continue  # the probe of device.cu
        plain = re.sub(r"bnext::(cuda|device)::", "", name[1])
        kernels[plain] = Counter(re.findall(r"\b(?:LDG|STG)\.[A-Z0-9.]+", text))
    return kernels


def test_tensors_move_16_bytes_at_a_time(built, archs):
    """In the kernels for whole packs. Tensors are read through the read-only cache, [C] arrays are not."""
    (library,) = (built[0] / "bnext").glob("_C*.so")
    for arch in archs:
        kernels = disassembly(library, f"sm_{arch}")
        assert len(kernels) == INSTANCES
        whole = {name: accesses for name, accesses in kernels.items() if re.search(r"<[A-Za-z0-9]+, true", name)}
        assert len(whole) == (PLAIN + ANY) * 3 // 5 + RELU
        plain = {name: accesses for name, accesses in whole.items() if "(After)0" in name}
        assert len(plain) == PLAIN * 3 // 5
        for name, accesses in whole.items():
            narrow = [kind for kind in accesses if "CONSTANT" in kind and "128" not in kind]
            assert narrow == [], (name, narrow)
        check_plain(plain)


def check_plain(kernels: dict[str, Counter[str]]) -> None:
    """The numbers of accesses in kernels of batch norm alone."""
    for name, accesses in kernels.items():
        backward, half, columns, resident = name.startswith("Backward"), "16" in name, "Rows" in name, ">, true" in name
        unrolled = 2 if backward and columns and (half or resident) else 4
        again = 2 if backward and resident else unrolled  # at once of what is read again
        tensors = 2 if backward else 1
        wide = {kind: n for kind, n in accesses.items() if "128" in kind}
        loads = sum(n for kind, n in wide.items() if kind.startswith("LDG"))
        stores = sum(n for kind, n in wide.items() if kind.startswith("STG"))
        # What is kept is loaded to leave the L2 cache first, and what is not is not.
        assert loads == (unrolled * (2 if resident else 1) + again) * tensors, (name, accesses)
        # In training, and twice in evaluation; or of what is kept and what is not. Past the L2 cache, and not.
        times = unrolled + again if resident else unrolled * (3 if backward else 1)
        assert stores == 2 * times, (name, accesses)
        if not columns:  # what is left are [C] arrays of either dtype; the packs of a tensor would be 32 of these
            assert accesses["LDG.E.U16"] <= 16, (name, accesses)
            assert accesses["STG.E.U16"] <= 4, (name, accesses)
