"""Two processes on this machine that are the ranks of a torch.distributed group, over gloo."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def in_two_ranks(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """function(rank, folder, *args) in each; what it has to say it writes into folder."""
    torch.multiprocessing.spawn(_rank, (function, folder, args), nprocs=2)


def _rank(rank: int, function: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    function(rank, folder, *args)
    distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way
