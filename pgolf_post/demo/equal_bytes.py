"""Quantizers at one byte count: the only way in which their losses can be compared.

A plan's clips k are multiplied by one number m. Steps are proportional to k, so N weights take about N·log2(m)/8 bytes
less; a few builds find the smallest m whose artifact is within the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from pgolf_post.errors import OverBudgetError
from pgolf_post.plan import Plan, read_plan
from pgolf_post.rules import GridRule

CLOSE_SHARE = 0.0005  # of the limit: at most so far below it
MAX_BUILDS = 10
CLIP_DECIMALS = 3  # so that the option that repeats a plan is short


def plan_within(preset: str, limit_bytes: int, num_weights: int, bytes_of: Callable[[Plan], int]) -> tuple[Plan, str]:
    """Return the plan whose artifact comes closest to a limit from below, and the options that make it of the preset.

    `bytes_of` builds a plan and returns its artifact's bytes; `num_weights` is how many weights the plan quantizes.
    Raises OverBudgetError if no build is within the limit.
    """
    low, high = -math.inf, math.inf  # log2 m of the nearest builds: above the limit, and within it
    best: tuple[int, tuple[str, ...]] | None = None
    at, slope = 0.0, -num_weights / 8  # log2 m of the next build, and bytes per unit of it
    aim = limit_bytes * (1 - CLOSE_SHARE / 2)
    last: tuple[float, int] | None = None
    for _ in range(MAX_BUILDS):
        changes = tuple(_multiplied(read_plan(preset), 2**at))
        num_bytes = bytes_of(read_plan(preset, changes))
        if num_bytes <= limit_bytes:
            high = min(high, at)
            best = max(best or (0, ()), (num_bytes, changes))
            if num_bytes >= limit_bytes * (1 - CLOSE_SHARE):
                break
        else:
            low = max(low, at)

        # the next build: along the slope last measured, where that is near the one to be expected
        if last is not None and last[0] != at:
            measured = (num_bytes - last[1]) / (at - last[0])
            slope = min(-num_weights / 32, max(-num_weights / 2, measured))
        last = at, num_bytes
        at += (aim - num_bytes) / slope
        if not low < at < high:
            at = (low + high) / 2
    if best is None:
        raise OverBudgetError(
            f"no multiple of {preset}'s clips gave an artifact within {limit_bytes:,} bytes in {MAX_BUILDS} builds",
            hint=f"see what it takes as it is: pgolf-post requant --plan {preset}",
        )
    changes = best[1]
    options = "".join(f" --set {change}" for change in changes)
    return read_plan(preset, changes), f"--plan {preset}{options}"


def _multiplied(plan: Plan, multiplier: float) -> Iterator[str]:
    """Yield the changes that multiply the clip of every rule that has one."""
    if multiplier == 1.0:
        return
    for rule in plan.rules:
        if isinstance(rule, GridRule) and rule.scale == "sdclip":
            yield f"{rule.name}.clip={round(rule.clip * multiplier, CLIP_DECIMALS):g}"
