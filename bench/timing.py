"""The one timer of the project, and the settings that its figures rest on."""

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

_Result = TypeVar("_Result")
_Call = Callable[[], object]

# mallopt(3) and malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_FIRST_SPIN = 2**20  # clock cycles: half a millisecond or more
_LONGEST_SPIN = 2**26

_WARM_ROUNDS, _MIN_ROUNDS = 10, 5


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median of its timings, their 20th and 80th percentiles, and how many there were."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """That of one or more timings."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))

    @property
    def noise(self) -> float:
        """Half the distance between the percentiles, relative to the median: 0.02 reads as +-2 %."""
        return (self.p80 - self.p20) / 2 / self.median

    def as_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


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


@dataclass(frozen=True)
class Budget:
    """When to stop: after min_time seconds, once no call is noisier than max_noise, or else after timeout seconds.

    In any case after five rounds or more. run_once: one round, and none to warm up.
    """

    min_time: float
    max_noise: float
    timeout: float
    run_once: bool = False


def interleaved(calls: Sequence[_Call], budget: Budget, device: str, flush: bool = True) -> list[tuple[float, ...]]:
    """The seconds of each call: a tuple of timings for each, all called in turn, a new one first in every round.

    Taking turns lets a change in the machine's speed fall on all of them. Rounds before are for warming up, until one
    is no longer 5 % faster than the fastest so far. A result is freed right after its timing, so that the next call
    can have the memory. On the CPU tensors that fit the cache are found there; on CUDA nothing is, unless flush is
    False.
    """
    one_round = _CudaRounds(flush) if device == "cuda" else _cpu_round
    if budget.run_once:
        return [(seconds,) for seconds in one_round(calls)]
    fastest = math.inf
    for _ in range(_WARM_ROUNDS):
        taken = sum(one_round(calls))
        if taken > 0.95 * fastest:
            break
        fastest = taken
    samples: list[list[float]] = [[] for _ in calls]
    judged = budget.min_time
    start = time.perf_counter()
    for first in itertools.count():
        order = [(first + i) % len(calls) for i in range(len(calls))]
        for i, seconds in zip(order, one_round([calls[i] for i in order]), strict=True):
            samples[i].append(seconds)
        elapsed = time.perf_counter() - start
        if first + 1 < _MIN_ROUNDS or elapsed < judged:
            continue
        judged = min(1.1 * elapsed, budget.timeout)  # seldom: judging sorts all timings, and leaves the caches cold
        if elapsed >= budget.timeout or all(Spread.of(taken).noise <= budget.max_noise for taken in samples):
            break
    return [tuple(taken) for taken in samples]


def _cpu_round(calls: Sequence[_Call]) -> list[float]:
    return [timed(call)[1] for call in calls]


class _CudaRounds:
    """Rounds on the current CUDA stream, timed by its events: what the GPU takes, and nothing that the host does.

    A kernel that only spins goes first, for as long as the host needs to queue the whole round behind it. With flush,
    a buffer of twice the L2 cache is written before each call, so that no call finds there what another one left.
    """

    def __init__(self, flush: bool) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * cache if flush else 0, dtype=torch.uint8, device="cuda")
        self._spin = _FIRST_SPIN

    def __call__(self, calls: Sequence[_Call]) -> list[float]:
        """The seconds of each call."""
        while True:
            spun, pairs = self._queue(calls)
            ran_dry = spun.query()
            torch.cuda.synchronize()
            if not ran_dry or self._spin >= _LONGEST_SPIN:  # a call that waits for the GPU has no queue to fill
                return [1e-3 * start.elapsed_time(end) for start, end in pairs]
            self._spin *= 2

    def _queue(self, calls: Sequence[_Call]) -> tuple[torch.cuda.Event, list[tuple[torch.cuda.Event, ...]]]:
        """The event after the spin, and those around each call."""
        spun = torch.cuda.Event()
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in calls]
        torch.cuda._sleep(self._spin)
        spun.record()
        for call, (start, end) in zip(calls, pairs, strict=True):
            self._flush.zero_()
            start.record()
            call()
            end.record()
        return spun, pairs


def captured(call: _Call) -> _Call:
    """The call as a CUDA graph, to be replayed: what the GPU does, without the host's part in starting it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # outside of the capture first, as torch asks for
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result  # which the graph writes to, and must therefore stay

    return replay
