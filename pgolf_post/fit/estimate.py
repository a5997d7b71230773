"""Bytes of a build before it is made: the entropy of Gaussian weights on the grid that c would give them.

Where steps are small, a weight of standard deviation σ on a grid of step Δ takes log2(√(2πe)·σ/Δ) bits, so that
halving c costs one bit per weight, whatever the tensor. Where they are not, the entropy of a rounded Gaussian is read
from a table. σ of a weight is taken as its row's times its column's, relative to the matrix. It is good to a few
percent, which is all that a starting point needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
from scipy.special import ndtr

from pgolf_post.fit.build import Matrix
from pgolf_post.quantize.tensor import scale_of

LOG_RATIOS = np.arange(-5.0, 14.0, 0.125)  # log2(σ/Δ)


def gaussian_bits(log_ratio: np.ndarray) -> np.ndarray:  # log2(σ/Δ), any shape → bits
    """Return the entropy of a Gaussian rounded to a grid."""
    return np.interp(log_ratio, LOG_RATIOS, _table(), left=0.0)


@lru_cache
def _table() -> np.ndarray:
    return np.array([_entropy(2.0**ratio) for ratio in LOG_RATIOS])


def _entropy(sigma: float) -> float:  # of step 1
    reach = int(8 * sigma) + 1
    edges = ndtr((np.arange(-reach, reach + 2) - 0.5) / sigma)
    shares = np.diff(edges)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def symbol_bits(matrices: Iterable[Matrix], constants: Mapping[str, float]) -> float:
    """Return the bits of all symbols for given c/√κ by name."""
    return sum(_matrix_bits(matrix, constants[matrix.name]) for matrix in matrices)


def _matrix_bits(matrix: Matrix, constant: float) -> float:
    weight = matrix.weight.numpy().astype(np.float64)
    overall = np.sqrt(np.square(weight).mean()) + 1e-30
    rows, columns = (np.sqrt(np.square(weight).mean(axis)) + 1e-30 for axis in (1, 0))
    relative = scale_of(matrix.steps.relative, *weight.shape)
    log_steps = np.log2(relative * matrix.steps.unit * constant)
    return float(gaussian_bits(np.log2(rows[:, None] * columns / overall) - log_steps).sum())
