"""Step sizes of equal slope: where one more bit buys the same loss everywhere.

With H = F·diag(ℓ²)·Fᵀ, GPTQ's error feedback leaves e M eᵀ = Σ_j ℓ_j² r_j², r_j the rounding error of column j after
feedback. A step Δ leaves r² = Δ²/12 and costs -log2 Δ bits, so the loss at given bytes is least where

    Δ_ij = c / (√(κ·r_i) · ℓ_j)

(D_i for r_i where feedback comes from both sides: what row i still costs once later rows have adapted to its errors)
with one constant c for the whole model; weights' own magnitudes do not enter. Then every weight costs c²/24 nats per
token (κ in it), whatever its tensor. c is the square root of a loss: 0.0001 to 0.0004 for a few million weights.

Rows and columns are stored as integers v that mean 2^(v/8); rounding them so costs 0.0009 bit per weight. What is left,
one number per tensor, is fp16, so that c can be anything; octaves beyond fp16's range go into the rows' integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_post.quantize.tensor import ScaleFactor

FP16_RANGE = 6.2e-5, 65504.0  # normal numbers
STEP_RANGE = 2.0**-80, 2.0**80  # beyond it float32 could not hold the product of all factors


@dataclass(frozen=True)
class RelativeSteps:
    """The relative steps of one matrix: what does not depend on c or κ."""

    rows: np.ndarray  # (out,) int8 eighths of an octave
    columns: np.ndarray  # (in,) int8, about 0
    unit: float  # the step at exponents 0 and c = 1

    @property
    def relative(self) -> tuple[ScaleFactor, ScaleFactor]:
        """Row and column factor: all steps, relative to `unit`."""
        return ScaleFactor("row", self.rows), ScaleFactor("column", self.columns)

    def factors(self, constant: float) -> tuple[ScaleFactor, ScaleFactor, ScaleFactor]:
        """Return tensor, row and column factor for c/√κ = `constant`."""
        step, rows = min(max(constant * self.unit, STEP_RANGE[0]), STEP_RANGE[1]), self.rows
        if not FP16_RANGE[0] <= step <= FP16_RANGE[1]:
            octaves = math.floor(math.log2(step))
            step, rows = step / 2.0**octaves, rows.astype(np.int16) + np.int16(8 * octaves)
        tensor = np.array([step], np.float16)
        return ScaleFactor("tensor", tensor), ScaleFactor("row", rows), ScaleFactor("column", self.columns)


def relative_steps(
    row_weights: Tensor,  # (out,) float64 r, or the pivots D where rows are coupled
    lengths: Tensor,  # (in,) float ℓ
    by_column: bool = True,
) -> RelativeSteps:
    """Return the exponents of 1/√r and 1/ℓ; without columns, one ℓ for all of them (their geometric mean)."""
    logs = -8 * torch.log2(lengths.double())
    middle = float(logs.mean())
    columns = (logs - middle).round() if by_column else torch.zeros_like(logs)
    rows = (-4 * torch.log2(row_weights.double())).round()
    return RelativeSteps(_int8(rows), _int8(columns), 2 ** (middle / 8))


def expected_loss(num_weights: int, constant: float) -> float:
    """Return N·c²/24, nats per token: what scalar grids cost where every step is small against its weights."""
    return num_weights * constant**2 / 24


def constant_for(num_weights: int, loss: float) -> float:
    """Return the c that costs `loss` nats per token."""
    return math.sqrt(24 * loss / num_weights)


def _int8(exponents: Tensor) -> np.ndarray:
    return exponents.clamp(-127, 127).to(torch.int8).numpy()
