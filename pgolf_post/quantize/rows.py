"""Quantize some tensors of a view: each by its entry of the plan, with the evidence, and nothing changed in place.

First everything that is rounded is prepared (stretched, pruned, given its steps). Then each method rounds its tensors
side by side (rounding.py). Last, pruned symbols are zeroed and each result is described.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.families import build_module, get_family
from pgolf_post.plan import TensorPlan
from pgolf_post.quantize.awq import Stretched, stored_factor, stretch
from pgolf_post.quantize.clip import grid_steps, max_symbol
from pgolf_post.quantize.gptq.driver import hessian_error
from pgolf_post.quantize.gptq.stats_factors import StatsFactors, entry_hessian
from pgolf_post.quantize.gptq.trellis import UNION_GRID, grid_points
from pgolf_post.quantize.masks import magnitude_mask, ones_mask, wanda_mask
from pgolf_post.quantize.rounding import Prepared, round_prepared, trellis_of
from pgolf_post.quantize.stored_steps import step_factors, to_stored
from pgolf_post.quantize.tensor import QuantizedTensor, ScaleFactor, smallest_dtype
from pgolf_post.rules import GptqRule, GridRule, KeepRule

FP16_MAX = 65504.0


def quantize_part(
    view: View, entries: Sequence[TensorPlan], stats: Stats, factors: StatsFactors
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Return the quantized tensors of some entries of a plan, and all tensors as they would be decoded without loss."""
    folds = get_family(view.config["family"]).folds(build_module(view.config))
    stretched = stretch(view.tensors, entries, stats, folds)
    grid = [entry for entry in entries if isinstance(entry.rule, GridRule)]
    return quantize_entries(grid, stretched, stats, factors), stretched.decoded()


def quantize_entries(
    entries: Sequence[TensorPlan], stretched: Stretched, stats: Stats, factors: StatsFactors
) -> dict[str, QuantizedTensor]:
    """Quantize the tensors of entries with grid rules, in the plan's order."""
    factors.fill(entry for entry in entries if entry.method == "gptq")
    prepared = [prepare(entry, stretched.tensors[entry.name], stats) for entry in entries]
    with progress_bar("quantizing", sum(item.weight.numel() for item in prepared), "weights") as advance:
        symbols = round_prepared(prepared, factors, advance)
    quantized = {}
    for item in prepared:
        name = item.entry.name
        tensor = finish(item, symbols[name], entry_hessian(item.entry, stats), _damping(item.entry, factors))
        quantized[name] = _with_stored_scales(tensor, stretched.scales[name]) if name in stretched.stored else tensor
    return quantized


def prepare(entry: TensorPlan, tensor: Tensor, stats: Stats) -> Prepared:
    """Return a tensor as a matrix with the steps that its rule gives it."""
    started, rule = time.perf_counter(), entry.rule
    assert isinstance(rule, GridRule)
    hessian = entry_hessian(entry, stats) if rule.reads_hessian else None
    diagonal = None if hessian is None else hessian.diagonal()
    weight = _pruned(as_matrix(tensor.float()), rule, diagonal)
    steps = grid_steps(entry.name, weight, rule if entry.site else rule.without_hessian(), entry.clip, diagonal)
    if trellis_of(entry, len(weight)):
        steps = to_stored(entry.name, steps.double() * UNION_GRID, rule.per)
    return Prepared(entry, weight, steps, tuple(tensor.shape), time.perf_counter() - started)


def _damping(entry: TensorPlan, factors: StatsFactors) -> dict[str, Any]:
    """Return what factorizing a GPTQ entry's moments took."""
    if entry.method != "gptq":
        return {}
    factor = factors.get(entry)
    facts: dict[str, Any] = {"damp_used": factor.damp, "dead_columns": factor.dead_columns}
    if isinstance(entry.rule, GptqRule) and entry.rule.row_feedback:
        rows = factors.get_rows(entry)
        facts |= {"row_damp_used": rows.damp, "dead_rows": rows.dead_columns}
    return facts


def finish(item: Prepared, symbols: Tensor, hessian: Tensor | None, damping: dict[str, Any]) -> QuantizedTensor:
    """Return the quantized tensor with its evidence."""
    started, rule, entry = time.perf_counter(), item.rule, item.entry
    symbols = symbols.int()
    if rule.prune == "ones":
        error = item.weight - symbols * item.steps
        symbols = symbols.masked_fill(ones_mask(symbols, item.steps, error, hessian, rule.prune_share), 0)
    array = smallest_dtype(symbols.numpy())
    # What was done, and what it did to the tensor.
    facts: dict[str, Any] = {"method": entry.method, "rule": rule.name, "role": entry.role, "bits": rule.bits}
    facts |= {"clip": entry.clip} if rule.reads_clip else {}
    facts |= {**damping, "entropy_bits": entropy_bits(array)}
    if item.trellis:
        facts["trellis_states"] = item.trellis.states
    if hessian is not None:
        points = torch.from_numpy(grid_points(array, item.trellis)) if item.trellis else symbols
        facts["error"] = hessian_error(item.weight, points * item.steps, hessian.float())
    facts["clipped"] = float((symbols.abs() == max_symbol(rule.bits)).double().mean()) if symbols.numel() else 0.0
    if rule.prune != "none":
        facts["zeros"] = float((symbols == 0).double().mean()) if symbols.numel() else 0.0
    if entry.reason:
        facts["reason"] = entry.reason
    facts["seconds"] = round(item.seconds + time.perf_counter() - started, 4)
    factors = step_factors(rule.per, item.unit_steps, rule.group_size)
    return QuantizedTensor(entry.name, array, factors, item.shape, item.trellis, facts)


def entropy_bits(symbols: np.ndarray) -> float:
    """Return the order-0 empirical entropy, bits per symbol."""
    if symbols.size == 0:
        return 0.0
    counts = np.bincount(symbols.ravel().astype(np.int32) - int(symbols.min()))
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def as_matrix(tensor: Tensor) -> Tensor:  # any shape → (rows, columns)
    """Return a vector as one row; of more dimensions, all but the first as columns."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def _pruned(weight: Tensor, rule: GridRule, diagonal: Tensor | None) -> Tensor:  # (out, in) → the same
    """Return the weight after the pruning that precedes rounding; wanda without a Hessian takes all inputs as equal."""
    if rule.prune == "magnitude":
        return weight.masked_fill(magnitude_mask(weight, rule.prune_share), 0)
    if rule.prune == "wanda":
        mean_square = torch.ones(weight.size(1)) if diagonal is None else diagonal
        return weight.masked_fill(wanda_mask(weight, mean_square, rule.prune_share), 0)
    return weight


def keep_tensor(
    entry: TensorPlan, tensor: Tensor, hint: str | None = None
) -> np.ndarray:  # float16, or uint16 bits of bfloat16
    """Return a tensor as it is stored in 16-bit floats. Raises NumericsError if a value overflows fp16."""
    assert isinstance(entry.rule, KeepRule)
    if entry.rule.dtype == "bf16":
        bits: np.ndarray = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return bits
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > FP16_MAX:
        raise NumericsError(
            f"{entry.name}: |value| {largest:.4g} does not fit in fp16 (largest {FP16_MAX:g})",
            hint=hint or f"--set {entry.rule.name}.dtype=bf16",
        )
    kept: np.ndarray = tensor.to(torch.float16).numpy()
    return kept


def _with_stored_scales(tensor: QuantizedTensor, scales: Tensor) -> QuantizedTensor:
    """Return the tensor with AWQ's 1/s as a column factor."""
    return replace(tensor, factors=(*tensor.factors, ScaleFactor("column", stored_factor(scales))))
