"""Screening two models on as little text as the question needs: what would the whole text say of their difference?

Windows of plain scoring come in a seeded random order, the same for both, and are looked at after every few. The order
is all that is random: the interval is about *this* text, and holds however much its windows have in common, as a
survey's does (estimate.py). About other texts like it, `compare` on all of it speaks, by document.

*When to stop.* An ordinary interval is valid for one look. Stopping when it is narrow enough is nearly that: the width
depends on the spread, not on the difference, and coverage tends to the level (Chow & Robbins 1965). Stopping because
zero is excluded looks at the difference itself, again and again, and takes a *confidence sequence*: Robbins' normal
mixture in the form of Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024, arXiv 2103.06476), whose half-width is the
standard error times

    √( (2(tρ² + 1) / (tρ²)) · ln( √(tρ² + 1) / α ) )

after t windows, with ρ chosen for the number at which it should be narrowest. Each kind of stop has its part of the
permitted error, and the interval that is reported is its own, so together they err no more often than 1 - level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from scipy.special import stdtrit

from pgolf_post.base.progress import progress_bar
from pgolf_post.score.compare.estimate import estimate
from pgolf_post.score.compare.windows import ScoreWindows, window_bits
from pgolf_post.settings import LARGEST_SEED, Settings

MIN_WINDOWS = 64  # before which nothing is decided: means are near enough to normal from there on
ROUNDING_BPB = 1e-9  # what is left unknown where every window is scored


class ScreenSettings(Settings):
    """Settings of a screening: the precision wanted of a difference, and how windows are drawn."""

    half_width_bpb: float = Field(0.0005, gt=0, description="stop when the difference is known to ± this many bpb")
    level: float = Field(0.95, gt=0.5, lt=1, description="confidence level of the interval")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="seed of the order in which windows are scored")
    look_every: int = Field(32, ge=1, description="windows between looks")
    stop_at_zero: bool = Field(True, description="stop as soon as zero is excluded, however wide the interval")
    zero_share: float = Field(0.2, gt=0, lt=1, description="share of the permitted error for stopping at zero")

    @property
    def errors(self) -> tuple[float, float]:
        """The error permitted at a stop by width, and at a stop at zero."""
        error = 1 - self.level
        at_zero = error * self.zero_share if self.stop_at_zero else 0.0
        return error - at_zero, at_zero


# ---- what is known ---------------------------------------------------------------------------------------------------


def sequence_factor(observations: float, alpha: float, tightest_at: float) -> float:
    """Return the half-width of the confidence sequence in standard errors; relatively narrowest at `tightest_at`."""
    rho_squared = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tightest_at
    grown = observations * rho_squared + 1
    return math.sqrt(2 * grown / (observations * rho_squared) * math.log(math.sqrt(grown) / alpha))


@dataclass(frozen=True)
class Look:
    """The difference as known after some windows: two half-widths, for the two reasons to stop."""

    windows: int
    tokens: int
    bpb: float
    half: float  # of the t interval, valid where its own width decides when to look
    half_always: float  # of the confidence sequence, valid at every look; infinite where nobody asks for it

    @property
    def excludes_zero(self) -> bool:
        """Whether the confidence sequence excludes a difference of zero."""
        return abs(self.bpb) > self.half_always


def look(
    bits: np.ndarray,  # (n,) differences of the windows drawn so far
    drawn: np.ndarray,  # (n,) which they are
    all_bytes: np.ndarray,  # (N,) int64
    tokens: int,
    settings: ScreenSettings,
) -> Look:
    """Return the estimate and both half-widths.

    These are infinite before MIN_WINDOWS, and ROUNDING_BPB once every window is scored.
    """
    count, total = len(drawn), len(all_bytes)
    bpb, error = estimate(bits, all_bytes[drawn], all_bytes)
    if count == total:
        return Look(count, tokens, bpb, ROUNDING_BPB, ROUNDING_BPB)
    if count < MIN_WINDOWS:
        return Look(count, tokens, bpb, math.inf, math.inf)
    by_width, at_zero = settings.errors
    half = float(stdtrit(count - 2, 1 - by_width / 2)) * error
    tightest_at = max(2.0 * MIN_WINDOWS, 0.1 * total)
    always = sequence_factor(count, at_zero, tightest_at) * error if at_zero else math.inf
    return Look(count, tokens, bpb, half, always)


@dataclass(frozen=True)
class Screening:
    """Record of a screening: its looks, and why the last one was decisive."""

    looks: list[Look]
    total_tokens: int
    reason: str
    half: float  # of the interval that goes with the reason

    @property
    def last(self) -> Look:
        return self.looks[-1]

    @property
    def low(self) -> float:
        return self.last.bpb - self.half

    @property
    def high(self) -> float:
        return self.last.bpb + self.half

    def facts(self) -> dict[str, Any]:
        last = self.last
        bounds = {"low_bpb": self.low, "high_bpb": self.high}
        counts = {"windows": last.windows, "tokens": last.tokens, "total_tokens": self.total_tokens}
        share = last.tokens / self.total_tokens
        return {
            "difference_bpb": last.bpb,
            **bounds,
            **counts,
            "share": share,
            "looks": len(self.looks),
            "stopped": self.reason,
        }


# ---- screening -------------------------------------------------------------------------------------------------------


def screen(
    score_windows: ScoreWindows,
    all_bytes: np.ndarray,  # (N,) int64, bytes of text of every window
    total_tokens: int,
    settings: ScreenSettings,
    quiet: bool = False,  # part of other work that reports for it
) -> Screening:
    """Score windows until the difference is known well enough, or all are scored."""
    total = len(all_bytes)
    order = np.random.default_rng(settings.seed).permutation(total)
    bits = np.zeros(total)  # of each window, once scored
    looks: list[Look] = []
    tokens = 0
    silent: AbstractContextManager[Callable[..., None]] = nullcontext(lambda *_: None)
    with silent if quiet else progress_bar("screening", total, "windows") as advance:
        for stop in range(settings.look_every, total + settings.look_every, settings.look_every):
            drawn = order[:stop]
            chosen = np.sort(order[stop - settings.look_every : stop])
            candidate, control = score_windows(chosen)
            bits[chosen] = window_bits(candidate, control, chosen)
            tokens += candidate.tokens
            if len(drawn) < min(total, 3):
                continue
            looks.append(look(bits[drawn], drawn, all_bytes, tokens, settings))
            advance(len(chosen), f"Δ {looks[-1].bpb:+.6f} ± {looks[-1].half:.6f}")
            reason = _reason(looks[-1], total, settings)
            if reason:
                half = looks[-1].half_always if reason == EXCLUDED else looks[-1].half
                return Screening(looks, total_tokens, reason, half)
    raise AssertionError("the last look has every window")


EXCLUDED = "zero is excluded"


def _reason(last: Look, total: int, settings: ScreenSettings) -> str:
    """Return why to stop, or an empty string."""
    if last.windows == total:
        return "all windows are scored"
    if settings.stop_at_zero and last.excludes_zero:
        return EXCLUDED
    return f"known to ±{settings.half_width_bpb:g}" if last.half <= settings.half_width_bpb else ""
