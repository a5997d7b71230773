"""Choosing among blends: score a family on a growing sample of windows, and drop what cannot win.

Every candidate is scored on the same windows, drawn from the text in an order of the seed. After each round (an eighth,
a quarter, half, all of the sample) the leader is the candidate with the lowest bpb so far; another is dropped as soon
as the paired interval of its difference to the leader, documents as clusters, excludes that it is better by more than
the tolerance. The search stops when the leader is alone, or the sample used up. The level is divided among all the
intervals that can be looked at (Bonferroni), so that the chance of ever dropping a better candidate is what it says.

What a candidate is scored by can be exchanged: by default its loss, or what its loss is expected to be after rounding
(`pgolf_post.fit.after_fit`).

The winner's bpb on the sample is an optimistic number: it won on that sample. With a handful of candidates and paired
differences the optimism is far below the interval, and choosing on validation text is what every ablation of the
leaderboard does; `--search-data` chooses on another text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from pgolf_post.average.linear import DEFAULT_SELECTION, Blend, Part, linear_blend, require_trained, swa_parts
from pgolf_post.average.members import select_members
from pgolf_post.average.settings import SearchSettings, Selection
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import load_module, train_seq_len
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import require_tokenizer
from pgolf_post.score.compare.paired import Difference, pair, t_interval
from pgolf_post.score.plain import PlainProtocol, protocol_windows, score_windows

EMA_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
ROUNDS = (0.125, 0.25, 0.5, 1.0)  # of the sample


@dataclass
class Candidate:
    """A blend of the family, and its score on the windows drawn so far."""

    name: str
    ema_share: float
    parts: Sequence[Part]
    score: Score | None = None
    dropped: int | None = None  # the round after which it was
    seconds: float = 0.0  # that blending and scoring took in all rounds

    @property
    def scored(self) -> Score:
        assert self.score is not None
        return self.score


@dataclass
class Search:
    """A finished search. Intervals are at `interval_level`, which is `settings.level` divided among all of them."""

    candidates: list[Candidate]
    winner: Candidate
    control: Candidate
    settings: SearchSettings
    interval_level: float
    windows: int  # in the sample
    alive: list[int] = field(default_factory=list)  # candidates left after each round

    @property
    def tokens(self) -> int:
        """Tokens scored in all."""
        return sum(candidate.scored.tokens for candidate in self.candidates)

    def difference(self, candidate: Candidate) -> Difference:
        """Return the difference to the control, on the windows that both were scored on."""
        return t_interval(pair(candidate.scored, self.control.scored), self.interval_level)

    def facts(self) -> dict[str, Any]:
        """Return the search as JSON facts."""
        rows = [
            {"name": c.name, "bpb": c.scored.bpb, "dropped": c.dropped, **self.difference(c).facts()}
            for c in self.candidates
        ]
        chosen = {"winner": self.winner.name, "control": self.control.name, "tokens_scored": self.tokens}
        return {**chosen, **self.settings.model_dump(), "alive": self.alive, "candidates": rows}


def family(final: Checkpoint, selection: Selection = DEFAULT_SELECTION) -> list[Candidate]:
    """Return SWA of the members at five EMA shares, SWA of the last n, and the final raw weights with and without."""
    require_trained(final)
    has_ema = "ema" in final.meta["views"]
    members = select_members(final, selection)
    shares = EMA_SHARES if has_ema else (0.0,)
    candidates = [
        Candidate(_name(share, f"SWA of {len(members)}"), share, swa_parts(final, share, selection)) for share in shares
    ]
    for last in range(len(members) - 1, 0, -1):
        for share in (0.5, 0.0) if has_ema and last == 1 else (0.0,):
            parts = swa_parts(final, share, Selection(last=last))
            candidates.append(Candidate(_name(share, f"SWA of last {last}" if last > 1 else "raw"), share, parts))
    return candidates


def _name(ema_share: float, other: str) -> str:
    if ema_share in (0.0, 1.0):
        return "EMA" if ema_share else other
    return f"{ema_share:.0%} EMA, {1 - ema_share:.0%} {other}"


@dataclass(frozen=True)
class Sample:
    """Windows of a text in the order in which they are drawn, in rounds."""

    tokens: np.ndarray  # (n,) uint16
    token_bytes: np.ndarray  # (n,) int64
    spans: list[tuple[int, int]]  # all windows of the text
    rounds: list[np.ndarray]  # each (windows,) int64, indices of spans, ascending

    @classmethod
    def draw(cls, data: DataFolder, seq_len: int, settings: SearchSettings) -> Sample:
        """Draw a sample of a data folder's validation split. Raises MismatchError if that is shorter than a window."""
        tokens = data.tokens("val")
        spans = protocol_windows(tokens, PlainProtocol(seq_len=seq_len))
        count = min(len(spans), max(1, settings.max_tokens // seq_len))
        order = np.random.default_rng(settings.seed).permutation(len(spans))[:count]
        bounds = sorted({0, *(max(1, round(share * count)) for share in ROUNDS)})
        rounds = [np.sort(order[start:stop]) for start, stop in pairwise(bounds)]
        return cls(tokens, data.token_bytes("val", tokens), spans, rounds)


ScoreBlend = Callable[[str, Blend, Sample, np.ndarray], Score]  # name, blend, sample, windows → their sums


def score_loss(name: str, blend: Blend, sample: Sample, chosen: np.ndarray) -> Score:
    """Return the loss of a blend on some of a sample's windows."""
    module = load_module(blend.reference.config, blend.tensors, name).to(ALONE.device)
    return score_windows(module, sample.tokens, sample.token_bytes, sample.spans, chosen, name)


def search_blends(
    final: Checkpoint,
    candidates: list[Candidate],
    data: DataFolder,
    settings: SearchSettings,
    allow_different: Sequence[str] = (),
    score: ScoreBlend = score_loss,
) -> Search:
    """Score candidates round by round until one is left or the sample is used up; the first is the control."""
    require_tokenizer(final.config, data, str(final.path))
    sample = Sample.draw(data, train_seq_len(final.config), settings)
    level = 1 - (1 - settings.level) / (len(sample.rounds) * max(1, len(candidates) - 1))
    search = Search(candidates, candidates[0], candidates[0], settings, level, sum(map(len, sample.rounds)))
    for number, chosen in enumerate(sample.rounds, 1):
        alive = [candidate for candidate in candidates if candidate.dropped is None]
        with progress_bar(f"round {number} on {len(chosen)} windows", len(alive), "blends") as advance:
            for candidate in alive:
                started = time.perf_counter()
                blend = linear_blend(candidate.parts, allow_different)
                _add(candidate, score(candidate.name, blend, sample, chosen))
                candidate.seconds += time.perf_counter() - started
                advance(note=candidate.name)
        search.winner = _drop(alive, level, settings.tolerance, number)
        search.alive.append(sum(candidate.dropped is None for candidate in candidates))
        say(f"round {number}: {search.alive[-1]} of {len(candidates)} left, {search.winner.name} leads")
        if search.alive[-1] == 1:
            break
    return search


def _add(candidate: Candidate, score: Score) -> None:
    """Append newly scored windows to those scored before."""
    if candidate.score is None:
        candidate.score = score
        return
    names = ("window", "document", "piece", "unit_nats", "unit_tokens", "unit_bytes")
    joined = {name: np.concatenate([getattr(candidate.score, name), getattr(score, name)]) for name in names}
    candidate.score = replace(score, **joined, seconds=candidate.score.seconds + score.seconds)


def _drop(alive: Sequence[Candidate], level: float, tolerance: float, number: int) -> Candidate:
    """Drop candidates whose interval excludes being better than the leader by the tolerance. Return the leader."""
    leader = min(alive, key=lambda candidate: candidate.scored.bpb)
    for candidate in alive:
        if candidate is not leader:
            difference = t_interval(pair(candidate.scored, leader.scored), level)
            candidate.dropped = number if difference.low > -tolerance else None
    return leader
