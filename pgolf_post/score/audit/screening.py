"""Screening: many tokens changed in one run, to find the few whose change alone should be looked at.

A run with one token changed tests one distribution exactly, and is too dear to repeat for every hundredth token. So
tokens are changed together, far enough apart that no window reads two of them: before each of them the run must be the
unchanged one again, and whatever moved up to a changed token makes it a suspect. Where a model learns as it goes, what
follows the first change moves anyway; there suspects are those that move most beside the targets shortly before them.
A suspect is no finding: its token is changed alone, in a run of its own.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.data import BOS_ID
from pgolf_post.score.audit.causality import Baseline, another_token, movement

RARE = 0.01  # share of targets at which a fault should be found
LEAST_SPACING = 16  # tokens between two that are changed in one run
LEARNING_RUNS = 16  # about, where every run trains
MOST_RUNS = 128
NEAR, BEFORE = 4, 8  # targets up to the changed one that may move no more than those from `BEFORE` on
SUSPICIOUS = 1.5  # times the movement before


@dataclass(frozen=True)
class Suspect:
    """A changed token up to which the run moved: by so much, beside what moved before."""

    place: int
    shift: float
    ratio: float  # infinite where nothing had moved before


@dataclass(frozen=True)
class Plan:
    """The places that each run of a screening changes."""

    runs: list[list[int]]
    drawn: int  # of the places, those that were drawn evenly, which the power counts
    targets: int  # of the excerpt, BOS apart

    @property
    def changed(self) -> int:
        return sum(map(len, self.runs))

    @property
    def power(self) -> float:
        """Probability that one of the places drawn is one of the rare ones; 1 where every target was drawn."""
        return 1.0 if self.drawn == self.targets >= 1 / RARE else 1 - (1 - RARE) ** self.drawn


def needed_targets(power: float) -> int:
    """Return how many targets, drawn evenly, have a rare one among them with this probability."""
    return math.ceil(math.log1p(-power) / math.log1p(-RARE))


def plan_screening(base: Baseline, power: float, random: np.random.Generator) -> Plan:
    """Choose the places that runs change: odd ones, and enough drawn evenly for the power that is wanted."""
    places = base.order[base.tokens[base.order] != BOS_ID]
    needed = needed_targets(power)

    # odd ones first: the first tokens of documents, and the targets that were predicted best
    after_bos = random.permutation(places[base.tokens[places - 1] == BOS_ID])
    best = places[np.argsort(base.log.nats[places], kind="stable")]
    odd = dict.fromkeys([*after_bos[: max(8, needed // 8)].tolist(), *best[: max(8, needed // 8)].tolist()])
    drawn = random.permutation(places)[:needed].tolist()

    # then all of them, each in the first run that has room for it
    wanted = list(dict.fromkeys([*odd, *drawn]))
    spacing = base.audited.protocol.seq_len + 1 + BEFORE  # beyond what one of them can move
    if base.log.handed_out:
        spacing = min(spacing, max(LEAST_SPACING, LEARNING_RUNS * len(base.tokens) // len(wanted)))
    runs = pack(wanted, max(LEAST_SPACING, spacing))
    taken = {place for run in runs for place in run}
    return Plan(runs, sum(place in taken for place in drawn), len(places))


def pack(places: Sequence[int], spacing: int) -> list[list[int]]:
    """Return places in runs, those of one run at least `spacing` apart; those that no run has room for are left out."""
    runs: list[list[int]] = []
    for place in places:
        room = next((run for run in runs if all(abs(place - other) >= spacing for other in run)), None)
        if room is None and len(runs) < MOST_RUNS:
            room = []
            runs.append(room)
        if room is not None:
            insort(room, place)
    return runs


def screen(base: Baseline, plan: Plan, random: np.random.Generator, advance: Callable[..., None]) -> list[Suspect]:
    """Change tokens in many places at once, run by run. Returns suspects, the most suspicious first."""
    suspects: list[Suspect] = []
    for places in plan.runs:
        suspects += _suspects(base, places, random)
        advance()
    return sorted(suspects, key=lambda one: (-one.ratio, -one.shift))


def _suspects(base: Baseline, places: list[int], random: np.random.Generator) -> list[Suspect]:
    """Change tokens in one run. Returns those up to which the run moved more than shortly before."""
    changed = base.tokens.copy()
    for place in places:
        changed[place] = another_token(base.tokens, place, random)

    # a target that is itself the same has a score to compare besides
    log, moved = base.rerun(changed)
    same = changed == base.tokens
    moved[same] += movement(base.log.nats, log.nats)[same]

    suspects, begin = [], 0
    for place in sorted(places, key=lambda place: int(base.rank[place])):
        end = int(base.rank[place]) + 1
        shift, ratio = suspicion(moved[base.order[begin:end]], begin == 0)
        suspects += [Suspect(place, shift, ratio)] if shift > 0 and ratio > SUSPICIOUS else []
        begin = end
    return suspects


def suspicion(moved: np.ndarray, is_first: bool) -> tuple[float, float]:  # (k,) → nats, and times what is usual
    """Judge the targets after one changed token, or from the beginning, up to and with the next changed one.

    The earlier token may have moved those that follow it, as far as windows reach. After a target that did not move
    none may; where all moved, the last ones may not move more than those shortly before.
    """
    still = np.flatnonzero(moved == 0)
    if is_first or len(still):
        after = moved if is_first else moved[still[0] :]
        return float(after.max(initial=0.0)), math.inf
    near, before = moved[-NEAR:], moved[-BEFORE:-NEAR]
    usual = float(before.max(initial=0.0))
    return float(near.max()), float(near.max()) / usual if usual else math.inf
