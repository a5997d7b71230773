"""Pruning: weights set to zero because they matter least, by three measures that all read the same statistics.

*magnitude*  the smallest |w| of the matrix.
*wanda*      the smallest |w_ij|·√(mean x_j²) of each row (Sun et al. 2023, arXiv 2306.11695).
*ones*       weights whose symbol is ±1, in the order of what zeroing them adds to the Hessian-weighted error e H eᵀ.

At the entropy of a trained model's symbols pruning rarely pays for its loss in bytes; these are here so that the claim
can be tested on any checkpoint. Each is a new checkpoint (`pgolf-post prune`) or a quantizer option (`RULE.prune`).
A 1×2 worked example of *ones*: symbols (1, 1), steps 1, error e = (0, .4), H = I. Zeroing the first adds 1² = 1 to
e H eᵀ, zeroing the second 1.4² - .4² = 1.8: the first goes first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PruneMethod = Literal["magnitude", "wanda", "ones"]


def magnitude_mask(weight: Tensor, share: float) -> Tensor:  # (out, in) → bool
    """Mark the ⌊share · size⌋ smallest |w|; of equal ones, those that come first."""
    return _smallest(weight.abs().reshape(1, -1), share).view_as(weight)


def wanda_mask(
    weight: Tensor,  # (out, in)
    mean_square: Tensor,  # (in,) mean x_j², the diagonal of the mean Hessian
    share: float,
) -> Tensor:  # (out, in) bool
    """Mark in each row the ⌊share · in⌋ smallest |w_ij|·√(mean x_j²)."""
    return _smallest(weight.double().abs() * mean_square.double().clamp(min=0).sqrt(), share)


def ones_mask(
    symbols: Tensor,  # (out, in) int
    steps: Tensor,  # broadcasts to (out, in)
    error: Tensor,  # (out, in) W - Ŵ
    hessian: Tensor | None,  # (in, in); None = identity
    share: float,  # of the ±1 symbols
) -> Tensor:  # (out, in) bool
    """Mark the ⌊share · count⌋ symbols ±1 whose zeroing adds least to Σ e H eᵀ.

    That is 2δ(eH)_j + δ²H_jj with δ = symbol · step.
    """
    wide = error.double()
    moved = symbols.double() * steps.double()
    if hessian is None:
        cost = 2 * moved * wide + moved.square()
    else:
        cost = 2 * moved * (wide @ hessian.double()) + moved.square() * hessian.diagonal().double()
    candidates = symbols.abs() == 1
    count = int(share * int(candidates.sum()))
    cost = torch.where(candidates, cost, torch.inf)
    mask = torch.zeros(symbols.numel(), dtype=torch.bool)
    mask[torch.argsort(cost.flatten(), stable=True)[:count]] = True
    return mask.view_as(symbols)


def _smallest(scores: Tensor, share: float) -> Tensor:  # (rows, n) → bool, ⌊share · n⌋ per row
    count = int(share * scores.size(1))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :count], True)
