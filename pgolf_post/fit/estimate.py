"""Bytes of a build before it is made: the entropy of Gaussian weights on the grid that c would give them.

Where steps are small, a weight of standard deviation σ on a grid of step Δ takes log2(√(2πe)·σ/Δ) bits, so that
halving c costs one bit per weight, whatever the tensor. Where they are not, the entropy of a rounded Gaussian is read
from a table. σ of a weight is taken as its row's times its column's, relative to the matrix. Then log2(σ/Δ) of a weight
is a number of its row plus one of its column, and how often each sum occurs follows from two histograms. It is good to
a few percent, which is all that a starting point needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr

from pgolf_post.fit.build import Matrix

LOG_RATIOS = np.arange(-5.0, 14.0, 0.125)  # log2(σ/Δ)
BINS = 64  # of a histogram, an octave
SMALLEST = 1e-30  # σ; zeros have none


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


@dataclass(frozen=True)
class Spread:
    """Histogram of log2(σ/Δ) over the weights of a matrix, at c/√κ = 1."""

    lowest: float  # of the first bin
    counts: np.ndarray  # (bins,) float64 weights

    @classmethod
    def of(cls, matrix: Matrix) -> Spread:
        """Count a matrix's weights."""
        squares = np.square(matrix.weight.numpy(), dtype=np.float64)
        rows, columns = (np.log2(np.sqrt(squares.mean(axis)) + SMALLEST) for axis in (1, 0))
        overall = np.log2(np.sqrt(squares.mean()) + SMALLEST)
        steps = matrix.steps
        (row_start, row_counts), (column_start, column_counts) = (
            _histogram(logs - exponents / 8) for logs, exponents in ((rows, steps.rows), (columns, steps.columns))
        )
        lowest = (row_start + column_start) / BINS - overall - np.log2(steps.unit)
        return cls(float(lowest), np.convolve(row_counts, column_counts))

    def bits(self, constant: float) -> float:
        """Return the bits of all symbols at c/√κ = `constant`."""
        log_ratios = self.lowest + np.arange(len(self.counts)) / BINS - np.log2(constant)
        return float(gaussian_bits(log_ratios) @ self.counts)


def _histogram(values: np.ndarray) -> tuple[int, np.ndarray]:  # first bin, counts
    """Count values by bin."""
    bins = np.rint(values * BINS).astype(np.int64)
    return int(bins.min()), np.bincount(bins - bins.min()).astype(np.float64)


def spreads(matrices: Iterable[Matrix]) -> dict[str, Spread]:
    """Return the spread of every matrix by name."""
    return {matrix.name: Spread.of(matrix) for matrix in matrices}


def symbol_bits(known: Mapping[str, Spread], constants: Mapping[str, float]) -> float:
    """Return the bits of all symbols for given c/√κ by name."""
    return sum(spread.bits(constants[name]) for name, spread in known.items())
