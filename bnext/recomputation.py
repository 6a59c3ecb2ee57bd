"""checkpoint_context: activation checkpointing that counts a batch once."""

import contextlib
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


class _Recomputation(threading.local):
    """The context of a recomputation; active: whether this thread is in one.

    It is entered anew for each backward of a retained graph, and again inside itself where checkpoints are nested.
    """

    def __init__(self) -> None:
        self.active = False  # of the instance: torch.compile guards no default of the class
        self._outer: list[bool] = []

    def __enter__(self) -> None:
        self._outer.append(self.active)
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = self._outer.pop()


recomputation = _Recomputation()


def checkpoint_context() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The context_fn of torch.utils.checkpoint with which a checkpointed batch norm sees a batch once:

        checkpoint(function, *args, use_reentrant=False, context_fn=bnext.checkpoint_context)

    While function is computed a second time, for its backward, bnext's layers and bnext.batch_norm normalise by the
    batch as the first time, to the last bit, and leave running buffers and num_batches_tracked alone. Without it both
    move a second time, as torch's do (pytorch#96136); with it still those of torch's layers, of layers that fall back
    to torch's batch norm, and in threads that function starts. use_reentrant=True takes no context_fn: torch raises
    ValueError.
    """
    if torch.compiler.is_compiling():
        # It takes none but its own contexts, and what it computes again has no side effects.
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    return contextlib.nullcontext(), recomputation
