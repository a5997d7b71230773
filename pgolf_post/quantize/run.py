"""Quantize a whole view: for every tensor what its plan says, with the evidence, and nothing changed in place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.families import build_module, get_family
from pgolf_post.plan import GptqRule, GridRule, KeepRule, Plan, TensorPlan, make_plan
from pgolf_post.progress import progress_bar
from pgolf_post.quantize.awq import Stretched, stored_factor, stretch, stretched_hessian
from pgolf_post.quantize.clip import grid_scales, max_symbol
from pgolf_post.quantize.gptq import Factor as HessianFactor
from pgolf_post.quantize.gptq import factorize, gptq, hessian_error
from pgolf_post.quantize.lqer import corrections
from pgolf_post.quantize.masks import magnitude_mask, ones_mask, wanda_mask
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.quantize.tensor import Factor, QuantizedModel, QuantizedTensor, smallest_dtype

FP16_MAX = 65504.0


@dataclass
class FactorCache:
    """Factorised Hessians of one set of statistics: matrices that share a site, and trials of a sweep, share them."""

    stats: Stats
    factors: dict[tuple[str, float, float, bool], HessianFactor] = field(default_factory=dict)

    def get(self, name: str, site: str, rule: GptqRule, hessian: Tensor) -> HessianFactor:
        """The factor of a site's mean Hessian as the rule sees it; `name` is the tensor that errors are about."""
        key = (site, rule.awq_alpha, rule.damp, rule.act_order)
        if key not in self.factors:
            self.factors[key] = factorize(name, hessian, rule.damp, rule.act_order)
        return self.factors[key]


def entropy_bits(symbols: np.ndarray) -> float:
    """Order-0 empirical entropy, bits per symbol."""
    if symbols.size == 0:
        return 0.0
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0


def quantize_tensor(
    row: TensorPlan,
    tensor: Tensor,  # any shape, columns already stretched
    stats: Stats,
    factors: FactorCache,
    stretching: Tensor | None = None,  # (in,) what AWQ multiplied the columns by
) -> QuantizedTensor:
    """Quantize one tensor as its plan says; `facts` carry the evidence. A vector is one row of a matrix."""
    rule = row.rule
    assert isinstance(rule, GridRule)
    started = time.perf_counter()
    weight = as_matrix(tensor.float())
    facts: dict[str, Any] = {
        "method": row.method,
        "rule": rule.name,
        "role": row.role,
        "bits": rule.bits,
        "clip": row.clip,
    }
    needs_hessian = (
        row.method == "gptq" or bool(rule.hessian_lambda) or "hessian" in rule.scale or rule.prune in ("wanda", "ones")
    )
    hessian = stats.mean_hessian(row.site) if needs_hessian and row.site else None
    if hessian is not None and stretching is not None:
        hessian = stretched_hessian(hessian, stretching)
    diagonal = None if hessian is None else hessian.diagonal()
    weight = _pruned(weight, rule, diagonal)
    scales = grid_scales(row.name, weight, rule if row.site else _without_hessian(rule), row.clip, diagonal)
    steps = spread_scales(scales, weight)
    if isinstance(rule, GptqRule) and row.method == "gptq":
        assert row.site is not None
        assert hessian is not None
        factor = factors.get(row.name, row.site, rule, hessian)
        symbols = gptq(weight, factor, steps, max_symbol(rule.bits), rule.block_size)
        facts["damp_used"], facts["dead_columns"] = factor.damp, factor.dead_columns
    else:
        symbols = round_to_nearest(weight, steps, max_symbol(rule.bits))
    if rule.prune == "ones":
        mask = ones_mask(symbols, steps, weight - symbols * steps, hessian, rule.prune_share)
        symbols = symbols.masked_fill(mask, 0)
    if rule.prune != "none":
        facts["zeros"] = float((symbols == 0).double().mean()) if symbols.numel() else 0.0
    if row.reason:
        facts["reason"] = row.reason
    if hessian is not None:
        facts["error"] = hessian_error(weight, symbols * steps, hessian)
    array = smallest_dtype(symbols.numpy())
    facts["entropy_bits"] = entropy_bits(array)
    facts["clipped"] = float((np.abs(array) == max_symbol(rule.bits)).mean()) if array.size else 0.0
    facts["seconds"] = round(time.perf_counter() - started, 4)
    return QuantizedTensor(row.name, array, (_grid(scales, rule),), tuple(tensor.shape), facts=facts)


