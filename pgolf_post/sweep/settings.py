"""Settings of a sweep, as a strict TOML file: an unknown key is refused.

    question = "…"           base settings stand at the top: what decides the weights and bytes of every trial
    [grid] [each] [[trials]] what is changed, trial by trial (expand.py)
    [stages.NAME]            what scores a trial (stages/)
    [gates]                  when a sweep or a trial is not worth going on with
    [halving]                the rungs of a successive halving (train_stage.py)

docs/howto/sweeps.md has examples.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from pgolf_post.average.settings import Selection
from pgolf_post.calibrate.settings import CalibrationSettings
from pgolf_post.errors import SettingsError
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.codecs import check_codec
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.settings import Settings, parse_settings
from pgolf_post.sweep.conditions import check_condition
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.stages.base import TrialStage
from pgolf_post.sweep.train_stage import Halving, TrainStage

BYTES = "bytes"  # what a spec may rank by beside its scoring stages
UNQUANTIZED = "unquantized"
IN_EVERY_ID = {"predict", "pack", "screen", "expected", "plain", "sliding", "ttt", "seq_len", "level"}


class BlendStage(Selection):
    """An average of the run's checkpoints, as `swa-blend` makes it, in memory."""

    ema_share: float = Field(0.0, ge=0, le=1, description="Share of the final EMA; the rest is the members'.")

    def selection(self) -> Selection:
        return Selection(**self.model_dump(exclude={"ema_share"}))


class EmaStage(Settings):
    """A moving average of any length, as `ema-blend` makes it, in memory."""

    sigma: float | None = Field(None, gt=0, description="Power-function width, as a share of the run.")
    half_life_steps: float | None = Field(None, gt=0, description="Exponential half-life in steps.")
    max_error: float = Field(0.05, gt=0, description="Largest accepted reconstruction error.")

    @model_validator(mode="after")
    def _one_length(self) -> EmaStage:
        if (self.sigma is None) == (self.half_life_steps is None):
            raise ValueError("give sigma or half_life_steps, one of them")
        return self


class FitStage(FitSettings):
    """Quantizing to a byte budget, as `fit` does it."""

    budget: int | None = Field(None, ge=0, description="Bytes of code and artifact; default: the spec's budget_bytes.")

    def settings(self) -> FitSettings:
        return FitSettings(**self.model_dump(exclude={"budget"}))


class TrialSettings(Settings):
    """Everything that decides a trial's weights and bytes."""

    checkpoint: str | None = Field(None, description="Folder; default: --checkpoint, else the newest final one.")
    weights: Literal["ema", "raw", "swa"] | None = Field(None, description="Default: EMA where the folder has it.")
    train: TrainStage | None = None
    blend: BlendStage | None = None
    ema: EmaStage | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    method: Literal["plan", "fit"] = Field("plan", description="What quantizes: a plan, or a fit to a byte budget.")
    plan: str = Field(DEFAULT_PRESET, description="A preset or a TOML file.")
    set: dict[str, Any] = Field(default_factory=dict, description="Changes of the plan, RULE.KEY → value.")
    fit: FitStage | None = Field(None, description="Settings of the fit.")
    codec: str = "rans"
    ttt: dict[str, Any] = Field(default_factory=dict, description="Changes of the TTT stage's settings.")
    quantize: bool = Field(True, description="False scores the weights themselves.")
    jitter_seed: int = Field(
        0, ge=0, description="Not 0: rows moved by ±1e-4 against their scales, to see what rounding does."
    )

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        try:
            return check_codec(codec)
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> TrialSettings:
        if self.blend and self.ema:
            raise ValueError("blend and ema are two kinds of average; give one")
        if self.fit is not None and self.method != "fit":
            given = ", ".join(f"fit.{key}" for key in sorted(self.fit.model_fields_set)) or "[fit]"
            raise ValueError(f"{given} does nothing without method = 'fit'")
        return self

    def with_change(self, key: str, value: object) -> TrialSettings:
        """Return these settings with one dotted key changed. Raises SettingsError."""
        return self.with_changes([(key, value)])

    def with_changes(self, changes: list[tuple[str, Any]]) -> TrialSettings:
        """Return these settings with dotted keys changed. Raises SettingsError."""
        tree = self.model_dump(mode="json", exclude_unset=True)
        for key, value in changes:
            head, *rest = key.split(".")
            if is_of_plan(key) and key not in ("plan", "set"):
                tree["set"] = {**tree.get("set", {}), key: value}
                continue
            node = tree
            for part in [head, *rest][:-1]:
                node[part] = dict(node.get(part) or {})
                node = node[part]
            node[(rest or [head])[-1]] = value
        changed = ", ".join(f"{key} = {value!r}" for key, value in changes)
        return parse_settings(TrialSettings, tree, f"trial with {changed}")

    def stage_changes(self, stage: str) -> dict[str, Any]:
        """Return the trial's own changes of a scoring stage's settings."""
        return self.ttt if stage == "ttt" else {}

    def facts(self) -> dict[str, Any]:
        """Return the settings as JSON. Those that came later are left out where they are off, so that ids stay."""
        off = {name for name, value in (("method", self.method == "plan"), ("fit", self.fit is None)) if value}
        return self.model_dump(mode="json", exclude=off)


