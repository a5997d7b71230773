"""zpaq through the lrzip program (`lrzip -z -L 9`), as the record submissions used it: measured, never shipped.

zpaq mixes context models bit by bit, which is the strongest general compressor at hand and takes as long to decode as
to encode. The program is a package of most Linux distributions. Like the record scripts, matrices are transposed, and
`lrzip-similar` sorts their rows so that each is followed by the one nearest to it; the orders are stored.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import brotli
import numpy as np

from pgolf_post.errors import NotFoundError, PgolfError
from pgolf_post.pack.codecs.yardstick import Encoded, SymbolUnit

PROGRAM = "lrzip"
SIMILARITY_ROWS = 1 << 13  # a greedy order takes rows² · columns steps: larger matrices keep theirs


def missing() -> str:
    """Return why the program cannot be run here, or ""."""
    return "" if shutil.which(PROGRAM) else "the program lrzip is not installed (apt-get install lrzip)"


def encode(units: Sequence[SymbolUnit], by_similarity: bool = False) -> Encoded:
    """Compress each unit by itself, its matrices transposed."""
    arranged = [arrange(unit.matrices, by_similarity) for unit in units]
    side_bytes = len(brotli.compress(b"".join(orders for _, orders in arranged)))
    raws = [raw for raw, _ in arranged]
    return Encoded(raws, [compress(raw) if raw else b"" for raw in raws], side_bytes, _decompress_any)


def encode_similar(units: Sequence[SymbolUnit]) -> Encoded:
    """Compress each unit by itself, its matrices' rows sorted by similarity."""
    return encode(units, by_similarity=True)


def arrange(matrices: Sequence[np.ndarray], by_similarity: bool) -> tuple[bytes, bytes]:
    """Return the matrices transposed, one after another, and the orders of their rows as uint16."""
    orders = [similarity_order(m) if by_similarity and len(m) <= SIMILARITY_ROWS else None for m in matrices]
    ordered = [m if order is None else m[order] for m, order in zip(matrices, orders, strict=True)]
    raw = b"".join(np.ascontiguousarray(m.T).tobytes() for m in ordered)
    return raw, b"".join(order.astype("<u2").tobytes() for order in orders if order is not None)


def similarity_order(symbols: np.ndarray) -> np.ndarray:  # (rows, columns) → (rows,) int
    """Return rows in greedy order: from row 0 on, each followed by the nearest (L1) of those left."""
    left = np.arange(len(symbols))
    wide = symbols.astype(np.int32)
    order: list[int] = []
    while len(left):
        nearest = 0 if not order else int(np.abs(np.subtract(wide[left], wide[order[-1]])).sum(axis=1).argmin())
        order.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return np.array(order, int)


def compress(raw: bytes) -> bytes:
    """Return one .lrz file. Raises NotFoundError without the program, PgolfError if it fails."""
    return _run(raw, "-z", "-L", "9")


def decompress(stream: bytes) -> bytes:
    """Return the bytes of one .lrz file. Raises NotFoundError without the program, PgolfError if it fails."""
    return _run(stream, "-d")


def _decompress_any(stream: bytes) -> bytes:
    return decompress(stream) if stream else b""


def _run(content: bytes, *flags: str) -> bytes:
    if missing():
        raise NotFoundError(f"the program {PROGRAM} is not installed", hint="apt-get install lrzip")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(content)
        command = [PROGRAM, "-q", "-f", *flags, "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not out.is_file():
            raise PgolfError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return out.read_bytes()
