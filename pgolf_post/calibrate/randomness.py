"""Random numbers that depend on the seed and on what they are for, never on which process or batch asks."""

from __future__ import annotations

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


def uniforms(seed: int, purpose: Purpose, windows: range, seq_len: int) -> np.ndarray:  # (windows, seq_len) float64
    """Numbers in [0, 1), one per token of each window."""
    return np.stack([generator(seed, purpose, window).random(seq_len) for window in windows])
