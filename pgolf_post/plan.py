"""Which method and which settings for which tensor, decided before any work and shown as a table.

A plan is a list of named rules; for each tensor the first rule that matches decides. A tensor that no rule covers and a
rule that matches nothing are errors, never a silent default: the most expensive mistake of this field is a knob that
never acted. Plans are TOML files; the shipped ones are in `pgolf_post/presets/`, and `--set RULE.KEY=VALUE` changes one
value of one rule (`*.KEY` of every rule that has it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.presets import FOLDER, preset_names
from pgolf_post.settings import Settings, apply_override, parse_settings, read_toml

if TYPE_CHECKING:  # they load torch, which `requant --help` can do without
    from pgolf_post.families import ModelFamily, Site

DepthName = Literal["early", "loop", "mid", "late"]
ScaleName = Literal["sdclip", "absmax", "percentile", "percentile-hessian"]


class LqerSettings(Settings):
    """Which correction, and for how many tensors."""

    rank: int = Field(4, ge=1, description="columns of A and rows of B")
    top_k: int = Field(3, ge=0, description="tensors that are corrected: those with the largest error norm; 0 = none")
    asymmetric: bool = Field(True, description="A int2 and B int4 as in PR #1855; else both in `bits` symmetric bits")
    bits: int = Field(4, ge=2, le=8, description="bits of both factors where symmetric")

    @model_validator(mode="after")
    def _bits_act(self) -> LqerSettings:
        if self.asymmetric and "bits" in self.model_fields_set and self.bits != 4:
            raise ValueError("bits acts only where asymmetric = false: the asymmetric form is int2 and int4")
        return self


class DistillSettings(Settings):
    """How the remaining floats are tuned. All of it is part of the artifact's identity."""

    tokens: int = Field(32768, ge=2, description="calibration tokens, the held-out ones included; the text's first")
    steps: int = Field(100, ge=1, description="optimizer steps")
    learning_rate: float = Field(0.001, gt=0, le=1, description="AdamW's at the start; cosine to zero")
    batch_tokens: int = Field(2048, ge=1, description="tokens per step; one window at least")
    holdout: float = Field(0.125, gt=0, lt=1, description="share of the windows that decides whether it is kept")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    seed: int = Field(0, ge=0, description="which windows are held out, and the order of the others")


