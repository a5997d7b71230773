"""Random numbers that depend on seed, purpose and window alone, never on process or batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np

Purpose = Literal["windows", "labels", "generation", "random tokens", "held-out windows", "distillation", "fine-tuning"]
PURPOSES: dict[Purpose, int] = {
    "windows": 0, "labels": 1, "generation": 2, "random tokens": 3, "held-out windows": 4, "distillation": 5,
    "fine-tuning": 6,
}  # fmt: skip


def generator(seed: int, purpose: Purpose, window: int = 0) -> np.random.Generator:
    """Return the counter-based generator of a (seed, purpose, window)."""
    return np.random.Generator(np.random.Philox(key=(seed, PURPOSES[purpose] << 48 | window)))


def epochs(windows: int, batch: int, seed: int, purpose: Purpose) -> Iterator[np.ndarray]:  # each (batch,) int64
    """Yield batches of window numbers without end: each window at most once per epoch, every epoch in another order."""
    for epoch in count():
        order = generator(seed, purpose, epoch).permutation(windows)
        yield from (order[start : start + batch] for start in range(0, windows - batch + 1, batch))


def uniforms(seed: int, purpose: Purpose, windows: range, seq_len: int) -> np.ndarray:  # (windows, seq_len) float64
    """Return uniform numbers in [0, 1), one per token of each window."""
    return np.stack([generator(seed, purpose, window).random(seq_len) for window in windows])
