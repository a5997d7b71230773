"""The price of bytes while training: λ · Σ bits(σ_row / Δ_row), nats a token, on top of the loss.

An entropy coder stores a weight of a row with root mean square σ, rounded in steps of Δ, in about
½·log2(1 + 2πe·σ²/Δ²) bits: the Gaussian's log2(√(2πe)·σ/Δ) where steps are small, nothing where they are large, and in
between at most 0.27 bit above the entropy of a rounded Gaussian. The steps are those of `fit` (`pgolf_post.fit.steps`),
Δ_row = c/(√D_row·ℓ), D and ℓ from the running curvature, ℓ the geometric mean over columns, and do not move with the
weights; c is the one at which all matrices together take the bits a weight that the recipe names. The derivative is

    ∂/∂W_ij = λ / ln 2 · W_ij / (σ² + Δ²/2πe)

a weight decay that is strong where a row takes many bits for its size, and weak where it has none to give.

At those steps every weight costs η·c²/24 nats (η: what a trellis leaves of a scalar grid's squared error at equal bits)
and one more bit quarters that. So one bit of one weight is worth ln 2 · η·c²/12 nats a token: the slope of `fit`'s
front.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAUSSIAN = 2 * math.pi * math.e  # σ²/Δ² × this = 4^bits at high rates
TRELLIS = 4**-0.204  # η, of 64 states (docs/theory/quantization.md)
HALVINGS = 50  # of the interval that holds log2 c


def row_bits(ratio: Tensor) -> Tensor:  # σ²/Δ², any shape → bits a weight
    """Return the bits of a weight of a row."""
    return 0.5 * torch.log2(1 + GAUSSIAN * ratio)


def front_slope(constant: Tensor) -> Tensor:  # () c → () nats a token for each bit
    """Return what one bit is worth where steps have this constant."""
    return math.log(2) * TRELLIS * constant.square() / 12


def constant_at(
    ratios: Tensor,  # (rows,) σ²/Δ² at c = 1, of all matrices
    weights: Tensor,  # (rows,) weights of each row
    bits: float,
) -> Tensor:  # ()
    """Return the c at which a weight takes so many bits in the mean. No number is read: nothing waits for a GPU."""
    safe = ratios.clamp(min=torch.finfo(ratios.dtype).tiny)
    low, high = 0.5 * safe.log2().min() - bits - 8, 0.5 * safe.log2().max() + 8
    total = bits * weights.sum()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = row_bits(ratios / (2 * middle).exp2()) @ weights > total  # steps are too small
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return ((low + high) / 2).exp2()


def bits_of(weight: Tensor, steps: Tensor) -> Tensor:  # (out, in), (out,) → ()
    """Return the bits of all weights of a matrix."""
    return row_bits(weight.square().mean(1) / steps.square()).sum() * weight.shape[1]


def bits_gradient(weight: Tensor, steps: Tensor) -> Tensor:  # (out, in), (out,) → (out, in)
    """Return the derivative of `bits_of` in the weights."""
    size = weight.square().mean(1) + steps.square() / GAUSSIAN
    return weight / (math.log(2) * size[:, None])
