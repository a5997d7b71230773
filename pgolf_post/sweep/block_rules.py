"""The quantization plan of a trial: a preset or file with the trial's changes, some of them for one block alone.

`RULE@3.clip` changes the rule for block 3: a copy of the rule, for that block alone, goes before it.
"""

from __future__ import annotations

import json

from pgolf_post.errors import SettingsError
from pgolf_post.plan import Plan, read_plan
from pgolf_post.rules import Rule, parse_rule
from pgolf_post.sweep.settings import TrialSettings

EACH_BLOCK = "@each."  # stands for every block in turn (expand.py)


def trial_plan(settings: TrialSettings) -> Plan:
    """Return the quantization plan of a trial. Raises SettingsError naming the key that does not fit."""
    usual = {key: value for key, value in settings.set.items() if "@" not in key}
    plan = read_plan(settings.plan, [f"{key}={_toml(value)}" for key, value in usual.items()])
    shadowed = sorted({rule.name for rule in plan.rules} & set(TrialSettings.model_fields))
    if shadowed:
        raise SettingsError(f"{settings.plan}: sweeps cannot address rules named like a setting: {', '.join(shadowed)}")
    if plan.reads_text:
        raise SettingsError(
            f"{settings.plan}: sequential and distill read calibration text, which a sweep's trials are not given",
            hint="leave them out here, and requant what the sweep finds with --sequential --distill",
        )
    for key, value in settings.set.items():
        if "@" in key:
            plan = _split_block(plan, key, value)
    return plan


def _split_block(plan: Plan, key: str, value: object) -> Plan:
    """Return the plan with one rule changed for one block."""
    rule_name, _, rest = key.partition("@")
    block, _, setting = rest.partition(".")
    rules: list[Rule] = list(plan.rules)
    place = next((i for i, rule in enumerate(rules) if rule.name == rule_name), None)
    if place is None or not block.isdigit() or not setting:
        names = ", ".join(rule.name for rule in rules)
        raise SettingsError(f"{key}: expected RULE@BLOCK.KEY with one of the plan's rules: {names}")
    rule = rules[place]
    if rule.layers:
        raise SettingsError(f"{key}: rule {rule_name!r} is for blocks {rule.layers} already")
    table = {**rule.model_dump(mode="json", exclude_unset=True), "name": f"{rule_name}-block{block}", "layers": block}
    table |= {"method": rule.method, setting: value}
    rules.insert(place, parse_rule(table, key))
    return plan.model_copy(update={"rules": tuple(rules)})


def _toml(value: object) -> str:
    """Return a value as TOML reads it."""
    return json.dumps(value, ensure_ascii=False)
