"""Reading a checkpoint without executing anything in it."""

import argparse
import importlib.util
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read(path: Path) -> Mapping[str, Any]:
    """The state dict, or the dict with state dicts, of a file by torch.save or safetensors, on the CPU.

    Raises OSError for a file that cannot be opened, ImportError for .safetensors without that package, and ValueError
    for what is no checkpoint, is cut off, or holds more than tensors and plain values, so that loading executes code.
    """
    path.open("rb").close()
    return _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)


def _pickle(path: Path) -> Mapping[str, Any]:
    try:
        # A training script's arguments are often beside the weights; a Namespace of them does nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error follows
            mapped = zipfile.is_zipfile(path)  # what is not looked at is not read
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's text goes on to recommend weights_only=False
        if called := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"refused, as loading it would call {called[1]}: save model.state_dict()") from None
        if "TorchScript" in str(error):
            raise ValueError("refused, as it is a TorchScript program: save model.state_dict()") from None
        raise ValueError("not a checkpoint by torch.save, or cut off") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"expected a state dict in it, got {type(found).__name__}: save model.state_dict()")
    return found


def _safetensors(path: Path) -> Mapping[str, Any]:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("reading it needs safetensors: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file, or cut off ({error})") from None
    return {name: found[name] for name in sorted(found, key=_by_numbers)}  # the model's order is not in the file


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """layer.2 before layer.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
