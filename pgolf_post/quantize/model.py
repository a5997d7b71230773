"""Quantize a whole view: for every tensor what its plan says, with the evidence, and nothing changed in place.

Matrices are rounded (rows.py), all at once or block by block (sequential.py). The largest errors are then corrected by
low-rank factors (lqer.py). What the plan keeps as floats passes through.
"""

from __future__ import annotations

from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.families import build_module, get_family
from pgolf_post.plan import Plan, TensorPlan, make_plan
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.lqer import corrections
from pgolf_post.quantize.rows import keep_tensor, quantize_part
from pgolf_post.quantize.sequential import quantize_in_order
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.rules import GridRule, KeepRule


def quantize_view(
    view: View,
    stats: Stats,
    plan: Plan,
    factors: StatsFactors | None = None,
    text: CalibrationSet | None = None,
) -> QuantizedModel:
    """Quantize every tensor of a view. `factors` may be shared by calls with the same statistics.

        >>> pg.quantize(view, stats, pg.read_plan("sdclip-1394")).symbols_sha256()

    A sequential plan needs `text`, on which the statistics were collected. Raises SettingsError without it, or for a
    plan that leaves a rule or a tensor over, MismatchError for statistics of other weights or without what is read.
    """
    return quantize_beside_floats(view, stats, plan, factors, text)[0]


def quantize_beside_floats(
    view: View,
    stats: Stats,
    plan: Plan,
    factors: StatsFactors | None = None,
    text: CalibrationSet | None = None,
) -> tuple[QuantizedModel, dict[str, Tensor]]:
    """Return the quantized model, and every tensor as it would be decoded if rounding and pruning cost nothing.

    These are the view's own tensors, except for matrices that AWQ stretched and those that undo it. Any of the model's
    tensors can be exchanged for its float one alone.
    """
    stats.require_view(view.id)
    entries = plan_view(view, plan)
    kept = [entry for entry in entries if isinstance(entry.rule, KeepRule)]
    passthrough = {entry.name: keep_tensor(entry, view.tensors[entry.name]) for entry in kept}
    factors = factors or StatsFactors(stats)
    if plan.sequential:
        quantized, floats = quantize_in_order(view, entries, stats, factors, text)
    else:
        quantized, floats = quantize_part(view, entries, stats, factors)
    if plan.lqer:
        fed = [entry.name for entry in entries if entry.site and isinstance(entry.rule, GridRule)]
        quantized.update(corrections({name: floats[name] for name in fed}, quantized, plan.lqer))
    lineage = {"checkpoint_id": view.id[:12], **stats.lineage()}
    return QuantizedModel(view.config, lineage, quantized, passthrough), floats


def plan_view(view: View, plan: Plan) -> list[TensorPlan]:
    """Return the plan's entry for every tensor of a view. Raises SettingsError if a rule or a tensor is left over."""
    family = get_family(view.config["family"])
    return make_plan(view.tensors, family, build_module(view.config), plan)
