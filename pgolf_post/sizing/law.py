"""Laws of a ladder of short runs: loss by size and tokens, gap by bits a weight.

    loss(N, D) = E + A·(N/N₀)^-α + B·(D/D₀)^-β      N parameters, D training tokens (Hoffmann et al. 2022, 2203.15556)
    ln gap(b)  = c - γ·b                            b bits a weight, in bpb; γ = ln 4 for a scalar grid at high rate

A variant of the recipe (another vocabulary, a table of n-grams) is neither more parameters nor more text in the sense
of this law: it shifts the loss by a constant of its own at all sizes and lengths, and N stays that of its size in the
recipe as it is. Text is counted in bytes where vocabularies differ.

N₀ and D₀ are the ladder's geometric means, so that A and B are in bpb and say what size and text are worth there. A law
is fitted by least squares with a covariance from the residuals. A ladder that cannot tell its coefficients apart is
refused by the name of what is missing: an interval that rests on a singular matrix is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import stdtrit

from pgolf_post.errors import MismatchError

COEFFICIENTS = ("E", "A", "alpha", "B", "beta")
EXPONENTS = ("alpha", "beta")
MOST_EXPONENT, LEAST_EXPONENT = 3.0, 0.01  # beyond, a ladder shows no power law
SINGULAR = 1e-5  # smallest ÷ largest singular value of the scaled Jacobian
STARTS = ((0.3, 0.3), (0.15, 0.5), (0.6, 0.2), (1.0, 1.0))  # of both exponents


@dataclass(frozen=True)
class Observation:
    """One run of the ladder."""

    size: str
    parameters: int  # of its size, without what its variant adds
    tokens: int
    seconds: float  # of training
    bpb: float
    variant: str = ""  # of the recipe
    token_bytes: float = 1.0  # mean text of a training token, where it differs between runs

    @property
    def text(self) -> float:
        """Training text, in bytes where vocabularies differ, else in tokens."""
        return self.tokens * self.token_bytes


@dataclass(frozen=True)
class Estimate:
    """A predicted value with half the width of its interval."""

    value: float
    half: float


@dataclass(frozen=True)
class LossLaw:
    """A fitted loss law."""

    coefficients: Mapping[str, float]  # COEFFICIENTS, then a shift for each variant but the first
    covariance: np.ndarray  # of all coefficients in this order; 0 for those that were held
    degrees: int  # of freedom of the residuals
    parameters_0: float
    tokens_0: float
    variants: tuple[str, ...] = ("",)

    def __call__(self, parameters: float, text: float, variant: str | None = None) -> float:
        """Return the bpb at a size and an amount of training text, by default of the first variant."""
        n, d, shifts = self._place(parameters, text, variant)
        return float(_loss(self._vector, n, d, shifts))

    @property
    def _vector(self) -> np.ndarray:  # (5 + shifts,)
        return np.array(list(self.coefficients.values()))

    def _place(self, parameters: float, text: float, variant: str | None) -> tuple[float, float, np.ndarray]:
        shifts = _indicators([self.variants[0] if variant is None else variant], self.variants)[0]
        return parameters / self.parameters_0, text / self.tokens_0, shifts

    def standard_error(self, name: str) -> float:
        """Return the standard error of a coefficient."""
        place = list(self.coefficients).index(name)
        return math.sqrt(max(0.0, float(self.covariance[place, place])))

    def variance(self, parameters: float, text: float, variant: str | None = None) -> float:
        """Return the variance of a prediction, by the delta method."""
        gradient = _gradient(self._vector, *self._place(parameters, text, variant))
        return max(0.0, float(gradient @ self.covariance @ gradient))

    def predict(self, parameters: float, text: float, level: float = 0.95) -> Estimate:
        """Return the bpb at a size and an amount of text, with its interval."""
        half = float(stdtrit(self.degrees, (1 + level) / 2)) * math.sqrt(self.variance(parameters, text))
        return Estimate(self(parameters, text), half)

    def facts(self) -> dict[str, Any]:
        """Return the law as JSON."""
        errors = {f"{name}_se": self.standard_error(name) for name in self.coefficients}
        scales = {"parameters_0": self.parameters_0, "tokens_0": self.tokens_0, "degrees": self.degrees}
        return {**dict(self.coefficients), **errors, **scales}


def fit_loss(ladder: Sequence[Observation], held: Mapping[str, float] | None = None) -> LossLaw:
    """Fit the law to a ladder; `held` fixes exponents instead of fitting them.

    Raises MismatchError for a ladder that has too few sizes, lengths or runs, or that cannot tell coefficients apart.
    """
    held = dict(held or {})
    variants = tuple(dict.fromkeys(run.variant for run in ladder))
    names = (*COEFFICIENTS, *(f"shift of {variant}" for variant in variants[1:]))
    require_ladder(ladder, len(names) - len(held))
    sizes, text, losses = (
        np.array([getattr(run, key) for run in ladder], float) for key in ("parameters", "text", "bpb")
    )
    scales = math.exp(float(np.log(sizes).mean())), math.exp(float(np.log(text).mean()))
    places = Places(sizes / scales[0], text / scales[1], _indicators([run.variant for run in ladder], variants))
    free = [place for place, name in enumerate(names) if name not in held]
    start = np.array([held.get(name, 0.0) for name in names])
    best = min((_descend(places, losses, start, free, exponents) for exponents in STARTS), key=lambda found: found.cost)
    vector = _completed(best.x, start, free)
    jacobian = places.gradients(vector)[:, free]
    _require_distinct(jacobian, vector, names, free)
    degrees = len(ladder) - len(free)
    variance = float(np.square(losses - places.losses(vector)).sum()) / degrees
    covariance = np.zeros((len(names),) * 2)
    covariance[np.ix_(free, free)] = variance * np.linalg.inv(jacobian.T @ jacobian)
    return LossLaw(dict(zip(names, map(float, vector), strict=True)), covariance, degrees, *scales, variants)


@dataclass(frozen=True)
class Places:
    """Positions of a ladder's runs: size, text and variant."""

    n: np.ndarray  # (runs,) parameters ÷ N₀
    d: np.ndarray  # (runs,) text ÷ D₀
    shifts: np.ndarray  # (runs, shifts) 1 where a run is of the variant

    def losses(self, vector: np.ndarray) -> np.ndarray:  # (runs,)
        """Return the law's losses."""
        return np.asarray(_loss(vector, self.n, self.d, self.shifts))

    def gradients(self, vector: np.ndarray) -> np.ndarray:  # (runs, 5 + shifts)
        """Return the law's Jacobian by its coefficients."""
        return np.array([_gradient(vector, *at) for at in zip(self.n, self.d, self.shifts, strict=True)])


