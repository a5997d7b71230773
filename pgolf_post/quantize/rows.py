"""Quantize some tensors of a view: each by its entry of the plan, with the evidence, and nothing changed in place.

First everything that is rounded is prepared (stretched, pruned, given its scales). Then all GPTQ problems run side by
side. Last, pruned symbols are zeroed and each result is described.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.plan import GptqRule, GridRule, KeepRule, TensorPlan
from pgolf_post.quantize.awq import Stretched, stored_factor, stretch
from pgolf_post.quantize.clip import grid_scales, max_symbol
from pgolf_post.quantize.gptq.driver import Job, gptq_jobs, hessian_error
from pgolf_post.quantize.gptq.stats_factors import StatsFactors, row_hessian
from pgolf_post.quantize.masks import magnitude_mask, ones_mask, wanda_mask
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.quantize.tensor import QuantizedTensor, ScaleFactor, smallest_dtype

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Prepared:
    """One tensor, ready to be rounded."""

    row: TensorPlan
    weight: Tensor  # (rows, columns) float32, stretched and pruned
    scales: Tensor  # (units,) float32, exact in fp16
    shape: tuple[int, ...]
    seconds: float

    @property
    def rule(self) -> GridRule:
        """The row's rule."""
        assert isinstance(self.row.rule, GridRule)
        return self.row.rule

    @property
    def steps(self) -> Tensor:  # (rows, 1) or (rows, columns)
        """The scales in a shape that broadcasts to the weight."""
        return spread_scales(self.scales, self.weight)


