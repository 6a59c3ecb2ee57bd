"""The same numbers, threads and precision for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    threads = torch.get_num_threads()
    torch.manual_seed(20150211)
    yield
    torch.set_num_threads(threads)
