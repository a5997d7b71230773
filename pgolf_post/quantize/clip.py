"""Clip rules: the scale of a row (or of a tensor, or of a group of columns) before anything is rounded.

*sdclip*      scale = k · std · adj / (2^(bits-1) - 1). k far above the usual 3-4 makes the grid coarse relative to the
              row: symbols have low entropy, and the entropy coder, not the bit width, decides the bytes (PR #1394,
              openai/parameter-golf). Hessian-aware (PR #1412): rows that carry more of Σ_j |W_ij|·H_jj get wider steps,
              adj_i = 1 + λ(r_i - 1), r normalised to mean 1.
*absmax*      the largest weight sits on the outermost symbol.
*percentile*  the share of the largest weight, out of a fixed list, that leaves the least squared error after rounding;
              *percentile-hessian* weighs each column's error by the Hessian's diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_post.errors import NumericsError
from pgolf_post.plan import GridRule

SHARES = tuple(1.0 - 0.02 * step for step in range(36))  # of the largest weight: 1.00, 0.98 .. 0.30


def max_symbol(bits: int) -> int:
    """The largest symbol of a symmetric grid: 2^(bits-1) - 1; 0 bits are unbounded, limited only by 16-bit storage."""
    return 2 ** (bits - 1) - 1 if bits else 32767


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
    weight: Tensor,  # (rows, values) float32
    bits: int,
    clip: float,
    hessian_lambda: float = 0.0,
    hessian_diagonal: Tensor | None = None,  # (values,), needed where hessian_lambda > 0
) -> Tensor:  # (rows,) float32, each exactly representable in float16
    """SDClip row scales. A constant row puts its value on the outermost symbol; an all-zero row takes scale 1.

    Unbounded symbols (bits = 0) have the step that 6 bits would have. Raises NumericsError outside fp16's range.
    """
    units = weight.double()
    scales = _sdclip(units, bits or 6, clip, hessian_lambda, hessian_diagonal)
    return to_stored(name, _of_zeros(units, scales), "row")


def grid_scales(
    name: str,
    weight: Tensor,  # (out, in) float32
    rule: GridRule,
    clip: float,
    hessian_diagonal: Tensor | None = None,  # (in,), where the rule asks for it
) -> Tensor:  # (out,), (1,) or (out·in/group_size,) float32, each exactly representable in float16
    """The scales that a rule gives a matrix: per row, for the whole tensor, or per group of columns in row order."""
    units, diagonal = _units(name, weight, rule, hessian_diagonal)
    if rule.scale == "sdclip":
        scales = _sdclip(units, rule.bits or 6, clip, rule.hessian_lambda, diagonal)
    elif rule.scale == "absmax":
        scales = units.abs().amax(dim=1) / max_symbol(rule.bits)
    else:
        scales = _percentile(units, max_symbol(rule.bits), diagonal if rule.scale == "percentile-hessian" else None)
    return to_stored(name, _of_zeros(units, scales), rule.per)


def _units(
    name: str, weight: Tensor, rule: GridRule, hessian_diagonal: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # (units, values per unit) float64, the same shape or one that broadcasts
    """The values that share a scale, one unit a row, and the Hessian diagonal beside them."""
    rows, columns = weight.shape
    diagonal = None if hessian_diagonal is None else hessian_diagonal.double()[None, :]
    if rule.per == "row":
        return weight.double(), diagonal
    if rule.per == "tensor":
        flat = None if diagonal is None else diagonal.expand(rows, columns).reshape(1, -1)
        return weight.double().reshape(1, -1), flat
    if columns % rule.group_size:
        raise NumericsError(
            f"{name}: its {columns} columns do not divide into groups of {rule.group_size}",
            hint=f"--set {rule.name}.group_size=N with N a divisor of {columns}",
        )
    groups = weight.double().reshape(-1, rule.group_size)
    beside = None if diagonal is None else diagonal.expand(rows, columns).reshape(-1, rule.group_size)
    return groups, beside


def _sdclip(units: Tensor, bits: int, clip: float, hessian_lambda: float, diagonal: Tensor | None) -> Tensor:
    spread = units.std(dim=1, correction=1 if units.size(1) > 1 else 0)
    if hessian_lambda > 0:
        assert diagonal is not None
        spread = spread * (1 + hessian_lambda * (row_importance(units, diagonal) - 1))
    outermost = units.abs().amax(dim=1) / max_symbol(bits)
    return torch.where(spread == 0, outermost, clip * spread / max_symbol(bits))


def _percentile(units: Tensor, largest: int, weights: Tensor | None) -> Tensor:  # (units,)
    """Of the scales share · max|w| / largest, each row's with the least Σ_j h_j (w_j - ŵ_j)²."""
    ceiling = units.abs().amax(dim=1)
    best = torch.full_like(ceiling, torch.inf)
    chosen = ceiling / largest
    for share in SHARES:
        scales = (share * ceiling / largest).to(torch.float16).double()
        safe = torch.where(scales > 0, scales, 1.0)[:, None]
        rounded = (units / safe).round().clamp(-largest, largest) * safe
        squared = (units - rounded).square()
        cost = (squared if weights is None else squared * weights).sum(dim=1)
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, scales, chosen)
    return chosen


def _of_zeros(units: Tensor, scales: Tensor) -> Tensor:
    """An all-zero unit takes the scale 1: any would do."""
    return torch.where(units.abs().amax(dim=1) == 0, torch.ones_like(scales), scales)


def to_stored(name: str, scales: Tensor, unit: str) -> Tensor:  # (units,) float64 → float32, exact in float16
    """Scales as the artifact stores them. Raises NumericsError naming tensor and unit outside fp16's range."""
    stored = scales.to(torch.float16).float()
    bad = ~(torch.isfinite(stored) & (stored > 0))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise NumericsError(
            f"{name}: the scale of {unit} {at} is {float(scales[at]):.3g}, outside fp16's range 6e-8 .. 65504",
            hint="the weights there are extreme; look at them with pgolf-post show, or keep the tensor in fp16",
        )
    return stored