def _indicators(variants: Sequence[str], known: Sequence[str]) -> np.ndarray:  # (runs, len(known) - 1)
    return np.array([[float(one == other) for other in known[1:]] for one in variants]).reshape(len(variants), -1)


def require_ladder(ladder: Sequence[Observation], coefficients: int) -> None:
    """Raise MismatchError, naming what is missing, for a ladder that a law cannot be fitted to."""
    sizes = {run.parameters for run in ladder}
    if len(sizes) < 3:
        raise MismatchError(
            f"the ladder has {len(sizes)} sizes; a law of E, A and alpha needs three", hint="add --size KEY=VALUE"
        )
    lengths = {size: {run.text for run in ladder if run.parameters == size} for size in sizes}
    if max(map(len, lengths.values())) < 2:
        raise MismatchError(
            "no size of the ladder has runs of two lengths; B and beta are told by text alone", hint="two --lengths"
        )
    if len(ladder) <= coefficients:
        raise MismatchError(
            f"the ladder has {len(ladder)} runs for {coefficients} coefficients; their spread needs one more",
            hint="more sizes or lengths, or hold an exponent: --alpha 0.34 --beta 0.28",
        )


def _require_distinct(jacobian: np.ndarray, vector: np.ndarray, every: Sequence[str], free: Sequence[int]) -> None:
    """Raise MismatchError naming the coefficients that a ladder cannot tell apart, or exponents that are none."""
    names = [every[place] for place in free]
    for name, value in zip(names, vector[free], strict=True):
        if name in EXPONENTS and not LEAST_EXPONENT * 1.01 < value < MOST_EXPONENT * 0.99:
            what = "parameters" if name == "alpha" else "tokens"
            raise MismatchError(
                f"{name} = {value:.3g}: the ladder's losses follow no power of their {what}",
                hint=f"sizes and lengths further apart, or hold it: --{name} 0.3",
            )
    scaled = jacobian / np.linalg.norm(jacobian, axis=0)
    _, singular, directions = np.linalg.svd(scaled, full_matrices=False)
    if singular[-1] < SINGULAR * singular[0]:
        weak = [name for name, share in zip(names, np.abs(directions[-1]), strict=True) if share > 0.2]
        raise MismatchError(
            f"the ladder does not tell {' and '.join(weak)} apart (singular value {singular[-1] / singular[0]:.1g})",
            hint="sizes and lengths further apart, or hold an exponent: --alpha 0.34 --beta 0.28",
        )


