"""The CUDA kernels on the batch norms of ResNet-50, with as few images as a test has time for.

pytest tests/cuda_on_cpu/resnet_checks.py --cuda-on-cpu fast
"""

from collections.abc import Iterator

import pytest
from cuda_on_cpu import emulated
from helpers import DTYPES, by_layout, channel_arguments, check, values

from bench.cases import shape_text
from bench.suites import SUITES

RESNET50 = [layer.sizes for layer in SUITES["resnet50"].layers]

by_case = pytest.mark.parametrize("case", RESNET50, ids=shape_text)


@pytest.fixture(autouse=True)
def _gpu(one_thread: None) -> Iterator[None]:
    if emulated.module is None:
        pytest.skip("needs --cuda-on-cpu fast")
    emulated.reset(multiprocessors=16)
    yield
    emulated.reset()


@by_case
@by_layout
@pytest.mark.parametrize("strategy", ["streaming", ""], ids=["streaming", "planned"])
def test_layers(case, layout, strategy):
    assert emulated.module is not None
    emulated.module.force(strategy)
    dtype, param_dtype = DTYPES[(RESNET50.index(case) + (strategy == "")) % len(DTYPES)]
    shape = (2, *case)
    x, dy = (values(shape, dtype, layout) for _ in range(2))
    arguments = channel_arguments(case[0], param_dtype)
    check(x, grad_output=dy, **arguments)
    if strategy == "":
        check(x, grad_output=dy, training=False, **arguments)
