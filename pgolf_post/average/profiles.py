"""Profiles: the share that each step's weights have in an average of a run.

An exponential moving average of a given length, or a power-function one of a given relative width σ, is a fixed linear
combination of the weights θ₁ … θ_T after each optimizer step. A trainer that keeps two power-function averages and
stores snapshots of both therefore stores enough to build any other average that is not much narrower than what lies
between them: find the combination of the snapshots' profiles that is nearest, in least squares, to the wanted profile,
and combine the snapshots' weights with the same shares. (Karras et al. 2024, arXiv 2312.02696, section 3.)

Profiles here are the exact, discrete ones of the recurrence, in float64, so the solution is exact for short runs too:

    power function    θ̂_t = β(t) θ̂_{t-1} + (1 - β(t)) θ_t,   β(t) = (1 - 1/t)^(γ+1)
                      ⇒ share of step s at step T: (s/T)^(γ+1) - ((s-1)/T)^(γ+1), which sum to 1
    exponential       share of step s at step T ∝ 2^(-(T-s)/half-life), divided by their sum

Worked example, γ = 0: every step's share is 1/T, the mean of all weights; its standard deviation, the relative width
σ = √(γ+1) / ((γ+2) √(γ+3)), is 0.289 of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.errors import SettingsError

WIDEST_SIGMA = 1 / math.sqrt(12)  # γ = 0, the mean of the whole run
NARROWEST_SIGMA = 1e-4


def gamma_of(sigma: float) -> float:
    """Return the exponent γ ≥ 0 of the power function whose profile's standard deviation is `sigma` of the run.

    The root of σ² (γ+2)² (γ+3) = γ+1 (the paper's appendix C). Raises SettingsError outside 0.0001 … 0.2886.
    """
    if not NARROWEST_SIGMA <= sigma < WIDEST_SIGMA:
        raise SettingsError(
            f"sigma {sigma:g} is outside {NARROWEST_SIGMA:g} … {WIDEST_SIGMA:.4f}, the mean of a whole run",
            hint="sigma is a share of the run: 0.05 averages over about its last twentieth",
        )
    inverse = sigma**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_beta(gamma: float, step: int) -> float:
    """Return β(t), the share that the average keeps when the weights after step `step` (counted from 1) enter it."""
    return (1 - 1 / step) ** (gamma + 1)


@dataclass(frozen=True)
class PowerLength:
    """A power-function average: its length grows with the run."""

    sigma: float

    def __str__(self) -> str:
        return f"sigma {self.sigma:g}"

    def profile(self, end_step: int) -> np.ndarray:  # (end_step,) float64, sums to 1
        """The share of steps 1 … end_step in the average at `end_step`."""
        exponent = gamma_of(self.sigma) + 1
        steps = np.arange(1, end_step + 1, dtype=np.float64)
        with np.errstate(divide="ignore"):  # log(1 - 1/1) = -∞: the first step keeps nothing of what was before it
            lost = -np.expm1(exponent * np.log1p(-1 / steps))
        return lost * np.exp(exponent * np.log(steps / end_step))


@dataclass(frozen=True)
class ExponentialLength:
    """An exponential average: its length is a number of steps."""

    half_life_steps: float

    def __post_init__(self) -> None:
        if not self.half_life_steps > 0:
            raise SettingsError(f"half-life {self.half_life_steps:g} steps must be above 0")

    def __str__(self) -> str:
        return f"half-life {self.half_life_steps:g} steps"

    def profile(self, end_step: int) -> np.ndarray:  # (end_step,) float64, sums to 1
        """The share of steps 1 … end_step in the average at `end_step`."""
        with np.errstate(over="ignore"):  # so many half-lives that nothing is left: 2^-inf = 0
            shares = np.exp2(-np.arange(end_step - 1, -1, -1, dtype=np.float64) / self.half_life_steps)
        return shares / shares.sum()


Length = PowerLength | ExponentialLength


def stack_profiles(profiles: Sequence[np.ndarray]) -> np.ndarray:  # (n, longest) float64
    """Return profiles of different ends side by side; steps after a profile's end have no share."""
    longest = max(len(profile) for profile in profiles)
    return np.stack([np.pad(profile, (0, longest - len(profile))) for profile in profiles])


@dataclass(frozen=True)
class Combination:
    """Shares of given averages that come nearest to a wanted one."""

    shares: np.ndarray  # (n,) float64, sum to 1, some negative
    residual: float  # ‖wanted profile - combined profile‖ / ‖wanted profile‖

    @property
    def amplification(self) -> float:
        """Σ |share|: how much the combination amplifies rounding in what it combines; 1 where no share is negative."""
        return float(np.abs(self.shares).sum())


def combine(profiles: Sequence[np.ndarray], wanted: np.ndarray) -> Combination:
    """Return the shares, summing to 1, that come nearest to the wanted profile by least squares over the steps.

    Because they sum to 1, an average of equal weights is those weights.
    A wanted profile that is already among the given ones is taken as it is.
    """
    *given, goal = stack_profiles([*profiles, wanted])
    distances = [float(np.linalg.norm(profile - goal)) for profile in given]
    nearest, scale = int(np.argmin(distances)), float(np.linalg.norm(goal))
    shares = np.zeros(len(given))
    if distances[nearest] > 1e-12 * scale:
        others = [index for index in range(len(given)) if index != nearest]
        basis = np.stack([given[index] - given[nearest] for index in others], axis=1)  # (steps, n - 1)
        shares[others] = np.linalg.lstsq(basis, goal - given[nearest], rcond=None)[0]
    shares[nearest] = 1 - shares.sum()
    residual = float(np.linalg.norm(shares @ np.stack(given) - goal)) / scale
    return Combination(shares, residual)