def _descend(
    places: Places,
    losses: np.ndarray,  # (runs,) bpb
    held: np.ndarray,  # (5 + shifts,) of which those that are not free count
    free: Sequence[int],
    exponents: tuple[float, float],
) -> Any:
    """Return scipy's solution from one start. Coefficients stay positive, exponents within their bounds."""
    spread, more = max(float(np.ptp(losses)), 1e-6), len(held) - len(COEFFICIENTS)
    first = [max(float(losses.min()) - spread, spread), spread, exponents[0], spread, exponents[1]]
    start = np.array([*first, *[0.0] * more])
    low = np.array([0.0, 1e-9, LEAST_EXPONENT, 1e-9, LEAST_EXPONENT, *[-np.inf] * more])
    high = np.array([np.inf, np.inf, MOST_EXPONENT, np.inf, MOST_EXPONENT, *[np.inf] * more])

    def residual(x: np.ndarray) -> np.ndarray:
        return places.losses(_completed(x, held, free)) - losses

    def slope(x: np.ndarray) -> np.ndarray:
        return places.gradients(_completed(x, held, free))[:, free]

    bounds, exact = (low[free], high[free]), {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    return least_squares(residual, start[free], slope, bounds=bounds, x_scale="jac", max_nfev=5000, **exact)


def _completed(x: np.ndarray, held: np.ndarray, free: Sequence[int]) -> np.ndarray:  # (5 + shifts,)
    """Return all coefficients from the free ones."""
    vector = held.copy()
    vector[list(free)] = x
    return vector


def _loss(vector: np.ndarray, n: Any, d: Any, shifts: np.ndarray) -> Any:
    least, size, alpha, text, beta = vector[: len(COEFFICIENTS)]
    return least + size * n**-alpha + text * d**-beta + shifts @ vector[len(COEFFICIENTS) :]


def _gradient(vector: np.ndarray, n: float, d: float, shifts: np.ndarray) -> np.ndarray:  # (5 + shifts,)
    _, size, alpha, text, beta = vector[: len(COEFFICIENTS)]
    by_size, by_text = n**-alpha, d**-beta
    own = [1.0, by_size, -size * math.log(n) * by_size, by_text, -text * math.log(d) * by_text]
    return np.array([*own, *shifts])


# ---- lines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogLine:
    """A law ln y = intercept + slope · x, with what is known of its error."""

    intercept: float
    slope: float
    covariance: np.ndarray  # (2, 2); 0 where two points leave no residual

    def __call__(self, x: float) -> float:
        """Return y."""
        return math.exp(self.intercept + self.slope * x)

    def log_variance(self, x: float) -> float:
        """Return the variance of ln y."""
        at = np.array([1.0, x])
        return max(0.0, float(at @ self.covariance @ at))


def _log_line(x: Sequence[float], y: Sequence[float]) -> LogLine:
    design, values = np.column_stack([np.ones(len(x)), x]), np.log(np.array(y, float))
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    covariance = np.zeros((2, 2))
    if len(x) > 2:
        variance = float(np.square(values - design @ solution).sum()) / (len(x) - 2)
        covariance = variance * np.linalg.inv(design.T @ design)
    return LogLine(float(solution[0]), float(solution[1]), covariance)


def fit_gap(bits: Sequence[float], gaps: Sequence[float]) -> LogLine:
    """Fit the gap in bpb by bits a weight. Raises MismatchError for fewer than two rates, or a gap that rises."""
    if len(set(bits)) < 2:
        raise MismatchError("gaps at one rate alone say nothing of others", hint="two or more --bits")
    if min(gaps) <= 0:
        raise MismatchError(f"a gap of {min(gaps):g} bpb has no logarithm: rounding lost nothing at that rate")
    line = _log_line(bits, gaps)
    if line.slope >= 0:
        raise MismatchError(f"the gap rises with bits (slope {line.slope:+.3g}); no size follows from that")
    return line
