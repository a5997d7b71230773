"""Plans: the method and settings of every tensor, decided before any work and shown as a table.

A plan is a list of named rules; for each tensor the first rule that matches decides. A tensor that no rule covers and a
rule that matches nothing are errors, never a silent default: the most expensive mistake of this field is a knob that
never acted. Plans are TOML files; the shipped ones are in `pgolf_post/presets/`, and `--set RULE.KEY=VALUE` changes one
value of one rule (`*.KEY` of every rule that has it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.presets import FOLDER, preset_names
from pgolf_post.rules import METHODS, DepthName, GptqRule, GridRule, Rule, matches, parse_rule
from pgolf_post.settings import LARGEST_SEED, Settings, apply_override, parse_settings, read_toml

if TYPE_CHECKING:  # they load torch, which `requant --help` can do without
    from torch import nn

    from pgolf_post.families import Fold, ModelFamily, Site


class LqerSettings(Settings):
    """Low-rank correction: its form, and how many tensors get one."""

    rank: int = Field(4, ge=1, description="Rank r: the correction is A·B with r columns of A and r rows of B.")
    top_k: int = Field(3, ge=0, description="Number of tensors corrected, those with the largest ‖W - Ŵ‖; 0 is none.")
    asymmetric: bool = Field(
        True,
        description="Store A in 2 and B in 4 asymmetric bits, as PR #1855 does; else both in `bits` symmetric bits.",
    )
    bits: int = Field(4, ge=2, le=8, description="Bits per value of A and B where asymmetric = false.")

    @model_validator(mode="after")
    def _bits_act(self) -> LqerSettings:
        if self.asymmetric and "bits" in self.model_fields_set and self.bits != 4:
            raise ValueError("bits acts only where asymmetric = false: the asymmetric form is int2 and int4")
        return self


class DistillSettings(Settings):
    """Settings of tuning the remaining floats after rounding. They are part of the artifact's identity."""

    tokens: int = Field(
        32768, ge=2, description="Calibration tokens read, from the start of the text, held-out windows included."
    )
    steps: int = Field(100, ge=1, description="Number of optimizer steps.")
    learning_rate: float = Field(0.001, gt=0, le=1, description="AdamW's learning rate at the start; cosine to zero.")
    batch_tokens: int = Field(2048, ge=1, description="Tokens per optimizer step; at least one window is taken.")
    holdout: float = Field(
        0.125, gt=0, lt=1, description="Share of the windows held out to decide whether the tuned values are kept."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="Seed that draws the held-out windows and the order of the others."
    )


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's entry of a plan: what happens to it."""

    name: str
    role: str
    rule: Rule
    site: str | None  # whose Hessian is used
    depth: DepthName | None

    @property
    def method(self) -> str:
        """The method that will be used; differs from the rule's only where the rule allows it."""
        if isinstance(self.rule, GptqRule) and self.site is None:
            return self.rule.without_site
        return self.rule.method

    @property
    def method_text(self) -> str:
        """The method with what it adds to the plain one, for tables."""
        if self.method != "gptq" or not isinstance(self.rule, GptqRule):
            return self.method
        trellis = f", trellis {self.rule.trellis_states}" if self.rule.trellis_states else ""
        return self.method + trellis + (", row feedback" if self.rule.row_feedback else "")

    @property
    def reason(self) -> str:
        """Why the method is not the rule's own; empty if it is."""
        return "no site feeds this matrix, so it has no Hessian" if self.method != self.rule.method else ""

    @property
    def clip(self) -> float:
        """The SDClip k of a grid rule at this tensor's depth."""
        assert isinstance(self.rule, GridRule)
        return self.rule.clip * (self.rule.depth_clip.get(self.depth, 1.0) if self.depth else 1.0)


