"""Sensitivity: what an error in a matrix costs in loss. Every step size follows from it.

For an error E = Ŵ - W of one matrix, in nats per token,

    ΔL ≈ ½ · tr(C·E·M·Eᵀ), or ½ · Σ_i r_i · e_i M e_iᵀ where C is its diagonal r

M (in, in) is the Hessian of the inputs, each token weighted by its sensitivity (the mean over rows of δ²,
δ = ∂L/∂(Wx) with labels drawn from the model), and r_i is row i's own mean of δ² relative to the average row's. It is
the Kronecker factoring of the Fisher information with the token weights kept (GuidedQuant, arXiv 2505.07004, with one
group of rows); each visit of a looped layer brings its own δ to its own x. C (out, out) is the second moment of δ, also
relative: it couples rows whose errors act together (YAQA, arXiv 2505.22988). A tied embedding is used twice, and the
sensitivities of both uses are added: as the head, where a row's δ² is p(1 - p)·cap'², and as a lookup table, where an
error enters as often as its row will be looked up (lookup_rows.py); its rows are not coupled.

All are estimates from little text, so all are shrunk: a ridge on the Hessians' diagonals (and off-diagonal entries of
either side multiplied by a share, if asked for), row statistics towards their mean in the logarithm and to within a
factor of 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.families import Site
from pgolf_post.fit.lookup_rows import expected_sums
from pgolf_post.fit.settings import FitSettings

LARGEST_ROW_RATIO = 16.0  # of sensitivities; of step sizes 4


@dataclass(frozen=True)
class Sensitivity:
    """One matrix's share of the quadratic model of the loss."""

    moments: Tensor  # (in, in) float64 M, shrunk: nats per token and squared weight of the average row
    rows: Tensor  # (out,) float64 r: relative, mean 1
    coupling: Tensor | None = None  # (out, out) float64 C, of diagonal r; None: rows are not coupled
    least: float = 0.0  # no eigenvalue of M is below it

    def pull(self, error: Tensor) -> Tensor:  # (out, in) float → the same
        """Return C·E·M, the gradient of the loss by the error, in the error's precision."""
        by_inputs = error @ self.moments.to(error)
        return (
            self.rows.to(error)[:, None] * by_inputs if self.coupling is None else self.coupling.to(error) @ by_inputs
        )

    def loss(self, error: Tensor) -> float:  # (out, in) → nats per token
        """Return what an error costs."""
        return 0.5 * float((self.pull(error) * error).sum(dtype=torch.float64))


def sensitivity(name: str, site: Site | None, stats: Stats, settings: FitSettings) -> Sensitivity:
    """Return the sensitivity of one matrix. Raises MismatchError if its statistics lack the backward half.

    A matrix that the loss does not depend on has moments of zero. Raises NumericsError, naming the matrix, for NaN or
    infinity in its sums.
    """
    fisher = stats.fisher
    if fisher is None:
        raise MismatchError(
            f"statistics {stats.id[:12]} have no backward half, so {name} has no sensitivities",
            hint="pgolf-post calibrate --fisher",
        )
    sides = []
    if site is not None:
        sides.append((_product_moments(name, site, stats, settings), fisher.mean_rows(name)))
    if name in fisher.lookup_rows:
        lookup_rows = fisher.lookup_rows[name]  # Σ over lookups is shared out among them
        if settings.lookup_frequency == "expected":
            lookup_rows = expected_sums(fisher.lookup_counts[name], lookup_rows)
        sides.append((fisher.lookup_hessians[name] / fisher.num_tokens / len(lookup_rows), lookup_rows))
    num_rows = len(sides[0][1])
    moments = torch.zeros_like(sides[0][0])
    _require_finite(name, sides)
    acting = [(side, row_sums) for side, row_sums in sides if float(side.trace()) and float(row_sums.sum())]
    if not acting:
        return Sensitivity(moments, torch.ones(num_rows, dtype=torch.float64))
    # The average row has the sensitivity of all sides together; a row's weight adds what each side brings to it.
    weights = torch.zeros(num_rows, dtype=torch.float64)
    for side, row_sums in acting:
        moments += side
        weights += side.trace() * row_sums / row_sums.mean()
    rows = weights / weights.mean()
    if name in fisher.lookup_rows:
        rows = rows.clamp_min(settings.lookup_floor)
    trusted = _trusted(rows, settings)
    coupling = None
    if settings.row_feedback and name != fisher.head and name not in fisher.lookup_rows:
        coupling = _coupled(fisher.mean_outputs(name), trusted, settings)
    least = settings.ridge * float(moments.diagonal().mean())
    return Sensitivity(_shrunk(moments, settings), trusted, coupling, least)


def _require_finite(name: str, sides: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise NumericsError for moments (in, in) or row sums (out,) that hold NaN or infinity."""
    for moments, row_sums in sides:
        total = float(moments.sum()) + float(row_sums.sum())
        if not math.isfinite(total):
            raise NumericsError(
                f"{name}: the statistics of its sensitivity hold NaN or infinity (sum {total:g})",
                hint="collect them again: --fresh",
            )


def sensitivities(
    names: Iterable[str], sites: Iterable[Site], stats: Stats, settings: FitSettings
) -> dict[str, Sensitivity]:
    """Return the sensitivities of several matrices."""
    site_of = {tensor: site for site in sites for tensor in site.tensors}
    return {name: sensitivity(name, site_of.get(name), stats, settings) for name in names}


def _product_moments(name: str, site: Site, stats: Stats, settings: FitSettings) -> Tensor:  # (in, in)
    """Return the weighted Hessian mixed with the plain one, which is less noisy, at equal trace."""
    assert stats.fisher is not None
    weighted = stats.fisher.mean_weighted(name)
    if settings.weighted == 1 or not float(weighted.trace()):
        return weighted
    plain = stats.mean_hessian(site.name)
    plain *= weighted.trace() / plain.trace()
    return settings.weighted * weighted + (1 - settings.weighted) * plain


def _shrunk(moments: Tensor, settings: FitSettings) -> Tensor:
    diagonal = moments.diagonal().clone()
    shrunk = moments * settings.hessian_share
    shrunk.diagonal().copy_(diagonal + settings.ridge * diagonal.mean())
    return shrunk


def _coupled(outputs: Tensor, rows: Tensor, settings: FitSettings) -> Tensor:  # (out, out), (out,) → (out, out)
    """Return correlations of the outputs' gradients, shrunk, at the variances that rows are trusted to have."""
    coupled = outputs / outputs.diagonal().mean()
    diagonal = coupled.diagonal().clone()
    coupled *= settings.coupling
    coupled.diagonal().copy_(diagonal + settings.ridge)
    scale = (rows / coupled.diagonal()).sqrt()
    return scale[:, None] * coupled * scale


def _trusted(rows: Tensor, settings: FitSettings) -> Tensor:
    """Shrink rows towards their mean in the logarithm, within a factor of it, and scale them to mean 1."""
    if not settings.rows:
        return torch.ones_like(rows)
    trusted = rows.clamp_min(1e-12).pow(settings.row_trust).clamp(1 / LARGEST_ROW_RATIO, LARGEST_ROW_RATIO)
    return trusted / trusted.mean()
