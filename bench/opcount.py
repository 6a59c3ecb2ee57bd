"""Counts the operators that torch dispatches: proof of which batch norm ran."""

from collections import Counter
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class OpCounter(TorchDispatchMode):
    """After `with OpCounter() as ops`, ops.count["bnext::batch_norm_train"] says how often that op ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
