"""Profiles against brute force, and the laws of combining them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.average.profiles import (
    ExponentialLength,
    PowerLength,
    combine,
    gamma_of,
    power_beta,
)
from pgolf_post.errors import SettingsError


def sigma_of(gamma: float) -> float:
    """The standard deviation of the power function's profile as a share of the run, in continuous time."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


SIGMAS = st.floats(0.005, 0.28)
LENGTHS = st.one_of(st.builds(PowerLength, SIGMAS), st.builds(ExponentialLength, st.floats(0.5, 200)))


def tracked(sigma: float, num_steps: int) -> np.ndarray:  # (num_steps,)
    """The recurrence itself, on the unit vectors: entry s is the share of step s."""
    average, gamma = np.full(num_steps, 7.0), gamma_of(sigma)  # 7: whatever was there before
    for step in range(1, num_steps + 1):
        beta = power_beta(gamma, step)
        average = beta * average + (1 - beta) * np.eye(num_steps)[step - 1]
    return average


@given(SIGMAS, st.integers(1, 60))
def test_a_profile_is_what_the_recurrence_does(sigma: float, num_steps: int) -> None:
    np.testing.assert_allclose(PowerLength(sigma).profile(num_steps), tracked(sigma, num_steps), atol=1e-13)


@given(st.floats(0.5, 50), st.integers(2, 60))
def test_an_exponential_profile_halves_every_half_life_and_is_a_debiased_ema(half_life: float, num_steps: int) -> None:
    decay, average = 0.5 ** (1 / half_life), np.zeros(num_steps)
    for step in range(num_steps):
        average = decay * average + (1 - decay) * np.eye(num_steps)[step]
    expected = average / (1 - decay**num_steps)
    np.testing.assert_allclose(ExponentialLength(half_life).profile(num_steps), expected, atol=1e-13)


@given(LENGTHS, st.integers(1, 3000))
def test_shares_sum_to_one(length: PowerLength | ExponentialLength, end_step: int) -> None:
    profile = length.profile(end_step)
    assert profile.shape == (end_step,)
    assert profile.min() >= 0
    assert profile.sum() == pytest.approx(1, abs=1e-11)


@given(SIGMAS)
def test_gamma_and_sigma_are_each_other_s_inverse_and_sigma_is_the_width(sigma: float) -> None:
    assert sigma_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)
    num_steps = 20_000
    profile, at = PowerLength(sigma).profile(num_steps), (np.arange(num_steps) + 0.5) / num_steps
    assert np.sqrt(profile @ at**2 - (profile @ at) ** 2) == pytest.approx(sigma, rel=2e-3)


def test_gamma_zero_is_the_mean() -> None:
    assert sigma_of(0.0) == pytest.approx(0.288675, abs=1e-6)
    np.testing.assert_allclose(PowerLength(0.28867).profile(9), 1 / 9, rtol=1e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


def test_a_length_no_step_can_overflow() -> None:
    profile = PowerLength(0.0005).profile(20_000)  # (20000)^2000 is no float64
    assert np.isfinite(profile).all()
    assert profile[-1] == pytest.approx(1 - (1 - 1 / 20_000) ** (gamma_of(0.0005) + 1))


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.29, 1e-5, float("nan")])
def test_widths_that_no_power_function_has_are_refused(sigma: float) -> None:
    with pytest.raises(SettingsError, match="outside"):
        gamma_of(sigma)


@pytest.mark.filterwarnings("error")
def test_of_many_half_lives_nothing_is_left() -> None:
    assert ExponentialLength(1e-320).profile(3).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("half_life", [0.0, -3.0, float("nan")])
def test_half_lives_below_zero_are_refused(half_life: float) -> None:
    with pytest.raises(SettingsError, match="above 0"):
        ExponentialLength(half_life)


def snapshots(num_steps: int, num_snapshots: int) -> list[np.ndarray]:
    ends = [-(-num_steps * k // num_snapshots) for k in range(1, num_snapshots + 1)]
    return [PowerLength(sigma).profile(end) for sigma in (0.05, 0.10) for end in ends]


@given(LENGTHS, st.integers(20, 200))
def test_the_combination_is_the_least_squares_one_and_states_its_error(
    length: PowerLength | ExponentialLength, num_steps: int
) -> None:
    given_, wanted = snapshots(num_steps, 6), length.profile(num_steps)
    found = combine(given_, wanted)
    padded = np.stack([np.pad(profile, (0, num_steps - len(profile))) for profile in given_])
    error = found.shares @ padded - wanted
    assert found.shares.sum() == pytest.approx(1, abs=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(error) / np.linalg.norm(wanted), abs=1e-9)
    directions = padded - padded[0]  # no direction that keeps the sum can make the error smaller
    assert np.abs(directions @ error).max() < 1e-9 * max(1.0, found.amplification)


@given(st.integers(0, 11))
def test_an_average_that_is_there_is_taken_as_it_is(index: int) -> None:
    given_ = snapshots(300, 6)
    found = combine(given_, given_[index])
    assert found.shares.tolist() == [float(other == index) for other in range(12)]
    assert found.residual == 0.0
    assert found.amplification == 1.0


@pytest.mark.parametrize("num_steps", [300, 4965])
@pytest.mark.parametrize("length", ["sigma 0.075", "sigma 0.15", "half-life 5 %", "half-life 10 %"])
def test_two_tracks_of_sixteen_give_lengths_between_them_to_one_percent(num_steps: int, length: str) -> None:
    kind, number = length.split()[:2]
    wanted = PowerLength(float(number)) if kind == "sigma" else ExponentialLength(float(number) / 100 * num_steps)
    assert combine(snapshots(num_steps, 16), wanted.profile(num_steps)).residual < 0.01
