"""Score-first as a data structure: what has been scored, once, and what may therefore be trained on.

Test-time training is legal only where a token's nats are final before any step has seen it. Here that is no convention:
every protocol commits its nats to a log, which takes each target once, and a training loop gets its tokens from the
log alone, which hands out only ranges that are committed. A loop that trains first does not run.

Ranks each have a log of what they have scored themselves. `merge` makes them one: only from then on does a rank hand
out what another has scored, and turns go on from the latest, so that they prove the order across ranks too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pgolf_post.base.ranks import Ranks
from pgolf_post.errors import VerificationError
from pgolf_post.score.bpb import require_finite


class CommitError(VerificationError):
    """A target scored twice or not at all, or a token asked for training before it was scored."""


class ScoreOnceError(CommitError):
    """A target scored twice, or not at all, or a place that is none."""


@dataclass(frozen=True)
class HandedOut:
    """A range of tokens handed out for training, and how many commits there had been by then."""

    turn: int
    start: int
    stop: int


class CommitLog:
    """Nats of the targets 1 … num_targets of a text, each committed once. Turns count commits from 0."""

    def __init__(self, tokens: np.ndarray, num_targets: int) -> None:  # tokens: (n,)
        self.tokens, self.num_targets = tokens, num_targets
        self.nats = np.zeros(len(tokens))  # float64
        self.turn = np.full(len(tokens), -1, dtype=np.int64)  # the commit that scored each target; -1 = none yet
        self.turns = 0
        self.handed_out: list[HandedOut] = []
        self._merged = np.zeros(len(tokens), dtype=bool)  # targets that every rank knows

    @property
    def scored(self) -> np.ndarray:  # (n,) bool
        return self.turn >= 0

    def commit(
        self,
        places: np.ndarray,  # (k,) int64, places of targets in the text
        nats: np.ndarray,  # (k,)
    ) -> None:
        """Record the nats of targets, for good. Raises ScoreOnceError for a second time, NumericsError for NaN."""
        outside = places[(places < 1) | (places > self.num_targets)]
        if len(outside):
            raise ScoreOnceError(f"place {int(outside[0])} is no target; targets are 1..{self.num_targets}")
        kinds, times = np.unique(places, return_counts=True)
        again = np.concatenate([places[self.scored[places]], kinds[times > 1]])
        if len(again):
            raise ScoreOnceError(
                f"target {int(again[0])} would be scored twice; a target's first score is its only one"
            )
        require_finite(self.tokens, places, nats)
        self.nats[places] = nats
        self.turn[places] = self.turns
        self.turns += 1

    def hand_out(self, start: int, stop: int) -> np.ndarray:  # (stop - start,) int64
        """Return tokens [start, stop) for training. Raises CommitError unless every one of them has been scored.

        The text's first token is never a target and free to use.
        """
        early = np.flatnonzero(~self.scored[max(1, start) : stop])
        if len(early) or not 0 <= start <= stop <= self.num_targets + 1:
            place = max(1, start) + int(early[0]) if len(early) else stop
            raise CommitError(
                f"tokens {start}..{stop - 1} were asked for training, but token {place} has not been scored yet"
            )
        self.handed_out.append(HandedOut(self.turns, start, stop))
        return self.tokens[start:stop].astype(np.int64)

    def require_complete(self) -> None:
        """Raise ScoreOnceError unless every target has been scored."""
        missing = np.flatnonzero(~self.scored[1 : self.num_targets + 1]) + 1
        if len(missing):
            raise ScoreOnceError(f"{len(missing)} of {self.num_targets} targets were never scored, first {missing[0]}")

    def merge(self, ranks: Ranks, start: int = 0, stop: int | None = None) -> None:
        """Bring together what ranks have scored of places [start, stop) since the last time.

        Raises ScoreOnceError if two scored the same target.
        """
        if ranks.world_size == 1:
            return

        # what this rank alone knows of the places, as tensors that can be summed
        part = slice(start, stop)
        own = torch.from_numpy(self.scored[part] & ~self._merged[part]).to(ranks.device)
        times = own.long()
        nats, turn = (torch.from_numpy(x[part]).to(ranks.device) for x in (self.nats, self.turn))
        nats, turn = nats * own, torch.where(own, turn, -1)
        last_turn = torch.tensor([self.turns], device=ranks.device)

        # no target may have been scored by two ranks
        ranks.sum_(times)
        if int(times.max()) > 1:
            place = start + int(times.argmax())
            raise ScoreOnceError(f"target {place} was scored by {int(times.max())} ranks")

        # every rank takes over what the others have scored
        ranks.sum_(nats)
        ranks.maximum_(turn)
        ranks.maximum_(last_turn)
        new = (times > 0).cpu().numpy()
        self.nats[part][new], self.turn[part][new] = nats.cpu().numpy()[new], turn.cpu().numpy()[new]
        self._merged[part] |= new
        self.turns = int(last_turn)

    def close(self, ranks: Ranks) -> None:
        """Merge everything, ranges handed out too; one that several ranks took together counts once."""
        self.merge(ranks)
        if ranks.world_size > 1:
            rows = ranks.gather(torch.from_numpy(self._handed_out_rows()).to(ranks.device))
            self.handed_out = [HandedOut(*row) for row in sorted(set(map(tuple, rows.tolist())))]

    def _handed_out_rows(self) -> np.ndarray:  # (ranges, 3) int64
        return np.array([(x.turn, x.start, x.stop) for x in self.handed_out], dtype=np.int64).reshape(-1, 3)

    def state(self) -> dict[str, np.ndarray]:
        """Return everything but the text, to go on from later, under the names that kept passes have on disk."""
        counts = {"turns": np.array([self.turns]), "lessons": self._handed_out_rows()}
        return {"nats": self.nats, "turn": self.turn, **counts}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `state` returned."""
        self.nats, self.turn = state["nats"].copy(), state["turn"].copy()
        self.turns = int(state["turns"][0])
        self.handed_out = [HandedOut(*map(int, row)) for row in state["lessons"]]
