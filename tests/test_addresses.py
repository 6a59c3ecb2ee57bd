"""Where tensors lie in memory decides in which order they are written, but not one bit of a result."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import by_dtype, by_layout, channel_arguments, values
from torch import Tensor

import bnext

pytestmark = [
    pytest.mark.bnext("how bnext's CPU kernels go through memory"),
    pytest.mark.only("cpu", "how the CPU kernels go through memory"),
]

PAGE, LINE = 4096, 64
SHAPES = [(8, 64, 14, 14), (9, 40, 7, 7), (3, 5, 9, 31), (70, 33)]


class Places:
    """Copies of x that begin so many bytes into a page, all in the same memory."""

    def __init__(self, x: Tensor):
        self.x, self.bytes = x, x.numel() * x.element_size()
        self.buffer = torch.empty(self.bytes + 2 * PAGE, dtype=torch.uint8)

    def at(self, offset: int) -> Tensor:
        begin = -self.buffer.data_ptr() % PAGE + offset
        storage = self.buffer[begin : begin + self.bytes].view(self.x.dtype)
        return storage.as_strided(self.x.shape, self.x.stride()).copy_(self.x)


def before(x: Tensor, y: Tensor) -> bool:
    """Whether x lies a line or two before y, but for whole pages."""
    return 0 < (y.data_ptr() - x.data_ptr()) % PAGE <= 2 * LINE


@by_layout
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_bit_depends_on_where_tensors_lie(shape, dtype, layout):
    torch.manual_seed(1)
    arguments = channel_arguments(shape[1], dtype)
    weight, bias = (arguments[name].requires_grad_() for name in ("weight", "bias"))
    input, grad_output = (Places(values(shape, dtype, layout)) for _ in range(2))
    first, near, tries, chance = None, set(), 0, random.Random(1)
    while tries < 64 or (len(near) < 4 and tries < 2048):  # where results lie is the allocator's choice
        x, dy = (place.at(LINE * chance.randrange(PAGE // LINE)) for place in (input, grad_output))
        x.requires_grad_()
        y = bnext.batch_norm(x, None, None, weight, bias, True)
        found = [y, *torch.autograd.grad(y, [x, weight, bias], dy)]
        near |= {("forward", before(x, y)), ("backward", before(dy, found[1]))}
        first = first or [t.detach().clone() for t in found]
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))
        tries += 1
    assert len(near) == 4  # both passes, in both orders


def test_nor_past_the_caches():
    if "BNEXT_CPU_LLC" in os.environ:
        pytest.skip("this is that run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    environment = {**os.environ, "BNEXT_CPU_LLC": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
