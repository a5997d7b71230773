"""What a sweep asks, as a strict TOML file, and the list of trials that it stands for.

A trial is the base settings with some of them changed. A change is addressed by a dotted key: one that begins with a
field of `TrialSettings` (`calibration.tokens`, `blend.ema_share`, `ttt.learning_rate`, `codec`) changes that; any other
is a change of the quantization plan, as `requant --set` takes it (`mlp.clip`, `*.hessian_lambda`, `lqer.top_k`).
`RULE@3.clip` changes the rule for block 3 alone and `RULE@each.clip` stands for one trial per block.

    [grid]  the product of its lists        [each]  one list at a time        [[trials]]  by name

The control, the base settings unchanged, is always the first trial; one that equals it is that very trial.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pgolf_post.average.settings import Selection
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.errors import SettingsError
from pgolf_post.pack.codecs import check_codec
from pgolf_post.plan import Plan, Rule, parse_rule, read_plan
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.settings import Settings, apply_override, canonical_json, parse_settings, read_toml
from pgolf_post.sweep.conditions import check_condition

Role = Literal["control", "baseline", "noise", "trial"]
RankBy = Literal["screen", "expected", "plain", "sliding", "ttt", "bytes"]
SCORING: tuple[RankBy, ...] = ("screen", "expected", "plain", "sliding", "ttt")  # in the order in which they run
DRAWN = ("screen", "expected")  # those that draw windows from the whole text
UNQUANTIZED = "unquantized"
EACH_BLOCK = "@each."


class TrainStage(Settings):
    """Training as the first stage: the trainer's own recipe, run as a process of its own."""

    recipe: str = Field(description="a recipe's TOML file")
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of the recipe")
    seconds: float | None = Field(None, gt=0, description="instead of the recipe's length")
    steps: int | None = Field(None, ge=1, description="instead of the recipe's length")

    @model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if self.seconds is not None and self.steps is not None:
            raise ValueError("seconds and steps are two ways of saying how long; give one")
        return self


class BlendStage(Selection):
    """An average of the run's checkpoints, as `swa-blend` makes it, in memory."""

    ema_share: float = Field(0.0, ge=0, le=1, description="share of the final EMA; the rest is the members'")

    def selection(self) -> Selection:
        return Selection(**self.model_dump(exclude={"ema_share"}))


class EmaStage(Settings):
    """A moving average of any length, as `ema-blend` makes it, in memory."""

    sigma: float | None = Field(None, gt=0, description="power-function width, as a share of the run")
    half_life_steps: float | None = Field(None, gt=0, description="exponential half-life in steps")
    max_error: float = Field(0.05, gt=0, description="largest accepted reconstruction error")

    @model_validator(mode="after")
    def _one_length(self) -> EmaStage:
        if (self.sigma is None) == (self.half_life_steps is None):
            raise ValueError("give sigma or half_life_steps, one of them")
        return self


class TrialSettings(Settings):
    """Everything that decides a trial's weights and bytes."""

    checkpoint: str | None = Field(None, description="PATH; default: --checkpoint, else the newest final one")
    weights: Literal["ema", "raw", "swa"] | None = Field(None, description="default: EMA where the folder has it")
    train: TrainStage | None = None
    blend: BlendStage | None = None
    ema: EmaStage | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    plan: str = Field(DEFAULT_PRESET, description="a preset or a TOML file")
    set: dict[str, Any] = Field(default_factory=dict, description="changes of the plan, RULE.KEY → value")
    codec: str = "rans"
    ttt: dict[str, Any] = Field(default_factory=dict, description="changes of the TTT stage's settings")
    quantize: bool = Field(True, description="false: the weights themselves are scored")
    jitter_seed: int = Field(
        0, ge=0, description="not 0: rows moved by ±1e-4 against their scales, to see what rounding does"
    )

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        try:
            return check_codec(codec)
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _one_average(self) -> TrialSettings:
        if self.blend and self.ema:
            raise ValueError("blend and ema are two kinds of average; give one")
        return self

    def with_change(self, key: str, value: Any) -> TrialSettings:
        """These settings with one dotted key changed. Raises SettingsError."""
        head, *rest = key.split(".")
        tree = self.model_dump(mode="json", exclude_unset=True)
        if head not in type(self).model_fields or head == "set":
            tree["set"] = {**tree.get("set", {}), key: value}
        else:
            node = tree
            for part in [head, *rest][:-1]:
                node[part] = dict(node.get(part) or {})
                node = node[part]
            node[(rest or [head])[-1]] = value
        return parse_settings(TrialSettings, tree, f"trial with {key} = {value!r}")


