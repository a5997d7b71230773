"""Rules of thumb: each belongs to a metric that is measured, marks one side of its limit, and can be named."""

from __future__ import annotations

import pytest

from pgolf_post.diagnose.numbers import METRICS, Number, number
from pgolf_post.diagnose.rules import RULES, Rule, find_marks, rule_named
from pgolf_post.errors import SettingsError


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_speaks_of_a_metric_and_says_why_and_what_to_do(rule: Rule) -> None:
    assert rule.metric in METRICS
    assert len(rule.source) > 20
    assert rule.advice
    step = max(abs(rule.limit), 1.0) * 0.01
    worse = rule.limit + step if rule.bad == "above" else rule.limit - step
    better = rule.limit - step if rule.bad == "above" else rule.limit + step
    subject = f"blocks.0.{rule.subject}"
    assert rule.marks(number(rule.metric, subject, worse))
    assert not rule.marks(number(rule.metric, subject, better))
    assert not rule.marks(number(rule.metric, subject, rule.limit))
    assert rule_named(rule.name) is rule


def test_names_are_unique_and_an_unknown_one_lists_them() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    with pytest.raises(SettingsError, match="unknown rule 'deadblock'; rules: low-rank, "):
        rule_named("deadblock")


def test_marks_stand_with_the_worst_first() -> None:
    numbers = [
        number("kurtosis", "b", 20.0),
        number("condition", "singular", None),
        number("kurtosis", "a", 500.0),
        number("removal_divergence", "block 3", 0.004),
        number("kurtosis", "fine", 1.0),
    ]
    marks = find_marks(numbers)
    assert [mark.number.subject for mark in marks] == ["singular", "a", "b", "block 3"]
    assert marks[1].excess == pytest.approx(50)
    assert marks[-1].excess == pytest.approx(1.25)
    assert marks[1].facts()["rule"] == "heavy-tails"


def test_a_value_that_is_not_finite_is_above_every_limit_and_below_none() -> None:
    assert find_marks([number("worst_row_ratio", "w", None)])
    assert not find_marks([number("effective_rank_squared_share", "w", None)])


def test_numbers_come_back_from_their_facts() -> None:
    one = Number("weights", "blocks.0.mlp.fc.weight", "condition", None, role="mlp_fc", layer=0, at=3)
    assert one.facts() == {
        "part": "weights", "subject": "blocks.0.mlp.fc.weight", "metric": "condition", "value": None,
        "role": "mlp_fc", "layer": 0, "at": 3,
    }  # fmt: skip
    assert Number.from_facts(one.facts()) == one
