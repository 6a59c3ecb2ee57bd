"""Options of the suite, and the same numbers, threads and precision for every test."""

import pytest
import subject
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--bn", metavar="MODULE:CLASS", help="test this nn.BatchNorm2d (and its 1d and 3d) instead")
    group.addoption("--functional", metavar="MODULE:FUNCTION", help="test this F.batch_norm instead")
    group.addoption("--all", action="store_true", help="every cell of the grid and every mutation, not a cut of them")
    group.addoption("--seed", type=int, default=20150211, help="of every test's random numbers (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "bnext(reason): about bnext itself, not for another batch norm")
    subject.choose(config.getoption("--bn"), config.getoption("--functional"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if subject.is_bnext:
        return
    for item in items:
        for mark in item.iter_markers("bnext"):
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
