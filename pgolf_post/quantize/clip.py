"""Clip rules: the step Δ of a row (or of a tensor, or of a group of columns), chosen before anything is rounded.

*sdclip*      Δ = k · std · adj / (2^(bits-1) - 1). k far above the usual 3-4 makes the grid coarse relative to the row:
              symbols have low entropy, and the entropy coder, not the bit width, decides the bytes (PR #1394,
              openai/parameter-golf). Hessian-aware (PR #1412): rows that carry more of Σ_j |W_ij|·H_jj get wider steps,
              adj_i = 1 + λ(r_i - 1), r normalised to mean 1.
*absmax*      the largest weight sits on the outermost symbol.
*percentile*  the share of the largest weight, out of a fixed list, that leaves the least squared error after rounding;
              *percentile-hessian* weighs each column's error by the Hessian's diagonal.

A new rule is a function here with a line in STEPS_BY_RULE, and a row of rules.CLIP_RULES that says what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.quantize.stored_steps import fits, to_stored
from pgolf_post.rules import GridRule

QUIET = 2.0**-100  # a unit of smaller weights is as good as zero: no activation or norm could tell
LARGEST_STEP = math.sqrt(12)  # times the weights' size: beyond it a row is worth no bits
SHARES = tuple(1.0 - 0.02 * place for place in range(36))  # of the largest weight: 1.00, 0.98 .. 0.30


class Units(NamedTuple):
    """The weights of a matrix, grouped by what shares a step."""

    weights: Tensor  # (units, values) float64
    diagonal: Tensor | None  # of the Hessian, float64, broadcasts to `weights`; None if it is not read
    largest: int  # symbols stay within ±largest
    clip: float  # SDClip's k at the tensor's depth
    rule: GridRule

    @property
    def outermost(self) -> Tensor:  # (units,)
        """The step that puts the largest weight on the outermost symbol."""
        return self.weights.abs().amax(dim=1) / self.largest


def max_symbol(bits: int) -> int:
    """Return the largest symbol of a symmetric grid: 2^(bits-1) - 1; 0 bits are limited only by 16-bit storage."""
    return 2 ** (bits - 1) - 1 if bits else 32767


def row_importance(
    weight: Tensor,  # (out, in)
    hessian_diagonal: Tensor,  # (in,)
) -> Tensor:  # (out,) mean 1
    """Return r_i = mean_j |W_ij|·H_jj divided by its mean over rows; all ones where the mean is zero."""
    raw = (weight.abs().double() * hessian_diagonal.double()).mean(dim=1)
    mean = raw.mean()
    return raw / mean if mean > 0 else torch.ones_like(raw)


def grid_steps(
    name: str,
    weight: Tensor,  # (out, in) float32
    rule: GridRule,
    clip: float,  # k at the tensor's depth
    hessian_diagonal: Tensor | None = None,  # (in,), where the rule asks for it
) -> Tensor:  # (out,), (1,) or (out·in/group_size,) float32, as stored
    """Return the steps that a rule gives a matrix: per row, for the whole tensor, or per group in row-major order.

    An all-zero unit takes step 1: any would do. Raises SettingsError for a clip rule that has no function,
    NumericsError naming the tensor for steps too far apart, for groups that do not divide the columns, or for a row
    that λ makes so coarse that nothing of it is left.
    """
    if rule.scale not in STEPS_BY_RULE:
        raise SettingsError(f"{name}: no such clip rule {rule.scale!r}; valid: {', '.join(STEPS_BY_RULE)}")
    weights, diagonal = _units(name, weight, rule, hessian_diagonal)
    units = Units(weights, diagonal, max_symbol(rule.bits), clip, rule)
    steps = _steps(units)
    if rule.hessian_lambda:
        _require_units_kept(name, units, steps)
    return to_stored(name, steps, rule.per)


def _require_units_kept(name: str, units: Units, steps: Tensor) -> None:
    """Raise NumericsError for a unit whose step λ raises beyond √12 times the size of its weights.

    There Δ²/12 exceeds the mean square: zeros would leave less error than rounding does. A row gets there that carries
    a large share of all importance, such as a single huge one: of n rows it has up to n times the mean's.
    """
    size = units.weights.square().mean(dim=1).sqrt()
    coarse = (steps > LARGEST_STEP * size) & (size > 0)
    if not coarse.any():
        return
    plain = _steps(units._replace(rule=units.rule.model_copy(update={"hessian_lambda": 0.0})))
    lost = coarse & (plain <= LARGEST_STEP * size)
    if not lost.any():
        return
    at = int((steps / plain).masked_fill(~lost, 0).argmax())
    assert units.diagonal is not None
    importance, rule = float(row_importance(units.weights, units.diagonal)[at]), units.rule
    largest, median = float(units.weights[at].abs().max()), float(units.weights.abs().median())
    raise NumericsError(
        f"{name}: Hessian-aware SDClip (λ = {rule.hessian_lambda:g}) makes the step of {rule.per} {at} "
        f"{float(steps[at] / plain[at]):.3g} times as large, {float(steps[at] / size[at]):.3g} times the size of its "
        f"weights, so that nearly all of them would be zero: Σ|w|·H is {importance:.3g} times the mean there",
        hint=f"--set {rule.name}.hessian_lambda=0; or find out why its largest weight is {largest:.3g}, where the "
        f"tensor's median is {median:.3g}",
    )


def _steps(units: Units) -> Tensor:  # (units,) float64
    """Return the steps of the units' rule, of large and small weights alike."""
    choose, loud = STEPS_BY_RULE[units.rule.scale], units.weights.abs().amax(dim=1) >= QUIET
    steps = torch.where(loud, choose(units), 1.0)
    if not loud.any() or fits(steps):
        return steps
    # Rules round candidates to fp16: let them choose where fp16 has room, the largest step about 1.
    unit = 2.0 ** math.floor(math.log2(float(units.outermost[loud].max())))
    return torch.where(loud, choose(units._replace(weights=units.weights / unit)), 1.0) * unit