class TrialStage(Settings):
    """One stage of a trial after quantizing."""

    only_if: str = Field("", description="condition on the trial's facts so far, such as headroom_bytes >= 0")

    @field_validator("only_if")
    @classmethod
    def _readable(cls, text: str) -> str:
        try:
            check_condition(text)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return text


class ScreenStage(TrialStage):
    """Plain windows drawn from the whole text, the same for every trial."""

    tokens: int = Field(16384, ge=1, description="scored tokens, as whole windows")
    seed: int = Field(0, ge=0, description="of the draw")


class ExpectedStage(ScreenStage):
    """Windows drawn likewise: the loss before quantization, and what quantizing is expected to add (its divergence)."""


class PlainStage(TrialStage):
    """The validation text in plain windows."""

    max_tokens: int | None = Field(None, ge=2, description="score only the first so many tokens")


class SlidingStage(PlainStage):
    """The validation text in windows that overlap."""

    stride: int = Field(64, ge=1, description="targets per window")


class TTTStage(PlainStage):
    """The validation text under test-time training."""

    preset: str = "sgd"
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of the preset")


class Stages(Settings):
    """What is done with a quantized model, in this order; an absent stage is not run. Packing always is."""

    predict: TrialStage | None = Field(None, description="bytes without packing")
    pack: TrialStage = TrialStage()
    screen: ScreenStage | None = ScreenStage()
    expected: ExpectedStage | None = None
    plain: PlainStage | None = None
    sliding: SlidingStage | None = None
    ttt: TTTStage | None = None
    seq_len: int | None = Field(None, ge=1, description="window; default the model's training length")
    level: float = Field(0.95, gt=0.5, lt=1, description="of the intervals")

    def scoring(self) -> list[RankBy]:
        """The scoring stages there are, in order."""
        return [name for name in SCORING if getattr(self, name) is not None]


class Gates(Settings):
    """When a sweep or a trial is not worth going on with."""

    control_bpb: float | None = Field(None, gt=0, description="what the control's ranking score must reproduce")
    tolerance: float = Field(0.0005, gt=0, description="… to within this many bpb")
    stop_if_monotone_worse: int = Field(
        0, ge=0, description="after so many trials of an axis, each worse than the one before, skip the rest of it"
    )
    drop_if_over_budget: bool = Field(False, description="do not score what does not fit")


