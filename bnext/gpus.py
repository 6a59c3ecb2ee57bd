"""What the planner asks of a GPU, for some GPUs: from the vendor's data sheets and the CUDA programming guide."""

from typing import Any

_NO_CLUSTERS = (0, 0, 0, 0)


def _gpu(
    multiprocessors: int,
    shared_kib: tuple[int, int],
    threads: int,
    l2_mib: int,
    gb_per_s: int,
    clustered: tuple[int, int, int, int] = _NO_CLUSTERS,
) -> dict[str, Any]:
    """As csrc/cuda/plan.h's Device. shared_kib: of a block, of a multiprocessor."""
    return {
        "multiprocessors": multiprocessors,
        "shared_per_block": shared_kib[0] * 1024,
        "shared_per_multiprocessor": shared_kib[1] * 1024,
        "threads_per_multiprocessor": threads,
        "l2": l2_mib * 2**20,
        "bandwidth": gb_per_s * 10**9,
        "clustered": clustered,
        "cooperative": True,  # as all that torch 2.11 supports are
    }


# How many blocks in clusters run at once is an assumption that nobody has measured: a cluster lies in one part of the
# chip, whose multiprocessors it may not divide. Of the GPU at hand it is asked.
GPUS = {
    "t4": _gpu(40, (64, 64), 1024, 4, 320),
    "a100": _gpu(108, (163, 164), 2048, 40, 2039),  # SXM, 80 GB
    "l4": _gpu(58, (99, 100), 1536, 48, 300),
    "rtx4090": _gpu(128, (99, 100), 1536, 72, 1008),
    "l40s": _gpu(142, (99, 100), 1536, 96, 864),
    "h100": _gpu(132, (227, 228), 2048, 50, 3350, (132, 132, 128, 128)),  # SXM
    "h200": _gpu(132, (227, 228), 2048, 60, 4800, (132, 132, 128, 128)),
    "b200": _gpu(148, (227, 228), 2048, 126, 8000, (148, 144, 144, 128)),
}
