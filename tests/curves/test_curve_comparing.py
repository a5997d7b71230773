"""Comparing curves: lines are exact, noise is what it is said to be, and shared noise cancels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pgolf_post.curves.comparing import (
    common_curve,
    compare_curves,
    default_points,
    default_window,
    smoothed,
)
from pgolf_post.curves.curve import Curve, Log, Point
from pgolf_post.curves.smoothing import smooth
from pgolf_post.errors import MismatchError, SettingsError


def curve(values: np.ndarray, steps: np.ndarray | None = None, name: str = "train_loss") -> Curve:
    places = np.arange(1, len(values) + 1) if steps is None else steps
    points = zip(values.tolist(), places.tolist(), strict=True)
    return Curve.of(name, [Point(value, step=place, seconds=0.5 * place) for value, place in points])


def test_straight_lines_differ_by_what_they_differ_by_whatever_the_spacing() -> None:
    steps = np.arange(1, 1001, dtype=float)
    control, other = curve(9 - 0.002 * steps), curve(8.5 - 0.002 * steps[9::10], steps[9::10])
    for difference in compare_curves(control, other, "step", [100, 505, 1000], window=60):
        assert difference.difference == pytest.approx(-0.5, abs=1e-9)
        assert difference.error == pytest.approx(0.0, abs=1e-9)
        assert not difference.paired
    by_seconds = compare_curves(control, other, "seconds", [250.0], window=30)[0]
    assert by_seconds.control == pytest.approx(9 - 0.002 * 500)


@pytest.mark.parametrize("trailing", [False, True])
def test_the_error_is_the_spread_of_the_value(trailing: bool) -> None:
    random = np.random.default_rng(0)
    steps = np.arange(1.0, 201.0)
    found = [smoothed(steps, 5 - 0.01 * steps + random.normal(0, 0.1, 200), 150, 60, trailing) for _ in range(400)]
    spread = float(np.std([one.value for one in found]))
    assert float(np.mean([one.error for one in found])) == pytest.approx(spread, rel=0.15)
    assert float(np.mean([one.value for one in found])) == pytest.approx(3.5, abs=4 * spread / 20)


def test_noise_that_both_runs_have_cancels() -> None:
    random = np.random.default_rng(1)
    shared, own = random.normal(0, 0.1, 500), random.normal(0, 0.001, 500)
    steps = np.arange(500)
    (paired,) = compare_curves(curve(3 + shared), curve(3.01 + shared + own), "step", [400], window=50)
    (apart,) = compare_curves(curve(3 + shared), curve(3.01 + shared + own, steps + 1.5), "step", [400], window=50)
    assert paired.paired
    assert not apart.paired
    assert paired.error is not None
    assert apart.error is not None
    assert paired.error < apart.error / 50
    assert paired.difference == pytest.approx(0.01, abs=4 * paired.error)


def test_with_too_few_points_the_value_is_between_its_neighbours_and_the_noise_unknown() -> None:
    (difference,) = compare_curves(
        curve(np.array([4.0, 3.0]), np.array([100.0, 200.0])), curve(np.full(300, 3.0)), "step", [150], window=10
    )
    assert difference.control == 3.5
    assert difference.difference == -0.5
    assert difference.error is None
    assert difference.points == 0


def test_without_a_window_an_uneven_log_is_smoothed_over_its_own_points_and_never_past_them() -> None:
    """Public logs have the first five steps and then every 500th."""
    steps = np.array([1.0, 2, 3, 4, 5, 500, 1000, 1500])
    log, dense = curve(10 - 0.001 * steps, steps), curve(9 - 0.001 * np.arange(1, 1501))
    found = {one.at: one for one in compare_curves(log, dense, "step", [4, 100, 1000])}
    for one in found.values():
        assert one.difference == pytest.approx(-1.0, abs=1e-6)
    assert found[4].error == pytest.approx(0, abs=1e-6)
    assert found[4].points == 5
    assert found[100].error is None  # between steps 5 and 500 the log says nothing
    assert found[1000].error == pytest.approx(0, abs=1e-6)
    assert found[1000].window == pytest.approx(1000)


def test_a_trailing_window_sees_nothing_later() -> None:
    values = np.concatenate([np.full(100, 3.0), np.full(100, 9.0)])
    (one,) = compare_curves(curve(np.full(200, 3.0)), curve(values), "step", [100], trailing=True)
    assert one.difference == pytest.approx(0.0, abs=1e-9)


def test_defaults_fit_the_sparser_curve() -> None:
    dense, sparse = curve(np.ones(1000)), curve(np.ones(10), np.arange(100.0, 1001.0, 100.0))
    assert default_window([dense, sparse], "step") == 200
    assert default_window([dense, dense], "step") == pytest.approx(999 / 50)
    assert default_points([dense, sparse], "step") == [280, 460, 640, 820, 1000]


def test_smoothing_keeps_a_line_and_lowers_noise() -> None:
    random = np.random.default_rng(2)
    line = 5 - 0.01 * np.arange(1, 301)
    assert smooth(curve(line), "step", 40).values == pytest.approx(line)
    noisy = smooth(curve(line + random.normal(0, 0.1, 300)), "step", 40)
    assert float(np.std((noisy.values - line)[30:-30])) < 0.03
    assert noisy.step.tolist() == list(range(1, 301))


def test_runs_with_nothing_in_common_are_refused() -> None:
    early, late = curve(np.ones(5)), curve(np.ones(5), np.arange(10.0, 15.0))
    with pytest.raises(MismatchError, match=r"no step in common: 1 … 5; 10 … 14"):
        compare_curves(early, late, "step", [5], window=2)
    with pytest.raises(MismatchError, match="both curves reach 1 … 5 step"):
        compare_curves(early, early, "step", [6], window=2)
    with pytest.raises(SettingsError, match="must be positive"):
        compare_curves(early, early, "step", [3], window=0)
    logs = [Log(Path(name), "table", {name: curve(np.ones(3), name=name)}) for name in ("a", "b")]
    with pytest.raises(MismatchError, match="no curve in common: a has a; b has b"):
        common_curve(logs)
    with pytest.raises(MismatchError, match="has no curve 'loss'; it has a"):
        common_curve(logs, "loss")
    assert common_curve([logs[0], logs[0]]) == "a"
