"""Rules: which tensors one covers, by what method they are stored, and with which settings.

A plan (plan.py) is a list of rules. Each method has a class of rules, with its settings, and a row of METHODS; the clip
rules that choose steps have rows of CLIP_RULES. What is refused here could not act: bits of an unbounded grid, a group
size without groups, a trellis that is to be pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings, parse_settings

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


def parse_rule(table: Mapping[str, Any], source: str) -> Rule:
    """Return one rule, as the class that its method names. Raises SettingsError."""
    method = table.get("method")
    if method not in METHODS:
        raise SettingsError(f"{source}: method = {method!r}; valid methods: {', '.join(METHODS)}")
    return parse_settings(METHODS[method].rule, table, source)


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
