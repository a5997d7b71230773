"""Differences over seeds, and what they decide: PROMOTE, KILL or UNDECIDED.

Where a trial was trained with seeds that its control has too, runs are paired by seed and the mean of the differences
has a t interval (a control of one fixed model is paired with every seed). Otherwise the interval is Welch's:

    Δ ± t(df) · √(s²/n + s_c²/n_c),   df = (s²/n + s_c²/n_c)² / ((s²/n)²/(n-1) + (s_c²/n_c)²/(n_c-1))

(Welch 1947, "The generalization of Student's problem when several different population variances are involved").
One seed says nothing of the spread between seeds: its interval is infinite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy.special import stdtrit

from pgolf_post.sweep.settings import Gates

Decision = Literal["PROMOTE", "KILL", "UNDECIDED"]
MOST_SEEDS = 1000


@dataclass(frozen=True)
class SeedDifference:
    """A mean difference in bpb over seeds (trial - control) and its interval; infinite where nothing can be said."""

    mean: float
    low: float
    high: float
    sd: float  # of one seed's difference: of pairs, else √(s² + s_c²); nan for one seed
    seeds: int
    kind: Literal["paired", "Welch"]

    def facts(self) -> dict[str, Any]:
        """Return JSON facts; null where nothing can be said."""
        numbers = {"difference_bpb": self.mean, "low_bpb": self.low, "high_bpb": self.high, "sd_difference": self.sd}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {**finite, "seeds": self.seeds, "interval": self.kind}


def seed_difference(
    trial: Mapping[int, float],  # bpb by seed
    control: Mapping[int, float] | float,  # by seed, or of the one model that every seed is compared with
    level: float,
) -> SeedDifference:
    """Return the difference of two sets of runs; each has at least one."""
    if isinstance(control, float) or set(trial) <= set(control):
        values = [bpb - (control if isinstance(control, float) else control[seed]) for seed, bpb in trial.items()]
        return _around(
            statistics.fmean(values), _sd(values), len(values), len(values) - 1, len(values), level, "paired"
        )
    ours, theirs = list(trial.values()), list(control.values())
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    first, second = (_sd(values) ** 2 / len(values) for values in (ours, theirs))
    spread = math.hypot(_sd(ours), _sd(theirs))
    below = first**2 / max(1, len(ours) - 1) + second**2 / max(1, len(theirs) - 1)
    freedom = (first + second) ** 2 / below if below else len(ours) + len(theirs) - 2.0
    error = math.sqrt(first + second)
    one = min(len(ours), len(theirs)) < 2
    count = 1.0 if one or not error else (spread / error) ** 2
    return _around(mean, spread, count, 0.0 if one else freedom, len(ours), level, "Welch")


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _around(
    mean: float, sd: float, count: float, freedom: float, seeds: int, level: float, kind: Literal["paired", "Welch"]
) -> SeedDifference:
    half = half_width(sd, count, freedom, level)
    return SeedDifference(mean, mean - half, mean + half, sd, seeds, kind)


def half_width(sd: float, count: float, freedom: float, level: float) -> float:
    """Return t · sd/√n; infinite without a degree of freedom."""
    if freedom <= 0 or math.isnan(sd):
        return math.inf
    return float(stdtrit(freedom, (1 + level) / 2)) * sd / math.sqrt(count)


def decide(gates: Gates, difference: float, low: float, high: float) -> tuple[Decision, str]:
    """Return the decision on a difference in bpb and its interval, and the comparison that it rests on.

    PROMOTE: the interval excludes zero, and the gain is at least `accept` and `minimum_effect`.
    KILL:    the difference is `kill` or more, or the interval excludes a gain worth having.
    """
    if gates.kill is not None and difference >= gates.kill:
        return "KILL", f"{difference:+.5f} is at least kill = {gates.kill:+g}"
    worth = -gates.minimum_effect
    if low > worth or low == high == worth == 0.0:
        return "KILL", f"from {low:+.5f} on: no gain" + (f" of {gates.minimum_effect:g}" if worth else "")
    wanted = min(worth, gates.accept if gates.accept is not None else 0.0)
    if high < 0 and difference <= wanted:
        return "PROMOTE", f"at most {high:+.5f}, and {difference:+.5f} is at most {wanted:+g}"
    if high < 0:
        return "UNDECIDED", f"better, and {difference:+.5f} is above {wanted:+g}"
    return "UNDECIDED", f"{low:+.5f} … {high:+.5f} holds zero" if math.isfinite(high) else "no interval over seeds"


def more_seeds(gates: Gates, seen: SeedDifference, level: float) -> int | None:
    """Return how many seeds more would decide if mean and deviation stay as seen; None if no 1000 would."""
    if math.isnan(seen.sd):
        return None
    for count in range(seen.seeds + 1, MOST_SEEDS + 1):
        freedom = count - 1 if seen.kind == "paired" else 2 * count - 2
        half = half_width(seen.sd, count, freedom, level)
        if decide(gates, seen.mean, seen.mean - half, seen.mean + half)[0] != "UNDECIDED":
            return count - seen.seeds
    return None