def _units(
    name: str, weight: Tensor, rule: GridRule, hessian_diagonal: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # (units, values per unit) float64, the same shape or one that broadcasts
    """Return the values that share a step, one unit a row, and the Hessian's diagonal beside them."""
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


def _sdclip(units: Units) -> Tensor:  # (units,)
    """A constant row puts its value on the outermost symbol. Unbounded symbols have the step of 6 bits."""
    weights, rule = units.weights, units.rule
    largest = max_symbol(rule.bits or 6)
    spread = weights.std(dim=1, correction=1 if weights.size(1) > 1 else 0)
    if rule.hessian_lambda > 0:
        assert units.diagonal is not None
        spread = spread * (1 + rule.hessian_lambda * (row_importance(weights, units.diagonal) - 1))
    outermost = weights.abs().amax(dim=1) / largest
    return torch.where(spread == 0, outermost, units.clip * spread / largest)


def _absmax(units: Units) -> Tensor:  # (units,)
    return units.outermost


def _percentile(units: Units) -> Tensor:  # (units,)
    return _least_error(units, None)


def _percentile_hessian(units: Units) -> Tensor:  # (units,)
    return _least_error(units, units.diagonal)


def _least_error(units: Units, importance: Tensor | None) -> Tensor:  # (units,)
    """Return each unit's step of least Σ_j h_j (w_j - ŵ_j)² among share · max|w| / largest."""
    weights, largest = units.weights, units.largest
    ceiling = weights.abs().amax(dim=1)
    best = torch.full_like(ceiling, torch.inf)
    chosen = ceiling / largest
    for share in SHARES:
        steps = (share * ceiling / largest).to(torch.float16).double()
        safe = torch.where(steps > 0, steps, 1.0)[:, None]
        rounded = (weights / safe).round().clamp(-largest, largest) * safe
        squared = (weights - rounded).square()
        cost = (squared if importance is None else squared * importance).sum(dim=1)
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, steps, chosen)
    return chosen


STEPS_BY_RULE: dict[str, Callable[[Units], Tensor]] = {  # keys as in rules.CLIP_RULES
    "sdclip": _sdclip,
    "absmax": _absmax,
    "percentile": _percentile,
    "percentile-hessian": _percentile_hessian,
}
