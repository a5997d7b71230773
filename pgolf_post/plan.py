"""Plans: the method and settings of every tensor, decided before any work and shown as a table.

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
    from torch import nn

    from pgolf_post.families import Fold, ModelFamily, Site

DepthName = Literal["early", "loop", "mid", "late"]


@dataclass(frozen=True)
class ClipRule:
    """Row of CLIP_RULES: the inputs of one choice of steps Δ. Its function has the same name in quantize/clip.py."""

    source: str
    reads: tuple[str, ...] = ()  # settings of a rule that act on this choice alone
    needs_hessian: bool = False  # always reads the Hessian's diagonal
    without_hessian: str = ""  # the clip rule used for a matrix that has none
    unbounded: bool = False  # gives a step to unbounded symbols (bits = 0)


CLIP_RULES: dict[str, ClipRule] = {  # the value of `scale` in a plan
    "sdclip": ClipRule(
        "PR #1394; Hessian-aware: PR #1412 (openai/parameter-golf)",
        reads=("clip", "depth_clip", "hessian_lambda"),
        unbounded=True,
    ),
    "absmax": ClipRule("the int8 baseline of openai/parameter-golf"),
    "percentile": ClipRule("clip search by squared error, as in AWQ (arXiv 2306.00978)"),
    "percentile-hessian": ClipRule(
        "clip search by Hessian-weighted error", needs_hessian=True, without_hessian="percentile"
    ),
}


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
    seed: int = Field(0, ge=0, description="Seed that draws the held-out windows and the order of the others.")


class Rule(Settings):
    """Conditions on tensors; subclasses say what happens to those that match. All must hold; the first match wins."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$", description="Name by which --set, --show-plan and messages call the rule."
    )
    roles: tuple[str, ...] = Field(
        (), description="Roles of the model family that the rule covers, such as q or mlp_fc; empty is any."
    )
    tensors: str = Field("*", description="Glob that a tensor's name must match, such as blocks.3.*.")
    layers: str = Field(
        "", pattern=r"^(\d+(-\d+)?)?$", description="Blocks that the rule covers, such as 2-5 or 7; empty is any."
    )
    looped: bool | None = Field(
        None, description="Cover only blocks that are visited repeatedly (true), or only those that are not (false)."
    )
    max_values: int | None = Field(None, ge=1, description="Cover only tensors of at most this many values.")
    optional: bool = Field(False, description="Accept a model without such tensors; else that is an error.")
    method: str

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide symbols and floats, as plain values."""
        return self.model_dump(mode="json", exclude={"name", "optional"})


class KeepRule(Rule):
    """Store tensors as floats."""

    method: Literal["keep"] = "keep"
    dtype: Literal["fp16", "bf16"] = Field("fp16", description="Storage type of the values, 2 bytes each.")


class GridRule(Rule):
    """Round to a grid of symbols, with one step Δ per row, tensor or group of columns."""

    bits: int = Field(
        6, ge=0, le=8, description="Bits per symbol: symbols stay within ±(2^(bits-1)-1); 0 is unbounded (16 bits)."
    )
    scale: str = Field("sdclip", description=f"Clip rule that chooses the step Δ: {', '.join(CLIP_RULES)}.")
    clip: float = Field(12.85, gt=0, description="SDClip's k: Δ = k·std(row)/(2^(bits-1)-1).")
    hessian_lambda: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight λ of Hessian-aware SDClip, which widens the steps of important rows; 0 is off.",
    )
    depth_clip: dict[DepthName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Factors that multiply `clip` by depth: early, loop, mid, late."
    )
    per: Literal["row", "tensor", "group"] = Field("row", description="Weights that share a step.")
    group_size: int = Field(0, ge=0, description="Number of columns that share a step, where per = group.")
    awq_alpha: float = Field(
        0.0, ge=0, le=1, description="AWQ's α: columns are multiplied by (mean |input|)^α before rounding; 0 is off."
    )
    awq_fold: bool = Field(
        True, description="Undo AWQ in the matrix before, where that is exact; else store 1/s, 2 bytes a column."
    )

    prune: Literal["none", "magnitude", "wanda", "ones"] = Field(
        "none", description="Measure by which weights are set to zero; see pgolf-post prune."
    )
    prune_share: float = Field(
        0.0, ge=0, le=1, description="Share of the weights (of the ±1 symbols for ones) that is set to zero."
    )

    @field_validator("bits")
    @classmethod
    def _not_one(cls, bits: int) -> int:
        if bits == 1:
            raise ValueError("1 bit leaves only the symbol 0; use 2 to 8, or 0 for unbounded symbols")
        return bits

    @field_validator("scale")
    @classmethod
    def _known_scale(cls, scale: str) -> str:
        if scale not in CLIP_RULES:
            raise ValueError(f"no such clip rule; valid: {', '.join(CLIP_RULES)}")
        return scale

    @model_validator(mode="after")
    def _consistent(self) -> GridRule:
        if (self.per == "group") != bool(self.group_size):
            raise ValueError(f"per = {self.per!r} with group_size = {self.group_size}: groups need a size, others none")
        if (self.prune == "none") != (self.prune_share == 0):
            raise ValueError(f"prune = {self.prune!r} with prune_share = {self.prune_share}: neither acts alone")
        if self.hessian_lambda and "hessian_lambda" not in CLIP_RULES[self.scale].reads:
            reading = " or ".join(repr(name) for name, rule in CLIP_RULES.items() if "hessian_lambda" in rule.reads)
            raise ValueError(f"hessian_lambda acts on scale = {reading} only, not on {self.scale!r}")
        if not self.bits and not CLIP_RULES[self.scale].unbounded:
            raise ValueError(f"unbounded symbols (bits = 0) have no outermost symbol for scale = {self.scale!r}")
        return self

    @property
    def reads_hessian(self) -> bool:
        """Whether preparing a tensor (not rounding it) reads the diagonal of its Hessian."""
        return bool(CLIP_RULES[self.scale].needs_hessian or self.hessian_lambda or self.prune == "wanda")

    @property
    def reads_clip(self) -> bool:
        """Whether `clip` acts on the steps."""
        return "clip" in CLIP_RULES[self.scale].reads

    def without_hessian(self) -> GridRule:
        """Return the rule for a matrix that has no Hessian: steps come from the weights alone."""
        plain = CLIP_RULES[self.scale].without_hessian or self.scale
        return self.model_copy(update={"hessian_lambda": 0.0, "scale": plain})


class RtnRule(GridRule):
    """Round to nearest."""

    method: Literal["rtn"] = "rtn"


class GptqRule(GridRule):
    """Round by GPTQ on the Hessian of the tensor's site."""

    method: Literal["gptq"] = "gptq"
    damp: float = Field(0.01, gt=0, le=1, description="Damping of the Hessian, as a share of its mean diagonal.")
    act_order: bool = Field(True, description="Quantize columns in order of falling Hessian diagonal.")
    block_size: int = Field(128, ge=1, description="Columns between lazy updates of the rest; it changes speed alone.")
    without_site: Literal["error", "rtn"] = Field(
        "error",
        description="A matrix that no site feeds (only looked up) has no Hessian: refuse it, or round to nearest.",
    )
    trellis_states: Literal[0, 4, 8, 16, 32, 64, 128, 256] = Field(
        0, description="States of the trellis that each column runs through, on a grid of step Δ/2; 0 is a scalar grid."
    )
    lane_rows: int = Field(512, ge=1, description="Rows after which the trellis restarts.")
    row_feedback: bool = Field(
        False, description="Feed errors into later rows too, by the second moment of the output gradients (Fisher)."
    )

    @model_validator(mode="after")
    def _trellis_acts(self) -> GptqRule:
        if not self.trellis_states and self.lane_rows != type(self).model_fields["lane_rows"].default:
            raise ValueError("lane_rows acts on a trellis only; set trellis_states = 4, 8 .. 256 with it")
        if self.trellis_states and self.prune != "none":
            raise ValueError(f"prune = {self.prune!r} needs a scalar grid: a trellis has no zero in every state")
        return self

    def identity(self) -> dict[str, Any]:
        """Return Rule.identity() without what is off, so that artifacts made before these settings are still found."""
        off = set() if self.trellis_states else {"trellis_states", "lane_rows"}
        off |= set() if self.row_feedback else {"row_feedback"}
        return {key: value for key, value in super().identity().items() if key not in off}


