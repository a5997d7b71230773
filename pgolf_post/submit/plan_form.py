"""The whole form of an artifact of a plan: what its program is told, and what of other plans it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgolf_post.families import ModelFamily
from pgolf_post.plan import Plan, TensorPlan, make_plan, parse_plan
from pgolf_post.quantize.clip import STEPS_BY_RULE
from pgolf_post.submit.seeds import Seed
from pgolf_post.submit.sources import Sources, address

FINISH = """
def finish(item, symbols, hessian, damping):
    factors = step_factors(item.rule.per, item.unit_steps, item.rule.group_size)
    return QuantizedTensor(item.entry.name, smallest_dtype(symbols.int().numpy()), factors, item.shape, item.trellis)
"""
NEEDED_BY_TRELLISES = {  # function → its parameters: not called where no rule has a trellis
    "pgolf_post.quantize.gptq.diagonals:round_diagonals": "job, fast",
    "pgolf_post.quantize.gptq.viterbi:search": "targets, states, bounds",
    "pgolf_post.quantize.gptq.trellis:grid_points": "symbols, trellis",
}


def plan_of(seed: Seed) -> Plan:
    """Return the plan that an artifact was quantized by, from its settings."""
    rules = [{**rule, "name": f"rule{number}", "optional": True} for number, rule in enumerate(seed.settings["rules"])]
    return parse_plan({"rules": rules, "lqer": seed.settings.get("lqer")}, str(seed.artifact))


def asked_by_plan(plan: Plan, module: Any, family: ModelFamily, backward: bool) -> dict[str, Any]:
    """Return what the program asks for by name where a plan quantizes; statistics may have the backward half too.

    No plan reads that half, but batches are smaller where it is collected, so that sums differ in their last bits.
    """
    return {
        "fits": False,
        "backward": backward,
        "lookups": family.lookups(module) if backward else (),
        "stats_id": "",
        "folds": family.folds(module) if any(getattr(rule, "awq_alpha", 0) for rule in plan.rules) else {},
        "rules": list(plan.rules),
        "entries": _entries(make_plan(dict(module.named_parameters()), family, module, plan), plan),
        "lqer": plan.lqer,
    }


def _entries(entries: Sequence[TensorPlan], plan: Plan) -> list[tuple[str, str, int, str | None, str | None]]:
    """Return a plan's entries with the numbers of their rules: name, role, rule, site, depth."""
    rules = list(plan.rules)
    return [(each.name, each.role, rules.index(each.rule), each.site, each.depth) for each in entries]


def settle_plan(sources: Sources, plan: Plan) -> None:
    """Replace what only other plans need, and the evidence that an artifact's meta.json keeps."""
    rules: Any = plan.rules
    quantize = "pgolf_post.quantize"
    if not any(getattr(rule, "prune", "none") != "none" for rule in rules):
        sources.replace(
            address(f"{quantize}.rows", "_pruned"), "def _pruned(weight, rule, diagonal):\n    return weight"
        )
        sources.replace(address(f"{quantize}.rows", "finish"), FINISH)
    if not any(getattr(rule, "row_feedback", False) for rule in rules):
        source = (
            "def rounding(job, panel, buffers, feedback, fast):\n    return _in_torch(job, panel, buffers, feedback)"
        )
        sources.replace(address(f"{quantize}.gptq.columns", "rounding"), source)
    if not any(getattr(rule, "trellis_states", 0) for rule in rules):
        for at, parameters in NEEDED_BY_TRELLISES.items():
            sources.replace(at, f"def {at.partition(':')[2]}({parameters}):\n    raise RuntimeError")
    functions = {
        scale: STEPS_BY_RULE[scale].__name__ for scale in {rule.scale for rule in rules if hasattr(rule, "scale")}
    }
    chosen = ", ".join(f"{scale!r}: {name}" for scale, name in sorted(functions.items()))
    sources.replace(address(f"{quantize}.clip", "STEPS_BY_RULE"), f"STEPS_BY_RULE = {{{chosen}}}")
