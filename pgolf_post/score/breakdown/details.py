"""Notes of a pass beside its nats: how much context each target had, and what the model thought most likely instead.

Kept by place in the text like the log of commits, so that a pass that was stopped goes on, and ranks add up. Costs one
more product with the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.score.nats import distribution

if TYPE_CHECKING:
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.score.commits import CommitLog

NAMES = ("context", "guess", "confidence", "rank")


class Details:
    """Arrays over the places of a text, (n,) each; zero where nothing was noted. Sized by the first note."""

    def __init__(self) -> None:
        self.context = np.zeros(0, dtype=np.int64)  # tokens that the target's window held before it
        self.guess = np.zeros(0, dtype=np.int64)  # the most likely token
        self.confidence = np.zeros(0)  # float64, its probability
        self.rank = np.zeros(0, dtype=np.int64)  # tokens that were more likely than the actual one
        self.nats = np.zeros(0)  # float64, filled by `close`
        self.places = np.zeros(0, dtype=np.int64)  # scored targets, ascending; filled by `close`

    def resize(self, num_tokens: int) -> None:
        """Make room for a text. Does nothing where there is."""
        if len(self.context) != num_tokens:
            for name in NAMES:
                setattr(self, name, np.zeros(num_tokens, dtype=getattr(self, name).dtype))

    @torch.no_grad()
    def note(
        self,
        module: Any,  # a LanguageModel
        hidden: Tensor,  # (k, dim)
        targets: Tensor,  # (k,) int64
        places: np.ndarray,  # (k,) int64, -1 where the row is padding
        context: np.ndarray,  # (k,) int64
        num_tokens: int,  # of the whole text
    ) -> None:
        """Note what a module thinks of targets."""
        self.resize(num_tokens)
        log_probs = distribution(module, hidden)
        own = log_probs.gather(-1, targets[:, None])
        most, guess = log_probs.max(dim=-1)
        rank = (log_probs > own).sum(dim=-1)
        real = places >= 0
        where = places[real]
        self.context[where] = context[real]
        self.guess[where] = guess.cpu().numpy()[real]
        self.confidence[where] = most.double().exp().cpu().numpy()[real]
        self.rank[where] = rank.cpu().numpy()[real]

    def close(self, log: CommitLog, ranks: Ranks) -> None:
        """Bring together what ranks noted, and take over the nats of a complete log."""
        self.resize(len(log.tokens))
        for name in NAMES:
            noted = torch.from_numpy(getattr(self, name)).to(ranks.device)
            ranks.sum_(noted)  # a target is scored by one rank; all others hold a zero
            setattr(self, name, noted.cpu().numpy())
        self.places = np.flatnonzero(log.scored)
        self.nats = log.nats[self.places]

    def state(self) -> dict[str, np.ndarray]:
        """Return what was noted so far."""
        return {name: getattr(self, name) for name in NAMES}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned."""
        for name in NAMES:
            setattr(self, name, state[name].copy())