def _pruned(weight: Tensor, rule: GridRule, diagonal: Tensor | None) -> Tensor:  # (out, in) → the same
    """The weight after the pruning that comes before rounding; wanda without a Hessian takes all inputs as equal."""
    if rule.prune == "magnitude":
        return weight.masked_fill(magnitude_mask(weight, rule.prune_share), 0)
    if rule.prune == "wanda":
        mean_square = torch.ones(weight.size(1)) if diagonal is None else diagonal
        return weight.masked_fill(wanda_mask(weight, mean_square, rule.prune_share), 0)
    return weight


def as_matrix(tensor: Tensor) -> Tensor:  # any shape → (rows, columns)
    """A vector as one row; of more dimensions, all but the first as columns."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def spread_scales(scales: Tensor, weight: Tensor) -> Tensor:  # (units,) → (out, 1) or (out, in)
    """Scales in a shape that broadcasts to the weight (out, in)."""
    rows, columns = weight.shape
    if len(scales) in (1, rows):
        return scales[:, None].expand(rows, 1)
    return scales.repeat_interleave(rows * columns // len(scales)).reshape(rows, columns)


def _grid(scales: Tensor, rule: GridRule) -> Factor:
    values = scales.to(torch.float16).numpy()
    return Factor(rule.per, values, rule.group_size)


def _without_hessian(rule: GridRule) -> GridRule:
    """The rule for a matrix that has no Hessian: scales come from the weights alone."""
    plain = "percentile" if rule.scale == "percentile-hessian" else rule.scale
    return rule.model_copy(update={"hessian_lambda": 0.0, "scale": plain})


def keep_tensor(name: str, tensor: Tensor, rule: KeepRule) -> np.ndarray:  # float16, or uint16 bits of bfloat16
    """A tensor stored as floats. Raises NumericsError if a value overflows fp16."""
    if rule.dtype == "bf16":
        bits: np.ndarray = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
        return bits
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest > FP16_MAX:
        raise NumericsError(
            f"{name}: |value| {largest:.4g} does not fit in fp16 (largest {FP16_MAX:g})",
            hint=f'--set {rule.name}.dtype="bf16"',
        )
    kept: np.ndarray = tensor.to(torch.float16).numpy()
    return kept


def plan_view(view: View, plan: Plan) -> list[TensorPlan]:
    """The plan's row for every tensor of a view. Raises SettingsError if a rule or a tensor is left over."""
    family = get_family(view.config["family"])
    return make_plan(view.tensors, family, build_module(view.config), plan)


def quantize_view(view: View, stats: Stats, plan: Plan, factors: FactorCache | None = None) -> QuantizedModel:
    """Quantize every tensor of a view. `factors` may be shared by calls with the same statistics."""
    rows = plan_view(view, plan)
    shared = factors or FactorCache(stats)
    family = get_family(view.config["family"])
    stretched = stretch(view.tensors, rows, stats, family.folds(build_module(view.config)))
    quantized: dict[str, QuantizedTensor] = {}
    passthrough: dict[str, np.ndarray] = {}
    with progress_bar("quantizing", len(rows)) as advance:
        for row in rows:
            if isinstance(row.rule, KeepRule):
                passthrough[row.name] = keep_tensor(row.name, view.tensors[row.name], row.rule)
            else:
                scales = stretched.scales.get(row.name)
                made = quantize_tensor(row, stretched.tensors[row.name], stats, shared, scales)
                quantized[row.name] = _with_stored_scales(made, scales) if row.name in stretched.stored else made
            advance(1, note=row.name)
    if plan.lqer:
        quantized.update(corrections(_matrices(stretched, rows), quantized, plan.lqer))
    lineage = {"checkpoint_id": view.id[:12], "stats_id": stats.id[:12]}
    return QuantizedModel(view.config, lineage, quantized, passthrough)


def _with_stored_scales(tensor: QuantizedTensor, scales: Tensor | None) -> QuantizedTensor:
    """The tensor with AWQ's 1/s as a column factor."""
    assert scales is not None
    return replace(tensor, factors=(*tensor.factors, Factor("column", stored_factor(scales))))


def _matrices(stretched: Stretched, rows: Sequence[TensorPlan]) -> dict[str, Tensor]:
    """The weight matrices that a site feeds, as the decoder should give them: what low-rank corrections start from."""
    names = [row.name for row in rows if row.site and isinstance(row.rule, GridRule)]
    undone = {name: stretched.tensors[name] / stretched.scales[name] for name in stretched.stored}
    return {name: undone.get(name, stretched.tensors[name]) for name in names}
