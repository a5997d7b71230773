"""SDClip: a row's scale from its standard deviation, optionally leaning on the Hessian.

    scale_i = k · std(row_i) · adj_i / (2^(bits-1) - 1)

k far above the usual 3-4 makes the grid coarse relative to the row, so that symbols have low entropy and the entropy
coder, not the bit width, decides the bytes (PR #1394, openai/parameter-golf). The Hessian-aware form (PR #1412) widens
rows that carry more of Σ_j |W_ij|·H_jj: adj_i = 1 + λ(r_i - 1), r normalised to mean 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_post.errors import NumericsError


def max_symbol(bits: int) -> int:
    """The largest symbol of a symmetric grid: 2^(bits-1) - 1."""
    return 2 ** (bits - 1) - 1


def row_importance(
    weight: Tensor,  # (out, in)
    hessian_diagonal: Tensor,  # (in,)
) -> Tensor:  # (out,) mean 1
    """r_i = mean_j |W_ij|·H_jj, divided by its mean over rows (all ones where the mean is zero)."""
    raw = (weight.abs().double() * hessian_diagonal.double()).mean(dim=1)
    mean = raw.mean()
    return raw / mean if mean > 0 else torch.ones_like(raw)


def sdclip_scales(
    name: str,
    weight: Tensor,  # (out, in) float32
    bits: int,
    clip: float,
    hessian_lambda: float = 0.0,
    hessian_diagonal: Tensor | None = None,  # (in,), needed where hessian_lambda > 0
) -> Tensor:  # (out,) float32, each exactly representable in float16
    """Row scales, rounded to the fp16 that the artifact stores.

    A constant row (std 0) takes the scale that puts its value on the outermost symbol; an all-zero row takes 1.
    Raises NumericsError naming the tensor and row if a scale leaves fp16's range (6e-8 .. 65504).
    """
    spread = weight.double().std(dim=1, correction=1 if weight.size(1) > 1 else 0)
    if hessian_lambda > 0:
        assert hessian_diagonal is not None
        spread = spread * (1 + hessian_lambda * (row_importance(weight, hessian_diagonal) - 1))
    scales = clip * spread / max_symbol(bits)
    constant = spread == 0
    largest = weight.double().abs().amax(dim=1)
    scales = torch.where(constant, largest / max_symbol(bits), scales)
    scales = torch.where(constant & (largest == 0), torch.ones_like(scales), scales)
    stored = scales.to(torch.float16).float()
    bad = ~(torch.isfinite(stored) & (stored > 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise NumericsError(
            f"{name}: the scale of row {row} is {float(scales[row]):.3g}, outside fp16's range 6e-8 .. 65504",
            hint="the row's weights are extreme; look at them with pgolf-post show, or keep the tensor in fp16",
        )
    return stored
