"""Random numbers that depend on the seed and on what they are for, never on which process or batch asks."""

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
    """A counter-based generator of its own for each (seed, purpose, window)."""
    return np.random.Generator(np.random.Philox(key=(seed, PURPOSES[purpose] << 48 | window)))


def epochs(windows: int, batch: int, seed: int, purpose: Purpose) -> Iterator[np.ndarray]:  # each (batch,) int64
    """Endless batches of window numbers: each at most once per epoch, in an order of its own."""
    for epoch in count():
        order = generator(seed, purpose, epoch).permutation(windows)
        yield from (order[start : start + batch] for start in range(0, windows - batch + 1, batch))


def uniforms(seed: int, purpose: Purpose, windows: range, seq_len: int) -> np.ndarray:  # (windows, seq_len) float64
    """Numbers in [0, 1), one per token of each window."""
    return np.stack([generator(seed, purpose, window).random(seq_len) for window in windows])
