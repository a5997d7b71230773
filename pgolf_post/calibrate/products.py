"""Σxxᵀ of a chunk of tokens: the upper triangle alone, in float32, to be summed in float64.

On a CPU, BLAS's symmetric rank-k update (ssyrk) computes one triangle: on one core in half the time of xᵀx at widths
256 to 2048, and a quarter less than the best of panels 64 to 512 wide over the upper triangle. A GPU multiplies
bfloat16 inputs into float32, panel by panel, each with the rows above its end: products of bfloat16 are exact in
float32.
"""

from __future__ import annotations

import torch
from scipy.linalg import blas
from torch import Tensor

PANEL = 512  # columns of a GPU's panels
ROWS = 64  # tokens at a time for elementwise sums: they stay in the cache


def upper_gram(
    x: Tensor,  # (tokens, n)
    dtype: torch.dtype = torch.float32,  # what a GPU multiplies
) -> Tensor:  # (n, n) float32, upper triangle; entries below it are undefined
    """Return xᵀx of one chunk, on the device of x."""
    if x.device.type != "cpu":
        return panel_gram(x.to(dtype), PANEL)
    lower = blas.ssyrk(1.0, x.float().contiguous().numpy().T, lower=1)  # column-major: its lower is our upper
    return torch.from_numpy(lower.T)


def panel_gram(
    x: Tensor,  # (tokens, n)
    panel: int,
) -> Tensor:  # (n, n) float32, upper block triangle; zero below it
    """Return xᵀx by panels of columns: panel [lo, hi) is multiplied with columns [0, hi)."""
    n = x.size(1)
    product = torch.zeros(n, n, device=x.device)
    for low in range(0, n, panel):
        high = min(low + panel, n)
        left, right = x[:, :high].mT, x[:, low:high]
        if x.dtype == torch.bfloat16 and x.device.type == "cuda":
            product[:high, low:high] = torch.mm(left, right, out_dtype=torch.float32)
        else:
            product[:high, low:high] = left.float() @ right.float()
    return product


def magnitudes(x: Tensor) -> tuple[Tensor, Tensor]:  # (tokens, n) → (n,) float32 Σ|x|, (n,) float32 max|x|
    """Return sum and maximum of |x| over tokens; a GPU takes them at once, a CPU in pieces that stay in its cache."""
    if x.device.type != "cpu":
        size = x.float().abs()
        return size.sum(0), size.amax(0)
    total, largest = torch.zeros(x.size(1)), torch.zeros(x.size(1))
    for piece in x.float().split(ROWS):
        size = piece.abs()
        total += size.sum(0)
        largest = torch.maximum(largest, size.amax(0))
    return total, largest


def token_means(delta: Tensor) -> Tensor:  # (tokens, out) → (tokens,) float32
    """Return each token's mean of δ² over rows; a CPU takes the norm of each token, which needs no copy of δ²."""
    if delta.device.type != "cpu":
        return delta.float().square().mean(1)
    return torch.linalg.vector_norm(delta.float(), dim=1).square_().div_(delta.size(1))
