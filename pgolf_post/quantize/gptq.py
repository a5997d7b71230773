"""GPTQ: rounding one input column at a time, each column's error fed forward into those not yet rounded.

It minimises Σ_i e_i H e_iᵀ, e = w - ŵ, greedily: with H⁻¹ = UᵀU (U upper triangular), rounding column j leaves the
error (w_j - ŵ_j)/U_jj, which is subtracted from the later columns along row j of U. That is Babai's nearest-plane
rounding in the lattice of H (arXiv 2507.18553); the algorithm is Frantar et al. 2022 (arXiv 2210.17323).

A 2×2 worked example: w = (0.6, 0.6), H = [[1, .9], [.9, 1]], scale 1. Round to nearest gives (1, 1), with error
e = (-.4, -.4) and cost .16 + .16 + 2·.9·.16 = 0.608. GPTQ rounds 0.6 → 1, then moves the second weight by the error it
made: .6 - .4·.9 = 0.24 → 0, with e = (-.4, .6) and cost .16 + .36 - 2·.9·.24 = 0.088.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from pgolf_post.errors import NumericsError

MAX_DAMP = 1.0  # of the mean diagonal: beyond this the Hessian says nothing any more


@dataclass(frozen=True)
class Factor:
    """U of H⁻¹ = UᵀU for the damped, permuted Hessian."""

    upper: Tensor  # (in, in) float32
    order: Tensor  # (in,) int64: column visited at each step
    damp: float  # share of the mean diagonal that made the Hessian positive definite
    dead_columns: int


def factorize(name: str, hessian: Tensor, damp: float, act_order: bool) -> Factor:  # hessian: (in, in) float64
    """Factorize a Hessian, raising the damping tenfold at a time until it is positive definite.

    Columns that never saw an input (zero diagonal) are decoupled, so they are rounded to nearest.
    Raises NumericsError naming the tensor for NaN, or if damping 1.0 of the mean diagonal does not suffice.
    """
    if not torch.isfinite(hessian).all():
        raise NumericsError(f"{name}: its Hessian holds NaN or infinity", hint="pgolf-post calibrate --fresh")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if (~dead).any() else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    matrix = hessian[order][:, order].numpy(force=True).copy()
    matrix[np.diag_indices_from(matrix)] += np.where(dead[order].numpy(), mean, 0.0)
    while True:
        upper = _inverse_factor(matrix + damp * mean * np.eye(len(matrix)))
        if upper is not None:
            return Factor(torch.from_numpy(upper).float(), order, damp, int(dead.sum()))
        if damp * 10 > MAX_DAMP:
            raise NumericsError(
                f"{name}: its Hessian is not positive definite even with damping {damp:g} of the mean diagonal "
                f"{mean:.3g} (limit {MAX_DAMP:g})",
                hint="calibrate on more text: --calibration-tokens, or --fresh if the cache is suspect",
            )
        damp *= 10


def _inverse_factor(matrix: np.ndarray) -> np.ndarray | None:  # (n, n) float64 → (n, n) float64 upper
    """U with matrix⁻¹ = UᵀU, or None if the matrix is not positive definite.

    Flipping both axes turns the lower Cholesky factor of the flipped matrix into an upper V with matrix = VVᵀ; U = V⁻¹.
    """
    try:
        lower = scipy.linalg.cholesky(matrix[::-1, ::-1], lower=True)
    except scipy.linalg.LinAlgError:
        return None
    upper = lower[::-1, ::-1]
    inverse: np.ndarray = scipy.linalg.solve_triangular(upper, np.eye(len(matrix)), lower=False)
    return inverse if np.isfinite(inverse).all() else None


def gptq(
    weight: Tensor,  # (out, in) float32
    factor: Factor,
    scales: Tensor,  # (out,), or broadcasts to (out, in); float32
    largest: int,  # symbols are clipped to ±largest
    block_size: int = 128,
) -> Tensor:  # (out, in) int32
    """The symbols of `weight`. Inputs are left untouched."""
    upper = factor.upper
    columns = weight.T[factor.order].contiguous()  # (in, out): a column of the matrix is a contiguous row here
    steps = (scales[:, None] if scales.ndim == 1 else scales).expand_as(weight).T[factor.order]
    symbols = torch.empty(columns.shape, dtype=torch.int32)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        errors = torch.empty(stop - start, columns.size(1))
        for j in range(start, stop):
            rounded = torch.clamp(torch.round(columns[j] / steps[j]), -largest, largest)
            symbols[j] = rounded.int()
            errors[j - start] = (columns[j] - rounded * steps[j]) / upper[j, j]
            columns[j + 1 : stop] -= torch.outer(upper[j, j + 1 : stop], errors[j - start])
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    restored = torch.empty_like(symbols)
    restored[factor.order] = symbols
    return restored.T.contiguous()


def hessian_error(
    weight: Tensor,  # (out, in)
    restored: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
) -> float:
    """Σ e H eᵀ / Σ w H wᵀ: the share of the layer's output energy that quantization changed."""
    error, original = (weight - restored).double(), weight.double()
    energy = float(((original @ hessian) * original).sum())
    return float(((error @ hessian) * error).sum()) / energy if energy > 0 else 0.0
