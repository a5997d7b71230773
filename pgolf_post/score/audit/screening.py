"""Screening: many tokens changed in one run, to find the few whose change alone should be looked at.

A run with one token changed tests one distribution exactly, and is too dear to repeat for every hundredth token. So
tokens are changed together, far enough apart that no window reads two of them: before each of them the run must be the
unchanged one again, and whatever moved up to a changed token makes it a suspect. Where a model learns as it goes, what
follows the first change moves anyway; there suspects are those that move most beside the targets shortly before them.
A suspect is no finding: its token is changed alone, in a run of its own.

Tokens changed together hide what looks ahead further than they let a run settle. That is what cuts are for: runs in
which everything from some target on is another text (causality.py), exact at any distance, and the fewer are needed the
further a fault looks. A plan has both, and knows for each distance which targets its runs would see.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from pgolf_post.data import BOS_ID
from pgolf_post.score.audit.causality import Baseline, another_token, movement

RARE = 0.01  # share of targets at which a fault should be found
LEAST_SPACING = 16  # tokens between two that are changed in one run
LEARNING_RUNS = 16  # about, where every run trains
MOST_RUNS = 128
NEAR, BEFORE = 4, 8  # targets up to the changed one that may move no more than those from `BEFORE` on
SUSPICIOUS = 1.5  # times the movement before
REACH = 24  # tokens ahead that screening sees; cuts see what looks further


@dataclass(frozen=True)
class Suspect:
    """A changed token up to which the run moved: by so much, beside what moved before."""

    place: int
    shift: float
    ratio: float  # infinite where nothing had moved before


@dataclass(frozen=True)
class Plan:
    """The places that each run of a screening changes, and the cuts from which on others change everything."""

    runs: list[list[int]]
    cuts: np.ndarray  # (k,) int64, ascending ranks of targets
    drawn: dict[int, int]  # places of `runs` that were drawn evenly → how far before them a look ahead is seen
    rank: np.ndarray  # (n,) int64: place → rank
    targets: int  # of the excerpt, BOS apart

    @property
    def changed(self) -> int:
        return sum(map(len, self.runs))

    @property
    def num_runs(self) -> int:
        return len(self.runs) + len(self.cuts)

    def seen(self, distance: int) -> int:
        """Return how many targets, in an even draw, would be seen to depend on the token `distance` behind them."""
        by_screening = [self.rank[place] - distance for place, reach in self.drawn.items() if reach >= distance]
        by_cuts = [np.arange(cut - distance, cut) for cut in self.cuts]
        ranks = np.unique(np.concatenate([np.array(by_screening, dtype=np.int64), *by_cuts]))
        return int(np.count_nonzero(ranks >= 0))

    @cached_property
    def powers(self) -> np.ndarray:  # (distances,) float64
        """Probability that a rare one is among the targets seen, by how far ahead it looks; 0 is its own token."""
        seen = np.array([self.seen(distance) for distance in range(4 * REACH)])
        every = (seen >= self.targets) & (self.targets >= 1 / RARE)
        return np.where(every, 1.0, 1 - (1 - RARE) ** seen)

    def told(self, power: float) -> str:
        """Return which faults are found with which probability, where `power` was asked for."""
        weak = np.flatnonzero(self.powers < power - 1e-3)
        if not len(weak):
            return f"a fault on {RARE:.0%} of them is found with p {self.powers.min():.4f}, however far ahead it looks"
        where = f"{weak[0]} to {weak[-1]}" if weak[-1] + 1 < len(self.powers) else f"{weak[0]} or more"
        strong = np.delete(self.powers, weak)
        told = (
            f"a fault on {RARE:.0%} of them is found with p {strong.min():.4f}" if len(strong) else "a fault is found"
        )
        return f"{told}, where it looks {where} tokens ahead with p {self.powers[weak].min():.4f} at least"


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
    learns = bool(base.log.handed_out) or bool(np.any(np.diff(base.order) < 0))  # else the order were the text's
    settled = base.audited.protocol.seq_len + 1  # tokens after a changed one, beyond what it can move
    spacing = settled + REACH
    if learns:
        spacing = min(spacing, max(LEAST_SPACING, LEARNING_RUNS * len(base.tokens) // len(wanted)))
    runs = pack(wanted, max(LEAST_SPACING, spacing))
    reaches = {place: reach for run in runs for place, reach in _reaches(run, base, None if learns else settled)}

    # cuts see each target that looks over one of them; the middle is always one, where every protocol is at work
    count = min(-(-needed // REACH), LEARNING_RUNS if learns else MOST_RUNS, len(base.order) // 2)
    apart = len(base.order) / max(1, count)
    even = (apart * (np.arange(max(1, count)) + random.random())).astype(np.int64)
    cuts = np.unique([*even.tolist(), len(base.order) // 2])
    return Plan(runs, cuts, {place: reaches[place] for place in drawn if place in reaches}, base.rank, len(places))


def _reaches(run: Sequence[int], base: Baseline, settled: int | None) -> Iterator[tuple[int, int]]:
    """Yield each place of a run, and how far before it a target that looks ahead to it is seen.

    Before the first one nothing moves. Behind others a run is the unchanged one again after `settled` tokens; None
    where it never is, and only the nearest targets can stand out.
    """
    ordered = sorted(run, key=lambda place: int(base.rank[place]))
    yield ordered[0], len(base.tokens)
    for before, place in pairwise(ordered):
        yield place, NEAR - 1 if settled is None else max(0, place - before - settled)


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