class SweepSpec(Settings):
    """One sweep."""

    question: str = Field(min_length=1, description="what is to be found out, in words")
    checkpoints: tuple[str, ...] = Field((), description="the whole sweep on each of these; default --checkpoint")
    data: str | None = Field(None, description="data folder; default: the checkpoint's own")
    base: TrialSettings = TrialSettings()
    grid: dict[str, Any] = Field(default_factory=dict, description="key → values; their product")
    each: dict[str, Any] = Field(default_factory=dict, description="key → values; one key at a time")
    trials: tuple[dict[str, Any], ...] = Field((), description="name, and dotted keys → values")
    baselines: tuple[str, ...] = Field((UNQUANTIZED,), description="unquantized, or presets beside the control")
    noise_repeats: int = Field(2, ge=0, description="repeats of the control with jittered scales")
    stages: Stages = Stages()
    gates: Gates = Gates()
    rank_by: RankBy | None = Field(None, description="default: the last scoring stage")
    budget_bytes: int = Field(16_000_000, ge=0)
    code: tuple[str, ...] = Field((), description="counted code files")

    @model_validator(mode="after")
    def _can_rank(self) -> SweepSpec:
        if self.rank_by in SCORING and self.rank_by not in self.stages.scoring():
            raise ValueError(f"rank_by = {self.rank_by!r}, but there is no [stages.{self.rank_by}]")
        if self.rank_by is None and not self.stages.scoring():
            raise ValueError("no scoring stage: say rank_by = 'bytes', or give one of stages.screen … stages.ttt")
        if self.gates.control_bpb is not None and self.ranking == "bytes" and not self.stages.scoring():
            raise ValueError("gates.control_bpb needs a scoring stage")
        return self

    @property
    def ranking(self) -> RankBy:
        return self.rank_by or self.stages.scoring()[-1]

    @property
    def deciding_stage(self) -> RankBy | None:
        """The scoring stage whose differences decide verdicts; None where nothing is scored."""
        if self.ranking != "bytes":
            return self.ranking
        return self.stages.scoring()[-1] if self.stages.scoring() else None


@dataclass(frozen=True)
class Trial:
    """One trial, not yet run."""

    name: str
    role: Role
    settings: TrialSettings
    group: str = ""  # the checkpoint whose control it is compared with
    changes: tuple[tuple[str, Any], ...] = ()  # (dotted key, value)
    axis: str = ""  # the key that alone distinguishes it from its neighbours

    @property
    def value(self) -> Any:
        """Where it lies on its axis."""
        return dict(self.changes).get(self.axis)


def read_spec(path: Path, overrides: Iterable[str] = ()) -> SweepSpec:
    """A sweep's TOML file, with `key.path=value` overrides. Raises SettingsError, NotFoundError."""
    tree = read_toml(path)
    for override in overrides:
        apply_override(tree, override)
    base = {key: tree.pop(key) for key in list(tree) if key in TrialSettings.model_fields}
    tree["base"] = {**tree.get("base", {}), **base}
    spec = parse_settings(SweepSpec, tree, str(path))
    for trial in expand(spec, lambda _: 1):  # all that can be wrong with a trial's settings is found before any work
        trial_plan(trial.settings)
    return spec


def flat_lists(tree: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, list[Any]]:
    """`{"mlp": {"clip": [10, 11]}}` → `{"mlp.clip": [10, 11]}`. Raises SettingsError for a value that is no list."""
    found: dict[str, list[Any]] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat_lists(value, where, f"{dotted}.")
        elif isinstance(value, list | tuple) and value:
            found[dotted] = list(value)
        else:
            raise SettingsError(f"[{where}] {dotted} = {value!r}: expected a list of values")
    return found


def expand(spec: SweepSpec, num_blocks: Callable[[TrialSettings], int]) -> list[Trial]:
    """All trials of a spec: for each checkpoint its control, baselines, noise repeats, and what was asked for.

    `num_blocks` says how many blocks a base's model has; it is asked only where `RULE@each` stands.
    Raises SettingsError for settings that cannot be used and for names that are used twice.
    """
    trials: list[Trial] = []
    for checkpoint in spec.checkpoints or (None,):
        base = spec.base if checkpoint is None else spec.base.with_change("checkpoint", checkpoint)
        several = len(spec.checkpoints) > 1
        trials += _of_base(spec, base, f"{checkpoint}: " if several else "", checkpoint or "", num_blocks)
    names = [trial.name for trial in trials]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"trials need different names; used twice: {', '.join(twice)}")
    return trials