class Plan(Settings):
    """A whole plan: its rules in order, and what acts on the whole model."""

    name: str = "plan"
    rules: tuple[Any, ...] = Field(
        min_length=1, description="Rules in order of precedence; in TOML a list of [[rules]]."
    )
    lqer: LqerSettings | None = Field(None, description="Low-rank correction of the tensors with the largest error.")
    sequential: bool = Field(
        False, description="Quantize block by block, each on Hessians collected under the quantized blocks before it."
    )
    distill: DistillSettings | None = Field(None, description="Tune the parameters kept as floats after rounding.")

    @field_validator("rules")
    @classmethod
    def _unique(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        names = [rule.name for rule in rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rule names must differ; used twice: {', '.join(twice)}")
        return rules

    @model_validator(mode="after")
    def _sequential_acts(self) -> Plan:
        if self.sequential and not any(isinstance(rule, GptqRule) for rule in self.rules):
            raise ValueError("sequential = true re-collects Hessians for GPTQ, and no rule of this plan uses GPTQ")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether statistics do not suffice: the calibration text itself is needed."""
        return self.sequential or self.distill is not None

    @property
    def reads_fisher(self) -> bool:
        """Whether the statistics need their backward half (`calibrate --fisher`)."""
        return any(isinstance(rule, GptqRule) and rule.row_feedback for rule in self.rules)

    def identity(self) -> dict[str, Any]:
        """Return what decides the symbols and floats, for ids: all settings but names and what is off."""
        tree = {key: value for key, value in self.model_dump(mode="json").items() if key not in ("name", "rules")}
        tree = {key: value for key, value in tree.items() if value or key not in ("sequential", "distill")}
        return {**tree, "rules": [rule.identity() for rule in self.rules]}


def parse_plan(tree: Mapping[str, Any], source: str) -> Plan:
    """Return a plan from nested plain values. Raises SettingsError naming the rule and key."""
    tables = tree.get("rules")
    if not isinstance(tables, Sequence) or not all(isinstance(table, Mapping) for table in tables):
        raise SettingsError(f"{source}: a plan is a list of [[rules]] tables")
    rules = tuple(
        parse_rule(table, f"{source}: rule {table.get('name', number)!r}") for number, table in enumerate(tables)
    )
    return parse_settings(Plan, {**tree, "rules": rules}, source)


def read_plan(source: str | Path, overrides: Iterable[str] = ()) -> Plan:
    """Return a preset by name or a TOML file by path, with `RULE.KEY=VALUE` overrides.

        >>> pg.read_plan("record-1855", ["mlp.clip=11"])

    Raises SettingsError, NotFoundError.
    """
    source = str(source)
    if source in preset_names():
        tree = deepcopy(preset_tree(source))
    elif source.endswith(".toml"):
        tree = read_toml(Path(source))
    else:
        raise NotFoundError(f"no plan named {source!r}; presets: {', '.join(preset_names())}, or give a .toml file")
    for override in overrides:
        _override(tree, override, source)
    return parse_plan(tree, source)


@cache
def preset_tree(name: str) -> dict[str, Any]:
    """Return a preset as plain values; sweeps ask for it with every trial. Copy it before a change."""
    return read_toml(FOLDER / f"{name}.toml")


def _override(tree: dict[str, Any], override: str, source: str) -> None:
    """Change one value of one rule, of all rules that have the key (`*.KEY`), or of the plan (`KEY` without a rule)."""
    target, dot, rest = override.partition(".")
    tables = {str(table.get("name")): table for table in tree.get("rules", []) if isinstance(table, dict)}
    key = rest.partition("=")[0].strip()
    if dot and target == "*":
        having = [table for table in tables.values() if key in _keys(table)]
        if not having:
            raise SettingsError(f"--set {override!r}: no rule of {source} has a key {key!r}")
        for table in having:
            apply_override(table, rest)
    elif dot and target in tables:
        apply_override(tables[target], rest)
    elif target.partition("=")[0].strip() in Plan.model_fields:
        apply_override(tree, override)
    else:
        raise SettingsError(
            f"--set {override!r}: {source} has no rule {target!r}; its rules: {', '.join(tables)}, or *"
        )


def _keys(table: Mapping[str, Any]) -> set[str]:
    """Return the keys that a rule's method knows."""
    method = METHODS.get(str(table.get("method")))
    return set(method.rule.model_fields) if method else set()


def make_plan(
    shapes: Mapping[str, Any],  # name → anything with .shape
    family: ModelFamily,
    module: nn.Module,
    plan: Plan,
    sites: Iterable[Site] | None = None,  # default: the family's
) -> list[TensorPlan]:
    """Return one entry per tensor, in the tensors' order.

    Raises SettingsError that lists every tensor without a rule, every rule without a tensor, and every entry whose
    method cannot act.
    """
    chosen = family.sites(module) if sites is None else sites
    site_of = {tensor: site for site in chosen for tensor in site.tensors}
    looped = family.looped_layers(module)
    entries, problems, used = [], [], set()
    for name, tensor in shapes.items():
        role, layer = family.role(name), family.layer(name)
        rule = next((rule for rule in plan.rules if matches(rule, name, role, layer, looped, tensor.shape)), None)
        if rule is None:
            problems.append(f"no rule covers {name} (role {role!r})")
            continue
        used.add(rule.name)
        site, depth = site_of.get(name), depth_name(layer, looped, family.num_layers(module))
        entries.append(TensorPlan(name, role, rule, site.name if site else None, depth))
        problems += _entry_problems(entries[-1], site)
    problems += _fold_problems(entries, family.folds(module))
    problems += [
        f"rule {rule.name!r} matches no tensor" for rule in plan.rules if not (rule.optional or rule.name in used)
    ]
    if problems:
        raise SettingsError(f"plan {plan.name!r}: " + "; ".join(problems), hint="pgolf-post requant --show-plan")
    return entries


def _entry_problems(entry: TensorPlan, site: Site | None) -> Iterable[str]:
    """Say what of a GPTQ entry cannot act."""
    rule = entry.rule
    if not isinstance(rule, GptqRule):
        return
    if entry.method == "error":
        yield f"rule {rule.name!r}: no site feeds {entry.name}, so GPTQ has no Hessian (without_site = 'rtn')"
    elif site is None and (rule.trellis_states or rule.row_feedback):
        yield (
            f"rule {rule.name!r}: no site feeds {entry.name}, so it is rounded to nearest, and neither trellis_states "
            "nor row_feedback can act; give it a rule without them"
        )
    if site is not None and site.is_head and rule.row_feedback:
        yield (
            f"rule {rule.name!r}: row_feedback cannot act on {entry.name}: the second moment of the head's output "
            "gradients (vocabulary × vocabulary) is not collected"
        )


def _fold_problems(entries: Iterable[TensorPlan], folds: Mapping[str, Fold]) -> Iterable[str]:
    """Say where AWQ would rescale rows whose output gradients were collected unscaled."""
    coupled = {entry.name for entry in entries if isinstance(entry.rule, GptqRule) and entry.rule.row_feedback}
    for entry in entries:
        fold, rule = folds.get(entry.name), entry.rule
        if fold is None or fold.producer not in coupled or entry.site is None:
            continue
        if isinstance(rule, GridRule) and rule.awq_alpha and rule.awq_fold:
            yield (
                f"rule {rule.name!r}: AWQ of {entry.name} is undone in the rows of {fold.producer}, where row_feedback "
                "does not know of it; set awq_fold = false"
            )


def depth_name(layer: int | None, looped: frozenset[int], num_layers: int) -> DepthName | None:
    """Return where a block lies: before the loop, in it, in the first or second half of what follows it.

    Without loops these are thirds: early, mid, late.
    """
    if layer is None:
        return None
    if not looped:
        return ("early", "mid", "late")[min(2, 3 * layer // num_layers)]
    if layer in looped:
        return "loop"
    if layer < min(looped):
        return "early"
    return "mid" if layer < (max(looped) + 1 + num_layers) / 2 else "late"
