"""The one measure of memory: what a call has allocated at its peak."""

import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType, profiler

# Read when the profiler first starts; from 6 on it does not write to stderr that it has started and stopped.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The bytes that one call has allocated at its peak beyond what was there before, its results included.

    Only torch's allocators are seen: not, for one, scratch that a CPU kernel keeps in a std::vector, nor oneDNN's
    own. call should free nothing that was there before: on the CPU that is not seen, and torch warns of it on stderr.
    On CUDA the allocator rounds each block up to 512 bytes, and device is the current one.
    """
    return _cuda_peak(call) if device == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(call: Callable[[], object]) -> int:
    with profiler.profile(profile_memory=True) as profile:
        call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak
