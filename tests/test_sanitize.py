"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: make sanitize.

The first two judge the parity suite, in a Python of its own for each instruction set; the third a program. With --all,
faults are put into a copy of the kernels, and must be reported.
"""

import os
import shutil
import sys

import pytest
from mutate import mutated
from mutations import parse
from sanitize import build
from test_isa import UNITS

pytestmark = [
    pytest.mark.bnext("about bnext's CPU kernels"),
    pytest.mark.only("cpu", "about the CPU kernels"),
    pytest.mark.skipif(not (build.ROOT / "setup.py").exists(), reason="not in a checkout"),
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs GCC's sanitizers")

LOOPS = ["test_forward", "test_backward"]
HOST = ["test_running_stats", "test_errors", "test_ops", "test_threads"]
NOT_KERNELS = "traced or opcheck or two_threads_work"  # torch's tracing, and time

# What must be reported: what is wrong, where, and, of the extension, the test that comes upon it.
FAULTS = {
    "AddressSanitizer: heap-buffer-overflow": """
write-past-the-end: the elementwise pass writes an element too many
csrc/cpu/map.inl test_forward::test_affine
- ++i) store_one(out + i, f(
+ ++i) store_one(out + i + 1, f(

read-past-the-end: the last sum of a run takes four whole vectors
csrc/cpu/reduce.inl test_forward::test_affine
- for (; i + 4 * kSlots <= size; i += 4 * kSlots)
+ for (; i < size; i += 4 * kSlots)
""",
    "runtime error: signed integer overflow": """
count-in-32-bits: the number of values goes through a product of 32 bits
csrc/cpu/backward.inl test_backward::test_shapes
- static_cast<double>(p.count());
+ static_cast<double>(static_cast<int>(p.count()) * 65536 / 65536);
""",
    "runtime error: store to misaligned address": """
store-of-a-vector: a vector is stored as if its place were aligned
csrc/cpu/vec.h test_forward::test_affine
- } else {
-     std::memcpy(p, &v, sizeof(v));
+ } else {
+     *static_cast<V*>(p) = v;
""",
    "ThreadSanitizer: data race": """
one-partial-for-all: the chunks of rows have one partial result together
csrc/cpu/forward.inl threads
- double* partial = scratch.partials + 3 * k * p.C;
+ double* partial = scratch.partials + 0 * k;

pieces-overlap: two threads write the element between their pieces of a plane, and the same into it
csrc/cpu/dispatch.cpp threads
- plane + p.S * (i + 1) / pieces}
+ plane + std::min(p.S, p.S * (i + 1) / pieces + 1)}

scratch-kept: calls share their scratch
csrc/cpu/dispatch.cpp threads
- std::vector<double> partials(reduces ? 3 * tiling.chunks * p.C : 0), factors(5 * (Row(p.C).width() + 32));
+ static std::vector<double> partials, factors;
+ partials.resize(3 * tiling.chunks * p.C), factors.resize(5 * (Row(p.C).width() + 32));
""",
}
MUTATIONS = [(parse(block), report) for report, blocks in FAULTS.items() for block in blocks.strip().split("\n\n")]
by_fault = pytest.mark.parametrize(("fault", "report"), MUTATIONS, ids=[fault.name for fault, _ in MUTATIONS])


def suite(package, unit, *arguments):
    """Runs tests on the bnext in the folder package, from there, so that it is the one imported."""
    # Reports go to the file descriptor 2, which pytest must leave alone.
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--capture=sys", "-p", "no:cacheprovider", *arguments]
    return build.run(command, package, {**build.preloaded(), "BNEXT_CPU_ISA": unit})


def threads(command, unit):
    return build.run(command, build.ROOT, {**os.environ, "BNEXT_CPU_ISA": unit, "TSAN_OPTIONS": "halt_on_error=1"})


@pytest.fixture(scope="module")
def asked_for(request: pytest.FixtureRequest):
    if not any(request.config.getoption(option) for option in ("--sanitize", "--all")):
        pytest.skip("takes minutes: --sanitize or --all")


@pytest.fixture(scope="module")
def all_asked_for(request: pytest.FixtureRequest):
    if not request.config.getoption("--all"):
        pytest.skip("takes minutes: --all")


@pytest.fixture(scope="module")
def extension(asked_for):
    return build.extension()


@linux
@pytest.mark.parametrize("unit", UNITS)
def test_address_and_undefined(unit, extension):
    """All for the best unit, of the others the loops."""
    names = LOOPS + HOST if unit == UNITS[-1] else LOOPS
    done = suite(extension, unit, "-k", f"not ({NOT_KERNELS})", *(build.ROOT / f"tests/{name}.py" for name in names))
    assert done.returncode == 0, done.stdout[-8000:]


@linux
@pytest.mark.parametrize("unit", UNITS)
def test_threads(unit, asked_for):
    done = threads(build.threads(), unit)
    assert done.returncode == 0, done.stdout[-8000:]
    assert done.stdout == f"{unit}\n"


@linux
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_no_store_is_hidden(extension):
    """Sanitizers see no streaming store: where __SANITIZE_ADDRESS__ or __SANITIZE_THREAD__ is defined, none is made."""
    units = [*(extension / "temp").rglob("cpu/*.o")]
    assert len(units) >= len(UNITS)
    for unit in units:
        assert "movnt" not in build.run(["objdump", "-d", "--no-show-raw-insn", unit], build.ROOT).stdout, unit.name


@linux
@by_fault
def test_reports(fault, report, all_asked_for, extension, tmp_path):
    csrc = shutil.copytree(build.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / fault.file
    source.write_text(mutated(fault, source.read_text()))
    if fault.tests == ("tests/threads",):
        done = threads(build.threads(csrc, tmp_path / "build"), "scalar")
    else:
        tests = [build.ROOT / test for test in fault.tests]
        done = suite(build.extension_with(csrc, tmp_path), "scalar", *tests)
    assert done.returncode != 0
    assert report in done.stdout, done.stdout[-8000:]


@by_fault
def test_each_fault_has_its_place(fault, report):
    mutated(fault, (build.ROOT / fault.file).read_text())
