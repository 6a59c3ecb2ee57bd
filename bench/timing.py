"""The one timer of the project, and the allocator setting that its figures rest on."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_Result = TypeVar("_Result")

# mallopt(3) and malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Makes glibc reuse freed memory instead of returning it to the kernel; False where there is no mallopt.

    By default a large tensor may come from fresh pages, and zeroing those costs the kernel more time than a
    batch norm takes; whether it does depends on the state of the heap. With everything kept, all candidates
    write to pages that have been written before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 256 * 2**20))
    return all([mallopt(name, value) == 1 for name, value in settings])


def timed(call: Callable[[], _Result]) -> tuple[_Result, float]:
    """What call returns, and how many seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def interleaved(calls: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[float]:
    """The median seconds of each call, all called in turn, for at least so many rounds and so many seconds.

    Taking turns lets a change in the machine's speed fall on all of them; one round to warm up is not
    counted. A result is freed right after its timing, so that the next call can have the memory. Tensors that
    fit the cache are found there.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for call, taken in zip(calls, times, strict=True):
            taken.append(timed(call)[1])
    return [statistics.median(taken) for taken in times]