@dataclass(frozen=True)
class Method:
    """Row of METHODS: facts about a `method`. One that rounds has a function of its name in quantize/rounding.py."""

    rule: type[Rule]
    source: str
    reads: tuple[str, ...] = ()  # statistics that rounding itself reads


METHODS: dict[str, Method] = {
    "keep": Method(KeepRule, "control tensors stay floats, as in the baseline of openai/parameter-golf"),
    "rtn": Method(RtnRule, "round to nearest"),
    "gptq": Method(
        GptqRule,
        "arXiv 2210.17323; trellis: Marcellin & Fischer 1990; row_feedback: YAQA, arXiv 2505.22988",
        reads=("Hessian", "second moment of output gradients, with row_feedback"),
    ),
}


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


def parse_rule(table: Mapping[str, Any], source: str) -> Rule:
    """Return one rule, as the class that its method names. Raises SettingsError."""
    method = table.get("method")
    if method not in METHODS:
        raise SettingsError(f"{source}: method = {method!r}; valid methods: {', '.join(METHODS)}")
    return parse_settings(METHODS[method].rule, table, source)


def read_plan(source: str | Path, overrides: Iterable[str] = ()) -> Plan:
    """Return a preset by name or a TOML file by path, with `RULE.KEY=VALUE` overrides.

        >>> pg.read_plan("record-1855", ["mlp.clip=11"])

    Raises SettingsError, NotFoundError.
    """
    source = str(source)
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
    """Return the blocks that a range names: `2-5` → 2, 3, 4, 5; `7` → 7."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


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
