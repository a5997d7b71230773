"""Yardsticks: compressors that no artifact uses, measured on the same symbols as the codecs that ship."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class SymbolUnit(NamedTuple):
    """The symbols of one role."""

    matrices: Sequence[np.ndarray]  # (rows, columns) each, int8 or int16
    planes: bytes  # one after another: all low bytes, then all high bytes


class Encoded(NamedTuple):
    """Encoded size of a model under a yardstick, unit by unit."""

    raws: Sequence[bytes]  # what each stream must decode to
    streams: Sequence[bytes]
    side_bytes: int  # needed to decode, shared by the units: dictionaries, orders of rows
    decompress: Callable[[bytes], bytes]


class Yardstick(NamedTuple):
    """One way to compress all symbols of a model, for comparison only."""

    encode: Callable[[Sequence[SymbolUnit]], Encoded]
    missing: Callable[[], str]  # why it cannot run here, with the remedy; empty if it can
    source: str
