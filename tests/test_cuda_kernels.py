"""The CUDA kernels, executed on the CPU: the suite on them, what only they promise, and faults planted in them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_on_cpu import build, emulated
from cuda_on_cpu.mutations import MUTATIONS
from mutate import mutated
from mutations import Mutation

pytestmark = [
    pytest.mark.bnext("about bnext's CUDA kernels"),
    pytest.mark.only("cpu", "executes the kernels on the CPU"),
    pytest.mark.skipif(
        shutil.which("nvcc") is None and build.toolkit_headers() is None,
        reason="neither nvcc nor the CUDA toolkit's headers",
    ),
]

# The tests of results; with --all, every test.
NAMES = ("forward", "backward", "running_stats", "guarded", "errors", "ops", "module", "act")
PARITY = [f"tests/test_{name}.py" for name in NAMES]
# One barrier of each kind, a bound, a tail, the counter, alignment, traffic.
CUT = {
    "barrier-in-warps",
    "grid-barrier",
    "cluster-not-waited-for",
    "group-reads-early",
    "counter-read-while-written",
    "one-slot-too-many",
    "tail-missing",
    "resident-reads-again",
    "gate-open",
}

# By process, of which the first takes longest.
CHECKS = [[f"tests/cuda_on_cpu/{name}_checks.py" for name in names] for names in (["kernel"], ["fused", "traffic"])]
Run = subprocess.Popen[str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutation" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all")
        wanted = [m for m in MUTATIONS if every or m.name in CUT]
        metafunc.parametrize("mutation", wanted, ids=[m.name for m in wanted])


def start(library: Path, *arguments: str) -> Run:
    """pytest on the kernels of this library, as a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--cuda-on-cpu={library}", *arguments]
    # One thread: the kernels have no use for a second, and several of these processes run at once.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.Popen(
        command, cwd=build.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_passes(run: Run) -> None:
    output = run.communicate(timeout=3600)[0]
    assert run.returncode == 0, output[-5000:]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[list[Run]]:
    """The suite on the fast build, and the checks on the checked one in two processes, side by side."""
    every = request.config.getoption("--all")
    layers = "tests/cuda_on_cpu/resnet_checks.py"
    found = [start(emulated.library("fast"), *(["tests"] if every else PARITY), layers)]
    found += [start(emulated.library("checked"), *checks) for checks in CHECKS]
    yield found
    for run in found:
        run.kill()
        run.communicate()


def test_suite(runs):
    assert_passes(runs[0])


def test_checks(runs):
    for run in runs[1:]:
        assert_passes(run)


def test_huge_problems():
    """More elements than 32 bits count: the first and the last that each task takes."""
    run = subprocess.run(
        [build.build("geometry", [build.HERE / "geometry.cu"], "fast")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc, to be broken and mended."""
    return Path(shutil.copytree(build.ROOT / "csrc", tmp_path_factory.mktemp("mutations") / "csrc"))


def without_fused(launch: str) -> str:
    """csrc/cuda/launch.cuh without the kernels of what follows a batch norm: most of what there is to compile."""
    others = launch[launch.index("    if constexpr (has_relu(") : launch.index("  };\n  const auto with = ")]
    return launch.replace("    using Tile = typename decltype(tile)::type;\n", "").replace(
        others, "    return cudaErrorNotSupported;\n"
    )


def test_fault_is_noticed(mutation: Mutation, copy: Path):
    path, launch = copy.parent / mutation.file, copy / "cuda/launch.cuh"
    before, every_kernel = path.read_text(), launch.read_text()
    if not any("fused_checks" in test for test in mutation.tests):
        launch.write_text(without_fused(every_kernel))
    path.write_text(mutated(mutation, path.read_text()))
    try:
        library = emulated.library("checked", "mutation", copy)
    finally:
        path.write_text(before)
        launch.write_text(every_kernel)
    run = start(library, "-x", "--tb=short", *mutation.tests)
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 1, output[-3000:]
    assert "1 failed" in output


def test_each_fault_has_its_place():
    assert {m.name for m in MUTATIONS} >= CUT
    for mutation in MUTATIONS:
        source = (build.ROOT / mutation.file).read_text()
        assert mutated(mutation, source) != source, mutation.name
