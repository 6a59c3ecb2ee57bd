"""The suite can fail: faults put into a copy of bnext are noticed; all of mutations.py with --all, else a cut."""

import shutil

import pytest
from mutate import CHECKOUT, Copy, mutated
from mutations import MUTATIONS
from torch.utils.cpp_extension import get_cxx_compiler

pytestmark = [
    pytest.mark.bnext("mutates bnext's sources"),
    pytest.mark.only("cpu", "mutates the CPU kernels and what is common to all, and judges it on the CPU"),
    pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="not in a checkout"),
]
needs_compiler = pytest.mark.skipif(shutil.which(get_cxx_compiler()) is None, reason="needs a C++ compiler")

# One of each layer that is cheap: tiling, dispatch, host, autograd, module, function, fallbacks, fakes, conversion.
CUT = {
    "counter-moved-twice",
    "planes-cut-short",
    "output-contiguous",
    "double-backward-of-constants",
    "tracking-ignored",
    "eps-ignored",
    "always-torch",
    "fake-strides",
    "convert-copies",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mutation" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all")
        wanted = [m for m in MUTATIONS if every or m.name in CUT]
        metafunc.parametrize("mutation", wanted, ids=[m.name for m in wanted])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Copy:
    """A copy in which the mutations' tests pass."""
    copy = Copy(tmp_path_factory.mktemp("mutations"))
    every = request.config.getoption("--all")
    copy.check([m for m in MUTATIONS if every or m.name in CUT])
    return copy


@needs_compiler
def test_is_noticed(mutation, copy):
    if not copy.has_units_for(mutation):
        pytest.skip("this machine lacks the instruction set")
    assert copy.killer(mutation) is not None


def test_each_has_its_place_and_a_name():
    for mutation in MUTATIONS:
        source = (CHECKOUT / mutation.file).read_text()
        assert mutated(mutation, source) != source, mutation.name
    names = {m.name for m in MUTATIONS}
    assert len(names) == len(MUTATIONS)
    assert names >= CUT