def is_of_plan(key: str) -> bool:
    """Whether a dotted key changes the quantization plan: it begins with no other field of a trial's settings."""
    head = key.partition(".")[0]
    return head in ("plan", "set") or head not in TrialSettings.model_fields


class CommonStages(Settings):
    """Stages of a trial after quantizing; packing always runs. The scoring stages are those of STAGES."""

    predict: TrialStage | None = Field(None, description="Predict the bytes before packing.")
    pack: TrialStage = TrialStage()
    seq_len: int | None = Field(None, ge=1, description="Window in tokens; default: the model's training length.")
    level: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")

    @field_validator("*")
    @classmethod
    def _readable(cls, stage: object) -> object:
        try:
            if isinstance(stage, TrialStage):
                check_condition(stage.only_if)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return stage

    def get(self, name: str) -> Any:  # the settings class of STAGES[name], or None
        """Return a scoring stage's settings; None where it is not run."""
        return getattr(self, name)

    def scoring(self) -> list[str]:
        """Return the scoring stages that are run, in order."""
        return [name for name in STAGES if self.get(name) is not None]

    def identity(self) -> dict[str, Any]:
        """Return the settings as trial ids have them: without stages that came later and are off."""
        dump = self.model_dump(mode="json")
        return {key: value for key, value in dump.items() if value is not None or key in IN_EVERY_ID}


if TYPE_CHECKING:
    Stages = CommonStages
else:  # a field for every row of STAGES
    rows = {name: (row.settings | None, Field(row.default, description=row.reads)) for name, row in STAGES.items()}
    Stages = create_model("Stages", __base__=CommonStages, **rows)


class Gates(Settings):
    """When a sweep or a trial is not worth going on with."""

    control_bpb: float | None = Field(None, gt=0, description="Score in bpb that the control must reproduce …")
    tolerance: float = Field(0.0005, gt=0, description="… to within this many bpb.")
    stop_if_monotone_worse: int = Field(
        0, ge=0, description="After so many trials of an axis, each worse than the one before, skip the rest of it."
    )
    drop_if_over_budget: bool = Field(False, description="Do not score artifacts over the budget.")
    accept: float | None = Field(None, le=0, description="PROMOTE needs a difference in bpb of at most this.")
    kill: float | None = Field(None, ge=0, description="KILL from this difference in bpb on, however few the seeds.")
    minimum_effect: float = Field(0.0, ge=0, description="A gain in bpb below this is not worth having.")

    @property
    def decide(self) -> bool:
        """Whether trials of one run are decided on too; those of several seeds always are."""
        return self.accept is not None or self.kill is not None or self.minimum_effect > 0


class SweepSpec(Settings):
    """One sweep."""

    question: str = Field(min_length=1, description="What is to be found out, in words.")
    checkpoints: tuple[str, ...] = Field((), description="Run the whole sweep on each of these; default --checkpoint.")
    data: str | None = Field(None, description="Data folder; default: the checkpoint's own.")
    base: TrialSettings = TrialSettings()
    grid: dict[str, Any] = Field(default_factory=dict, description="Key → values; their product.")
    each: dict[str, Any] = Field(default_factory=dict, description="Key → values; one key at a time.")
    trials: tuple[dict[str, Any], ...] = Field((), description="Name, and dotted keys → values.")
    baselines: tuple[str, ...] = Field((UNQUANTIZED,), description="unquantized, or presets beside the control.")
    noise_repeats: int = Field(2, ge=0, description="Repeats of the control with jittered scales.")
    stages: Stages = Stages()
    gates: Gates = Gates()
    halving: Halving | None = Field(None, description="Train all trials shortly, the better ones longer.")
    rank_by: str | None = Field(None, description="A scoring stage or bytes; default: the last scoring stage.")
    budget_bytes: int = Field(16_000_000, ge=0, description="Bytes of code and artifact.")
    code: tuple[str, ...] = Field((), description="Counted code files.")

    @field_validator("rank_by")
    @classmethod
    def _known(cls, rank_by: str | None) -> str | None:
        if rank_by not in (None, BYTES, *STAGES):
            raise ValueError(f"there is nothing of this name to rank by; there are: {', '.join((*STAGES, BYTES))}")
        return rank_by

    @model_validator(mode="after")
    def _can_rank(self) -> SweepSpec:
        if self.rank_by in STAGES and self.rank_by not in self.stages.scoring():
            raise ValueError(f"rank_by = {self.rank_by!r}, but there is no [stages.{self.rank_by}]")
        if self.rank_by is None and not self.stages.scoring():
            first, *_, last = STAGES
            raise ValueError(f"no scoring stage: say rank_by = 'bytes', or give one of stages.{first} … stages.{last}")
        if self.gates.control_bpb is not None and self.ranking == BYTES and not self.stages.scoring():
            raise ValueError("gates.control_bpb needs a scoring stage")
        return self

    @cached_property
    def ranking(self) -> str:
        """The ranking: a scoring stage, or bytes."""
        return self.rank_by or self.stages.scoring()[-1]

    @cached_property
    def deciding_stage(self) -> str | None:
        """The scoring stage whose differences decide verdicts; None where nothing is scored."""
        if self.ranking != BYTES:
            return self.ranking
        return self.stages.scoring()[-1] if self.stages.scoring() else None