class Rule(Settings):
    """Which tensors; subclasses say what happens to them. All conditions must hold; the first match wins."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="how --set and the table call the rule")
    roles: tuple[str, ...] = Field((), description="roles of the model family, such as q or mlp_fc; empty = any")
    tensors: str = Field("*", description="glob of tensor names, such as blocks.3.*")
    layers: str = Field("", pattern=r"^(\d+(-\d+)?)?$", description="block range, such as 2-5 or 7; empty = any")
    looped: bool | None = Field(None, description="only blocks that are (true) or are not (false) visited repeatedly")
    max_values: int | None = Field(None, ge=1, description="only tensors of at most so many values")
    optional: bool = Field(False, description="a model without such tensors is no error")
    method: str


class KeepRule(Rule):
    """Stored as floats."""

    method: Literal["keep"] = "keep"
    dtype: Literal["fp16", "bf16"] = "fp16"


class GridRule(Rule):
    """A grid of symbols with a scale per row, tensor or group of columns."""

    bits: int = Field(6, ge=0, le=8, description="symbols within ±(2^(bits-1)-1); 0 = unbounded")
    scale: ScaleName = Field("sdclip", description="how a row's scale is chosen")
    clip: float = Field(12.85, gt=0, description="SDClip k: scale = k·std(row)/(2^(bits-1)-1)")
    hessian_lambda: float = Field(0.0, ge=0, le=1, description="Hessian-aware SDClip: 0 = off (PR #1412)")
    depth_clip: dict[DepthName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="factors of clip by depth: early, loop, mid, late"
    )
    per: Literal["row", "tensor", "group"] = Field("row", description="what shares a scale")
    group_size: int = Field(0, ge=0, description="columns that share a scale, where per = group")
    awq_alpha: float = Field(0.0, ge=0, le=1, description="AWQ: columns × (mean |input|)^α before rounding; 0 = off")
    awq_fold: bool = Field(True, description="undo AWQ in the matrix before, where that is exact; else store 1/s")

    prune: Literal["none", "magnitude", "wanda", "ones"] = Field("none", description="set weights to zero; see prune")
    prune_share: float = Field(0.0, ge=0, le=1, description="share of the weights (of the ±1 symbols for ones) zeroed")

    @field_validator("bits")
    @classmethod
    def _not_one(cls, bits: int) -> int:
        if bits == 1:
            raise ValueError("1 bit leaves only the symbol 0; use 2 to 8, or 0 for unbounded symbols")
        return bits

    @model_validator(mode="after")
    def _consistent(self) -> GridRule:
        if (self.per == "group") != bool(self.group_size):
            raise ValueError(f"per = {self.per!r} with group_size = {self.group_size}: groups need a size, others none")
        if (self.prune == "none") != (self.prune_share == 0):
            raise ValueError(f"prune = {self.prune!r} with prune_share = {self.prune_share}: neither acts alone")
        if self.hessian_lambda and self.scale != "sdclip":
            raise ValueError(f"hessian_lambda acts on scale = 'sdclip' only, not on {self.scale!r}")
        if not self.bits and self.scale != "sdclip":
            raise ValueError(f"unbounded symbols (bits = 0) have no outermost symbol for scale = {self.scale!r}")
        return self


class RtnRule(GridRule):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"


class GptqRule(GridRule):
    """GPTQ on the Hessian of the tensor's site."""

    method: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=1, description="damping of the Hessian, as a share of its mean diagonal")
    act_order: bool = Field(True, description="quantize columns in order of falling Hessian diagonal")
    block_size: int = Field(128, ge=1, description="columns between lazy updates of the rest")
    without_site: Literal["error", "rtn"] = Field(
        "error",
        description="a matrix that no site feeds (only looked up) has no Hessian: refuse it, or round to nearest",
    )


RULES: dict[str, type[Rule]] = {"keep": KeepRule, "rtn": RtnRule, "gptq": GptqRule}


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor."""

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
    def reason(self) -> str:
        """Why the method is not the rule's own, if it is not."""
        return "no site feeds this matrix, so it has no Hessian" if self.method != self.rule.method else ""

    @property
    def clip(self) -> float:
        """The SDClip k of a grid rule at this tensor's depth."""
        assert isinstance(self.rule, GridRule)
        return self.rule.clip * (self.rule.depth_clip.get(self.depth, 1.0) if self.depth else 1.0)


class Plan(Settings):
    """A whole plan: its rules in order, and what acts on the whole model."""

    name: str = "plan"
    rules: tuple[Any, ...] = Field(min_length=1, description="Rules, already parsed; in TOML a list of [[rules]]")
    lqer: LqerSettings | None = Field(None, description="low-rank correction of the worst tensors")
    sequential: bool = Field(
        False, description="GPTQ block by block, each on Hessians collected under the quantized blocks before it"
    )
    distill: DistillSettings | None = Field(None, description="tune what is kept as floats after rounding")

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

    def identity(self) -> dict[str, Any]:
        """What decides the symbols and floats, for ids: everything but names, and what is off."""
        tree = {key: value for key, value in self.model_dump(mode="json").items() if key not in ("name", "rules")}
        tree = {key: value for key, value in tree.items() if value or key not in ("sequential", "distill")}
        rules = [rule.model_dump(mode="json", exclude={"name", "optional"}) for rule in self.rules]
        return {**tree, "rules": rules}


def parse_plan(tree: Mapping[str, Any], source: str) -> Plan:
    """A plan from nested plain values. Raises SettingsError naming the rule and key."""
    tables = tree.get("rules")
    if not isinstance(tables, Sequence) or not all(isinstance(table, Mapping) for table in tables):
        raise SettingsError(f"{source}: a plan is a list of [[rules]] tables")
    rules = tuple(
        parse_rule(table, f"{source}: rule {table.get('name', number)!r}") for number, table in enumerate(tables)
    )
    return parse_settings(Plan, {**tree, "rules": rules}, source)


