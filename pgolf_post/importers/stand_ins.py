"""Harmless stand-ins for objects that people save beside the weights: NumPy numbers, argparse's namespace, a config.

`torch.load(weights_only=True)` refuses a file for one `step` of type `numpy.int64`. Such a class is replaced by one
that only remembers what it was given: nothing of the real one is imported or called. Names of other modules, functions
of the system among them, are refused as before.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

HARMLESS = ("numpy", "argparse", "types", "pathlib", "datetime", "omegaconf", "__main__")  # packages
SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NUMBERS = "iuf"  # kinds of NumPy type: signed, unsigned, floating


class StandIn:
    """An object that was saved, reduced to what it was made from."""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"an object of {type(self).__name__}"


def load_plainly(content: bytes) -> Any:
    """Load a file of torch.save as tensors, plain containers and stand-ins. Raises what torch.load raises."""
    names = [name for name in foreign_names(content) if name.split(".")[0] in HARMLESS]
    stand_ins: list[Any] = [(type(name, (StandIn,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def foreign_names(content: bytes) -> list[str]:
    """Return the names of classes and functions that a file needs and torch does not allow; nothing if unreadable."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception:  # a forged pickle breaks the reader in any way it likes; loading it says how
        return []


def number_of(value: StandIn) -> float | int | None:
    """Return a saved NumPy number; None for any other object."""
    if type(value).__name__ not in SCALAR or len(value.args) != 2:
        return None
    kind, stored = value.args
    text = kind.args[0] if isinstance(kind, StandIn) and kind.args and isinstance(kind.args[0], str) else ""
    try:
        dtype = np.dtype(text.lstrip("<>=|")).newbyteorder("<")
        return np.frombuffer(stored, dtype)[0].item() if dtype.kind in NUMBERS else None
    except (TypeError, ValueError, IndexError):
        return None
