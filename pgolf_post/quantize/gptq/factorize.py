"""Factorizing Hessians, and keeping the factors: the part of GPTQ that does not depend on grids.

GPTQ is usually told with U, the upper Cholesky factor of H⁻¹ = UᵀU. The same rounding follows without inverting
anything (LDLQ, which arXiv 2307.13304 proves equal): reversing the order of the inputs turns a lower Cholesky factor
into an upper one, H = VVᵀ, and V = F·diag(ℓ) with ones on F's diagonal. Column j is then rounded after adding F_kj
times the error of every earlier column k. V is U⁻¹, so ℓ_j = 1 / U_jj. q, k and v read the same inputs, and a sweep of
clips reads the same Hessians: `FactorCache` factorizes each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_post.base.workers import map_items
from pgolf_post.errors import NumericsError

COLLECT_AGAIN = "pgolf-post calibrate --fresh, with the calibration settings of this command"
MAX_DAMP = 1.0  # of the mean diagonal: beyond this the Hessian says nothing any more
# What must be left of a diagonal entry once earlier columns have explained theirs, for rounding not to be the rest.
SMALLEST_PIVOTS = {torch.float32: 1e-4, torch.float64: 1e-12}


@dataclass(frozen=True)
class LDLFactor:
    """The damped, permuted Hessian as F·diag(ℓ²)·Fᵀ."""

    feedback: Tensor  # (in, in) float32 F: upper triangular, ones on its diagonal
    lengths: Tensor  # (in,) float32 ℓ, in the order of the visit
    order: Tensor  # (in,) int64: column visited at each step
    damp: float  # share of the mean diagonal that made the Hessian positive definite
    dead_columns: int
    precision: torch.dtype  # in which it was computed

    @property
    def column_lengths(self) -> Tensor:  # (in,) float32, columns in the matrix's own order
        """ℓ: rounding column j off by r costs ℓ_j²·r² once the later columns have adapted; Σ over j is e H eᵀ."""
        lengths = torch.empty_like(self.lengths)
        lengths[self.order] = self.lengths
        return lengths


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, unless finite elements have an infinite sum."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def factorize(name: str, hessian: Tensor, damp: float, act_order: bool) -> LDLFactor:  # hessian: (in, in) float
    """Factorize a Hessian, raising the damping tenfold at a time until it is positive definite.

    Each damping is tried in float32, then in float64 where rounding would drown a pivot. Columns that never saw an
    input (zero diagonal) are decoupled, so they are rounded to nearest.
    Raises NumericsError naming the tensor for NaN, or if damping 1.0 of the mean diagonal does not suffice.
    """
    [factor] = map_items(lambda matrix: _factorize(name, matrix, damp, act_order), [hessian])
    return factor


def _factorize(name: str, hessian: Tensor, damp: float, act_order: bool) -> LDLFactor:
    if not is_finite(hessian):
        raise NumericsError(f"{name}: its Hessian holds NaN or infinity", hint=COLLECT_AGAIN)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean()) if (~dead).any() else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    raised = torch.where(dead, diagonal + mean, diagonal)
    while True:
        for precision in (torch.float32, torch.float64):
            upper = _upper_factor(hessian.to(precision), (raised + damp * mean).to(precision), order)
            if upper is not None:
                lengths = upper.diagonal().clone()
                feedback = upper.div_(lengths).float()
                return LDLFactor(feedback, lengths.float(), order, damp, int(dead.sum()), precision)
        if damp * 10 > MAX_DAMP:
            raise NumericsError(
                f"{name}: its Hessian is not positive definite even with damping {damp:g} of the mean diagonal "
                f"{mean:.3g} (limit {MAX_DAMP:g})",
                hint=f"calibrate on more text: --calibration-tokens; if the cache is suspect: {COLLECT_AGAIN}",
            )
        damp *= 10


def _upper_factor(
    hessian: Tensor,  # (n, n) float32 or float64
    diagonal: Tensor,  # (n,) to replace the Hessian's
    order: Tensor,  # (n,)
) -> Tensor | None:  # (n, n) upper
    """V with permuted Hessian = VVᵀ, or None if it is not positive definite by a margin over rounding errors."""
    backwards = order.flip(0)
    matrix = hessian.index_select(0, backwards).index_select(1, backwards)
    matrix.diagonal().copy_(diagonal[backwards])
    lower, failed = torch.linalg.cholesky_ex(matrix)
    kept = (lower.diagonal() ** 2 / matrix.diagonal()).amin() if not failed else 0.0
    return lower.flip(0, 1).contiguous() if kept >= SMALLEST_PIVOTS[hessian.dtype] else None


class FactorCache:
    """The factors of one set of Hessians, each computed once per (site, damping, order)."""

    def __init__(self, hessian_of: Callable[[str], Tensor]) -> None:  # site → (in, in), always the same for a site
        self._hessian_of = hessian_of
        self._factors: dict[tuple[str, float, bool], LDLFactor] = {}

    def get(self, site: str, damp: float, act_order: bool) -> LDLFactor:
        """The factor of a site's Hessian. Raises NumericsError as `factorize` does, naming the site."""
        self.fill([site], damp, act_order)
        return self._factors[site, damp, act_order]

    def fill(self, sites: Iterable[str], damp: float, act_order: bool) -> None:
        """Compute the factors of several sites side by side, those already known excepted."""
        missing = [site for site in dict.fromkeys(sites) if (site, damp, act_order) not in self._factors]
        factors = map_items(lambda site: _factorize(site, self._hessian_of(site), damp, act_order), missing)
        self._factors.update(zip([(site, damp, act_order) for site in missing], factors, strict=True))