def parse_rule(table: Mapping[str, Any], source: str) -> Rule:
    """One rule, as the class that its method names. Raises SettingsError."""
    method = table.get("method")
    if method not in RULES:
        raise SettingsError(f"{source}: method = {method!r}; valid methods: {', '.join(RULES)}")
    return parse_settings(RULES[method], table, source)


def read_plan(source: str, overrides: Iterable[str] = ()) -> Plan:
    """A preset by name or a TOML file by path, with `RULE.KEY=VALUE` overrides. Raises SettingsError, NotFoundError."""
    if source in preset_names():
        tree = read_toml(FOLDER / f"{source}.toml")
    elif source.endswith(".toml"):
        tree = read_toml(Path(source))
    else:
        raise NotFoundError(f"no plan named {source!r}; presets: {', '.join(preset_names())}, or give a .toml file")
    for override in overrides:
        _override(tree, override, source)
    return parse_plan(tree, source)


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
    """The keys that a rule's method knows."""
    cls = RULES.get(str(table.get("method")))
    return set(cls.model_fields) if cls else set()


def make_plan(
    shapes: Mapping[str, Any],  # name → anything with .shape
    family: ModelFamily,
    module: Any,  # the family's module
    plan: Plan,
    sites: Iterable[Site] | None = None,  # default: the family's
) -> list[TensorPlan]:
    """One row per tensor. Raises SettingsError naming tensors without a rule or a site, and rules without a tensor."""
    chosen = family.sites(module) if sites is None else sites
    site_of = {tensor: site.name for site in chosen for tensor in site.tensors}
    looped = family.looped_layers(module)
    rows, problems, used = [], [], set()
    for name, tensor in shapes.items():
        role, layer = family.role(name), family.layer(name)
        rule = next((rule for rule in plan.rules if matches(rule, name, role, layer, looped, tensor.shape)), None)
        if rule is None:
            problems.append(f"no rule covers {name} (role {role!r})")
            continue
        used.add(rule.name)
        row = TensorPlan(name, role, rule, site_of.get(name), depth_name(layer, looped, family.num_layers(module)))
        rows.append(row)
        if row.method == "error":
            problems.append(f"rule {rule.name!r}: no site feeds {name}, so GPTQ has no Hessian (without_site = 'rtn')")
    problems += [
        f"rule {rule.name!r} matches no tensor" for rule in plan.rules if not (rule.optional or rule.name in used)
    ]
    if problems:
        raise SettingsError(f"plan {plan.name!r}: " + "; ".join(problems), hint="pgolf-post requant --show-plan")
    return rows


def matches(rule: Rule, name: str, role: str, layer: int | None, looped: frozenset[int], shape: Sequence[int]) -> bool:
    """Whether all conditions of a rule hold for a tensor."""
    if (rule.roles and role not in rule.roles) or not fnmatchcase(name, rule.tensors):
        return False
    if rule.layers and (layer is None or layer not in layer_range(rule.layers)):
        return False
    if rule.looped is not None and (layer is None or (layer in looped) != rule.looped):
        return False
    size = 1
    for length in shape:
        size *= int(length)
    return rule.max_values is None or size <= rule.max_values


def layer_range(text: str) -> range:
    """`2-5` → 2, 3, 4, 5; `7` → 7."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def depth_name(layer: int | None, looped: frozenset[int], num_layers: int) -> DepthName | None:
    """Where a block lies: before the loop, in it, in the first or second half of what follows; thirds without loops."""
    if layer is None:
        return None
    if not looped:
        return ("early", "mid", "late")[min(2, 3 * layer // num_layers)]
    if layer in looped:
        return "loop"
    if layer < min(looped):
        return "early"
    return "mid" if layer < (max(looped) + 1 + num_layers) / 2 else "late"
