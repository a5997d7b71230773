"""Clips multiplied until an artifact takes a given number of bytes, on sizes that are known functions of the clips."""

from __future__ import annotations

import math

import pytest

from pgolf_post.demo.equal_bytes import CLOSE_SHARE, plan_within
from pgolf_post.errors import OverBudgetError
from pgolf_post.plan import Plan, read_plan

NUM_WEIGHTS = 800_000
AT_PUBLISHED = 400_000  # bytes at the clips of the preset


def multiplier(plan: Plan) -> float:
    """Return the clip of the MLPs relative to the published one, 11.5."""
    return float(next(rule.clip for rule in plan.rules if rule.name == "mlp")) / 11.5


def straight(plan: Plan) -> int:
    return round(AT_PUBLISHED - NUM_WEIGHTS / 8 * math.log2(multiplier(plan)))


def rough(plan: Plan) -> int:
    """Return bytes that fall half as fast as thought, with a sawtooth of up to 150."""
    return round(AT_PUBLISHED - NUM_WEIGHTS / 16 * math.log2(multiplier(plan)) + 150 * (1e4 * multiplier(plan) % 1))


@pytest.mark.parametrize("limit", [250_000, 399_000, 400_000, 401_000, 520_000])
@pytest.mark.parametrize("num_bytes", [straight, rough])
def test_the_plan_found_is_within_the_limit_and_close_to_it(limit: int, num_bytes: object) -> None:
    plan, options = plan_within("rtn", limit, NUM_WEIGHTS, num_bytes)  # type: ignore[arg-type]
    assert limit * (1 - CLOSE_SHARE) <= num_bytes(plan) <= limit  # type: ignore[operator]
    changes = options.removeprefix("--plan rtn").split(" --set ")[1:]
    assert read_plan("rtn", changes) == plan


def test_clips_keep_their_ratios_and_a_plan_that_fits_stays_as_it_is() -> None:
    plan, _ = plan_within("rtn", 350_000, NUM_WEIGHTS, straight)
    ratios = {rule.name: rule.clip / multiplier(plan) for rule in plan.rules if rule.method == "rtn"}
    assert ratios == pytest.approx({"embedding": 14.0, "mlp": 11.5, "attention": 13.0}, rel=1e-3)
    assert plan_within("rtn", AT_PUBLISHED, NUM_WEIGHTS, straight) == (read_plan("rtn"), "--plan rtn")


def test_a_limit_that_no_clip_meets_is_refused() -> None:
    with pytest.raises(OverBudgetError, match="within 1,000 bytes") as refused:
        plan_within("rtn", 1000, NUM_WEIGHTS, lambda plan: 5000)
    assert "requant --plan rtn" in str(refused.value.hint)
