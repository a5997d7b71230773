"""Nats of targets from hidden states, and an observer of whole distributions.

A family's module gives logits; their softmax is the distribution that is scored. A module that mixes distributions of
its own (an n-gram expert, a cache) may define `log_probs(hidden)` instead, (…, dim) → (…, vocab_size): then that is
scored as it is, and whether it sums to one is for the audit to find out.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 512  # distributions in memory, of a vocabulary of some thousands
LEAST_LOG_PROB = -1e4  # what a mark takes for log 0


class Observer:
    """A keeper of the distributions at chosen targets, for the audit: what sums up each of them, and some whole.

    A target's first distribution is the one that counts: what is shown of it later changes nothing.
    """

    def __init__(
        self,
        watched: np.ndarray,  # (k,) places of targets
        tokens: np.ndarray | None = None,  # (n,) whose probabilities are kept: of each target, the one here
        whole: np.ndarray | None = None,  # places whose distributions are kept whole; None: all that are watched
    ) -> None:
        self.watched = {int(place) for place in watched}
        self.whole = self.watched if whole is None else {int(place) for place in whole}
        self.tokens = tokens
        self.log_probs: dict[int, np.ndarray] = {}  # place → (vocab_size,) float64
        size = max(self.watched, default=0) + 1
        self.total = np.full(size, np.nan)  # Σp; NaN where nothing was shown
        self.own = np.full(size, np.nan)  # log p of the token in `tokens`
        self.mark = np.full(size, np.nan)  # Σ u·log p, u fixed and random: another distribution has another mark

    @property
    def shown(self) -> np.ndarray:  # (k,) int64, ascending
        """Places of which a distribution was shown."""
        return np.flatnonzero(~np.isnan(self.total))

    def see(self, places: np.ndarray, log_probs: Tensor) -> None:  # (k,), (k, vocab_size)
        """Take in the distributions that are watched and were not shown before."""
        new = [row for row, place in enumerate(places.tolist()) if place in self.watched]
        new = [row for row in new if np.isnan(self.total[places[row]])]
        for start in range(0, len(new), ROWS_AT_ONCE):
            rows = new[start : start + ROWS_AT_ONCE]
            self._see(np.asarray(places)[rows], log_probs[rows].detach().double().cpu())

    def _see(self, places: np.ndarray, log_probs: Tensor) -> None:
        self.total[places] = log_probs.exp().sum(dim=-1).numpy()
        finite = log_probs.clamp(min=LEAST_LOG_PROB)
        self.mark[places] = (finite * _random_weights(log_probs.size(-1))).sum(dim=-1).numpy()
        if self.tokens is not None:
            targets = torch.from_numpy(self.tokens[places].astype(np.int64))
            self.own[places] = log_probs.gather(-1, targets[:, None])[:, 0].numpy()
        for row, place in enumerate(places.tolist()):
            if place in self.whole:
                self.log_probs[place] = log_probs[row].numpy().copy()


@functools.cache
def _random_weights(vocab_size: int) -> Tensor:  # (vocab_size,) float64, of norm 1 about
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / vocab_size**0.5


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
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        with torch.no_grad():
            observer.see(places[some], distribution(module, hidden[some]))
