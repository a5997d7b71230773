"""Quantize a whole view: for every tensor what its plan says, with the evidence, and nothing changed in place.

First everything that is rounded is prepared (stretched, pruned, given its scales), then all GPTQ problems run side by
side, then what they left is corrected and described.
"""

from __future__ import annotations

from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.plan import GridRule, KeepRule, Plan, TensorPlan, make_plan
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.lqer import corrections
from pgolf_post.quantize.rows import keep_tensor, quantize_part
from pgolf_post.quantize.sequential import quantize_in_order
from pgolf_post.quantize.tensor import QuantizedModel


def quantize_view(
    view: View,
    stats: Stats,
    plan: Plan,
    factors: StatsFactors | None = None,
    text: CalibrationSet | None = None,
) -> QuantizedModel:
    """Quantize every tensor of a view. `factors` may be shared by calls with the same statistics.

    `text`, of which the statistics are, is what a sequential plan needs; SettingsError without it.
    """
    return quantize_beside_floats(view, stats, plan, factors, text)[0]


def quantize_beside_floats(
    view: View,
    stats: Stats,
    plan: Plan,
    factors: StatsFactors | None = None,
    text: CalibrationSet | None = None,
) -> tuple[QuantizedModel, dict[str, Tensor]]:
    """The quantized model, and every tensor as it would be decoded if rounding and pruning cost nothing.

    That is the view's own tensor, but for matrices that AWQ stretched and those that undo it: any of the model's
    tensors can be exchanged for these alone.
    """
    stats.require_view(view.id)
    rows = plan_view(view, plan)
    kept = [row for row in rows if isinstance(row.rule, KeepRule)]
    passthrough = {row.name: keep_tensor(row, view.tensors[row.name]) for row in kept}
    factors = factors or StatsFactors(stats)
    if plan.sequential:
        quantized, floats = quantize_in_order(view, rows, stats, factors, text)
    else:
        quantized, floats = quantize_part(view, rows, stats, factors)
    if plan.lqer:
        fed = [row.name for row in rows if row.site and isinstance(row.rule, GridRule)]
        quantized.update(corrections({name: floats[name] for name in fed}, quantized, plan.lqer))
    lineage = {"checkpoint_id": view.id[:12], **stats.lineage()}
    return QuantizedModel(view.config, lineage, quantized, passthrough), floats


def plan_view(view: View, plan: Plan) -> list[TensorPlan]:
    """The plan's row for every tensor of a view. Raises SettingsError if a rule or a tensor is left over."""
    return make_plan(view.tensors, view.family, view.module, plan)
