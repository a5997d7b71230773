"""Nats of targets from hidden states, and an observer of whole distributions.

A family's module gives logits; their softmax is the distribution that is scored. A module that mixes distributions of
its own (an n-gram expert, a cache) may define `log_probs(hidden)` instead, (…, dim) → (…, vocab_size): then that is
scored as it is, and whether it sums to one is for the audit to find out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Observer:
    """A keeper of the whole distribution at chosen targets, for the audit."""

    def __init__(self, watched: np.ndarray) -> None:  # (k,) places of targets
        self.watched = {int(place) for place in watched}
        self.log_probs: dict[int, np.ndarray] = {}  # place → (vocab_size,) float64

    def see(self, places: np.ndarray, log_probs: Tensor) -> None:  # (k,), (k, vocab_size)
        """Keep the rows that are watched."""
        for row, place in enumerate(places.tolist()):
            if place in self.watched:
                self.log_probs[place] = log_probs[row].double().cpu().numpy()


def target_nats(
    module: Any,  # a LanguageModel
    hidden: Tensor,  # (k, dim)
    targets: Tensor,  # (k,) int64
) -> Tensor:  # (k,)
    """Return -log p of each target."""
    if hasattr(module, "log_probs"):
        return -module.log_probs(hidden).gather(-1, targets[:, None])[:, 0]
    return F.cross_entropy(module.logits(hidden), targets, reduction="none")


def distribution(module: Any, hidden: Tensor) -> Tensor:  # (k, dim) → (k, vocab_size)
    """Return the log-probabilities that `target_nats` picks from."""
    if hasattr(module, "log_probs"):
        log_probs: Tensor = module.log_probs(hidden)
        return log_probs
    return F.log_softmax(module.logits(hidden), dim=-1)


def observe(observer: Observer | None, module: Any, hidden: Tensor, places: np.ndarray) -> None:
    """Show an observer the distributions at the places it watches."""
    if observer is None:
        return
    rows = [row for row, place in enumerate(places.tolist()) if place in observer.watched]
    if rows:
        with torch.no_grad():
            observer.see(places[rows], distribution(module, hidden[rows]))