def quantize_part(
    view: View, rows: Sequence[TensorPlan], stats: Stats, factors: StatsFactors
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """The quantized tensors of some rows of a plan, and all tensors as they would be decoded without loss."""
    folds = view.family.folds(view.module)
    stretched = stretch(view.tensors, rows, stats, folds)
    grid = [row for row in rows if isinstance(row.rule, GridRule)]
    return quantize_rows(grid, stretched, stats, factors), stretched.decoded()


def quantize_rows(
    rows: Sequence[TensorPlan], stretched: Stretched, stats: Stats, factors: StatsFactors
) -> dict[str, QuantizedTensor]:
    """Quantize the tensors of grid rows, in the plan's order."""
    by_gptq = [row for row in rows if row.method == "gptq"]
    factors.fill(by_gptq)
    prepared = {row.name: prepare(row, stretched.tensors[row.name], stats) for row in rows}
    total = sum(item.weight.numel() for item in prepared.values())
    with progress_bar("quantizing", total) as advance:
        symbols = _gptq_symbols([prepared[row.name] for row in by_gptq], factors, advance)
        for item in prepared.values():
            if item.row.name not in symbols:
                rounded = round_to_nearest(item.weight, item.steps, max_symbol(item.rule.bits))
                symbols[item.row.name] = rounded
                advance(item.weight.numel())
    made = {}
    for name, item in prepared.items():
        damping = _damping(item.row, factors)
        tensor = finish(item, symbols[name], row_hessian(item.row, stats), damping)
        made[name] = _with_stored_scales(tensor, stretched.scales[name]) if name in stretched.stored else tensor
    return made


def prepare(row: TensorPlan, tensor: Tensor, stats: Stats) -> Prepared:
    """A tensor as a matrix with the scales that its rule gives it."""
    started, rule = time.perf_counter(), row.rule
    assert isinstance(rule, GridRule)
    reads_hessian = rule.hessian_lambda or rule.scale == "percentile-hessian" or rule.prune == "wanda"
    hessian = row_hessian(row, stats) if reads_hessian else None
    diagonal = None if hessian is None else hessian.diagonal()
    weight = _pruned(as_matrix(tensor.float()), rule, diagonal)
    scales = grid_scales(row.name, weight, rule if row.site else _without_hessian(rule), row.clip, diagonal)
    return Prepared(row, weight, scales, tuple(tensor.shape), time.perf_counter() - started)


def _gptq_symbols(items: Sequence[Prepared], factors: StatsFactors, advance: Any) -> dict[str, Tensor]:
    """All GPTQ problems of equal block size side by side: name → (rows, columns) symbols."""
    found: dict[str, Tensor] = {}
    sizes = {item.rule.block_size for item in items if isinstance(item.rule, GptqRule)}
    for size in sorted(sizes):
        same = [item for item in items if isinstance(item.rule, GptqRule) and item.rule.block_size == size]
        jobs = [
            Job(item.row.name, item.weight, factors.get(item.row), item.steps, max_symbol(item.rule.bits))
            for item in same
        ]
        found.update(zip((item.row.name for item in same), gptq_jobs(jobs, size, advance=advance), strict=True))
    return found


def _damping(row: TensorPlan, factors: StatsFactors) -> dict[str, Any]:
    """What factorizing a GPTQ row's Hessian took."""
    if row.method != "gptq":
        return {}
    factor = factors.get(row)
    return {"damp_used": factor.damp, "dead_columns": factor.dead_columns}


def finish(item: Prepared, symbols: Tensor, hessian: Tensor | None, damping: dict[str, Any]) -> QuantizedTensor:
    """The quantized tensor with its evidence."""
    started, rule, row = time.perf_counter(), item.rule, item.row
    symbols = symbols.int()
    if rule.prune == "ones":
        error = item.weight - symbols * item.steps
        symbols = symbols.masked_fill(ones_mask(symbols, item.steps, error, hessian, rule.prune_share), 0)
    array = smallest_dtype(symbols.numpy())
    facts: dict[str, Any] = {"method": row.method, "rule": rule.name, "role": row.role, "bits": rule.bits}
    facts |= {"clip": row.clip, **damping, "entropy_bits": entropy_bits(array)}
    if hessian is not None:
        facts["error"] = hessian_error(item.weight, symbols * item.steps, hessian.float())
    facts["clipped"] = float((symbols.abs() == max_symbol(rule.bits)).double().mean()) if symbols.numel() else 0.0
    if rule.prune != "none":
        facts["zeros"] = float((symbols == 0).double().mean()) if symbols.numel() else 0.0
    if row.reason:
        facts["reason"] = row.reason
    facts["seconds"] = round(item.seconds + time.perf_counter() - started, 4)
    grid = ScaleFactor(rule.per, item.scales.to(torch.float16).numpy(), rule.group_size)
    return QuantizedTensor(row.name, array, (grid,), item.shape, facts=facts)


def entropy_bits(symbols: np.ndarray) -> float:
    """Order-0 empirical entropy, bits per symbol."""
    if symbols.size == 0:
        return 0.0
    counts = np.bincount(symbols.ravel().astype(np.int32) - int(symbols.min()))
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def as_matrix(tensor: Tensor) -> Tensor:  # any shape → (rows, columns)
    """A vector as one row; of more dimensions, all but the first as columns."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def spread_scales(scales: Tensor, weight: Tensor) -> Tensor:  # (units,) → (out, 1) or (out, in)
    """Scales in a shape that broadcasts to the weight (out, in)."""
    rows, columns = weight.shape
    if len(scales) in (1, rows):
        return scales[:, None].expand(rows, 1)
    return scales.repeat_interleave(rows * columns // len(scales)).reshape(rows, columns)


def _pruned(weight: Tensor, rule: GridRule, diagonal: Tensor | None) -> Tensor:  # (out, in) → the same
    """The weight after the pruning that comes before rounding; wanda without a Hessian takes all inputs as equal."""
    if rule.prune == "magnitude":
        return weight.masked_fill(magnitude_mask(weight, rule.prune_share), 0)
    if rule.prune == "wanda":
        mean_square = torch.ones(weight.size(1)) if diagonal is None else diagonal
        return weight.masked_fill(wanda_mask(weight, mean_square, rule.prune_share), 0)
    return weight


def _without_hessian(rule: GridRule) -> GridRule:
    """The rule for a matrix that has no Hessian: scales come from the weights alone."""
    plain = "percentile" if rule.scale == "percentile-hessian" else rule.scale
    return rule.model_copy(update={"hessian_lambda": 0.0, "scale": plain})


def keep_tensor(row: TensorPlan, tensor: Tensor) -> np.ndarray:  # float16, or uint16 bits of bfloat16
    """A tensor stored as floats. Raises NumericsError if a value overflows fp16."""
    assert isinstance(row.rule, KeepRule)
    if row.rule.dtype == "bf16":
        bits: np.ndarray = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return bits
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > FP16_MAX:
        raise NumericsError(
            f"{row.name}: |value| {largest:.4g} does not fit in fp16 (largest {FP16_MAX:g})",
            hint=f'--set {row.rule.name}.dtype="bf16"',
        )
    kept: np.ndarray = tensor.to(torch.float16).numpy()
    return kept


def _with_stored_scales(tensor: QuantizedTensor, scales: Tensor) -> QuantizedTensor:
    """The tensor with AWQ's 1/s as a column factor."""
    return replace(tensor, factors=(*tensor.factors, ScaleFactor("column", stored_factor(scales))))