def _of_base(
    spec: SweepSpec, base: TrialSettings, prefix: str, group: str, num_blocks: Callable[[TrialSettings], int]
) -> list[Trial]:
    control = Trial(f"{prefix}control", "control", base, group)
    asked = [_changed(base, prefix, group, *point) for point in _points(spec, base, num_blocks)]
    twin = next((trial for trial in asked if trial.axis and _content(trial.settings) == _content(base)), None)
    if twin:  # a point of an axis that changes nothing: the control itself lies there
        asked = [trial for trial in asked if trial is not twin]
        label = twin.name.removeprefix(prefix)
        control = replace(control, name=f"{prefix}control ({label})", changes=twin.changes, axis=twin.axis)
    baselines = [_baseline(base, prefix, group, name) for name in spec.baselines]
    noise = [
        Trial(f"{prefix}noise {n}", "noise", base.with_change("jitter_seed", n), group)
        for n in range(1, spec.noise_repeats + 1)
    ]
    return [control, *baselines, *noise, *asked]


def _content(settings: TrialSettings) -> bytes:
    """What settings come to, however they are written."""
    rest = settings.model_dump(mode="json", exclude={"plan", "set"})
    return canonical_json({**rest, "plan": trial_plan(settings).identity()})


def _baseline(base: TrialSettings, prefix: str, group: str, name: str) -> Trial:
    if name == UNQUANTIZED:
        return Trial(f"{prefix}{UNQUANTIZED}", "baseline", base.with_change("quantize", False), group)
    return Trial(f"{prefix}{name}", "baseline", base.model_copy(update={"plan": name, "set": {}}), group)


Point = tuple[str, list[tuple[str, Any]], str]  # name, changes, axis


def _points(spec: SweepSpec, base: TrialSettings, num_blocks: Callable[[TrialSettings], int]) -> list[Point]:
    """Every asked-for point: the grid's product, each list alone, the named trials."""
    grid, each = flat_lists(spec.grid, "grid"), flat_lists(spec.each, "each")
    points: list[Point] = []
    if grid:
        keys, last = list(grid), list(grid)[-1]
        for point in itertools.product(*grid.values()):
            changes = list(zip(keys, point, strict=True))
            points.append((_label(changes), changes, last))
    for key, values in each.items():
        for concrete in _blocks(key, base, num_blocks):
            points += [(_label([(concrete, value)]), [(concrete, value)], concrete) for value in values]
    for number, tree in enumerate(spec.trials):
        changes = list(_flat(tree))
        name = dict(changes).pop("name", None)
        if not isinstance(name, str) or not name:
            raise SettingsError(f"[[trials]] number {number + 1} has no name")
        points.append((name, [change for change in changes if change[0] != "name"], ""))
    return points


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _blocks(key: str, base: TrialSettings, num_blocks: Callable[[TrialSettings], int]) -> list[str]:
    if EACH_BLOCK not in key:
        return [key]
    rule, setting = key.split(EACH_BLOCK)
    return [f"{rule}@{block}.{setting}" for block in range(num_blocks(base))]


def _changed(
    base: TrialSettings, prefix: str, group: str, name: str, changes: list[tuple[str, Any]], axis: str
) -> Trial:
    settings = base
    for key, value in changes:
        settings = settings.with_change(key, value)
    return Trial(f"{prefix}{name}", "trial", settings, group, tuple(changes), axis)


def _label(changes: list[tuple[str, Any]]) -> str:
    return ", ".join(f"{key.removeprefix('*.')} = {value}" for key, value in changes)


# ---- the plan of a trial ---------------------------------------------------------------------------------------------


def trial_plan(settings: TrialSettings) -> Plan:
    """The quantization plan of a trial. Raises SettingsError naming the key that does not fit."""
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


def _split_block(plan: Plan, key: str, value: Any) -> Plan:
    """The plan with one rule changed for one block: a copy of it, for that block alone, goes before it."""
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


def _toml(value: Any) -> str:
    """A value as TOML reads it."""
    return json.dumps(value, ensure_ascii=False)
