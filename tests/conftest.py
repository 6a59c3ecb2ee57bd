"""Options of the suite, and the same device, numbers, threads and precision for every test."""

from pathlib import Path

import pytest
import subject
import torch
from cuda_on_cpu import emulated


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--bn", metavar="MODULE:CLASS", help="test this nn.BatchNorm2d (and its 1d and 3d) instead")
    group.addoption("--functional", metavar="MODULE:FUNCTION", help="test this F.batch_norm instead")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="of every tensor (default: %(default)s)")
    group.addoption("--all", action="store_true", help="every cell of the grid and every mutation, not a cut of them")
    group.addoption("--sanitize", action="store_true", help="run test_sanitize.py, which takes minutes")
    group.addoption(
        "--cuda-on-cpu",
        metavar="fast|checked|PATH",
        help="test bnext's CUDA kernels, executed on the CPU, in the fast build, in the checked one, where races, "
        "accesses out of bounds and reads of nothing are errors, or from the library PATH of emulated.library()",
    )
    group.addoption("--seed", type=int, default=20150211, help="of every test's random numbers (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bnext(reason): about bnext itself, not for another batch norm")
    config.addinivalue_line("markers", "only(device, reason): for the one device and no other")
    if mode := config.getoption("--cuda-on-cpu"):
        if config.getoption("--device") != "cpu":
            raise pytest.UsageError("--cuda-on-cpu executes on the CPU: expected --device cpu, got --device cuda")
        emulated.load(emulated.library(mode) if mode in ("fast", "checked") else Path(mode))
    if config.getoption("--device") == "cuda":
        _put_everything_on_cuda()
    subject.cuda_kernels = mode is not None or config.getoption("--device") == "cuda"
    subject.choose(config.getoption("--bn"), config.getoption("--functional"))


def _put_everything_on_cuda() -> None:
    """Before test files are imported, which make tensors too; convolutions repeat their bits and round as float32."""
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no NVIDIA GPU here (torch.cuda.is_available() is False)")
    torch.set_default_device("cuda")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = "neither" if config.getoption("--cuda-on-cpu") else config.getoption("--device")
    for item in items:
        for mark in item.iter_markers("only"):
            if mark.args[0] != device:
                item.add_marker(pytest.mark.skip(reason=mark.args[1]))
        for mark in item.iter_markers("bnext"):
            if not subject.is_bnext:
                item.add_marker(pytest.mark.skip(reason=mark.args[0]))


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest):
    threads = torch.get_num_threads()
    torch.manual_seed(request.config.getoption("--seed"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_same_start: None) -> None:
    """For small tensors: a second thread gains nothing there, and loses by waiting where the cores are busy."""
    torch.set_num_threads(1)
