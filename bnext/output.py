"""What the command lines print."""

import math
from typing import Any


def first_line(error: Exception) -> str:
    """Of what it says; its class where it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__


def finite(value: Any) -> Any:
    """The same with None for every float that is infinite or no number, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
