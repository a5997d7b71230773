"""A round as a TOML file: what is trained, how it is rounded, by what protocols it is scored, and the budgets.

Budgets are those of a whole round. `--scale 0.1` plays a tenth of it: of the seconds, of every number of tokens that is
read after training, and of the steps that the recipe counts (Muon's momentum warm-up, the horizon of the EMA). The
bytes stay what they are; the text that is scored is the share of the original bytes, whatever the tokenizer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.codecs import CHOICES
from pgolf_post.settings import Settings, read_settings, read_toml

LEAST_WINDOWS = 4  # of text that any scaled stage reads
WINDOW_TOKENS = 512


class BudgetSettings(Settings):
    """Budgets of a whole round."""

    train_seconds: float = Field(
        4800.0, gt=0, description="Processor seconds of training and of making the artifact, imports included."
    )
    eval_seconds: float = Field(4800.0, gt=0, description="Processor seconds of scoring the artifact.")
    bytes: int = Field(2_000_000, ge=1, description="Bytes of artifact and counted code together.")
    code: tuple[str, ...] = Field((), description="Counted code files or folders, relative to the round's file.")


class RoundingSettings(Settings):
    """Rounding of the checkpoint to an artifact, and the seconds of training that are kept for it."""

    method: Literal["plan", "fit"] = Field(description="Round by a plan of fixed rules, or solve for the bytes by fit.")
    weights: Literal["raw", "ema", "swa"] = Field(
        "ema", description="Weights of the final checkpoint that are rounded."
    )
    calibration_tokens: int = Field(65536, ge=2, description="Training tokens of the statistics, at scale 1.")
    codec: str = Field("best", description="How units are compressed.")
    plan: str | None = Field(None, description="Preset or TOML file of the plan, for method plan.")
    set: tuple[str, ...] = Field((), description="RULE.KEY=VALUE changes of the plan.")
    to_bytes: Literal["no", "down", "fill"] = Field(
        "no",
        description="Multiply every clip of the plan by one number: never, if it is over the bytes, or to fill them.",
    )
    fit: FitSettings = Field(FitSettings(), description="Settings of fit; its numbers of tokens are those at scale 1.")
    reserve_seconds: float = Field(
        0.0, ge=0, description="Processor seconds of the training budget that are kept for this, at scale 1."
    )
    fixed_seconds: float = Field(0.0, ge=0, description="Further seconds kept for it, at every scale.")

    @model_validator(mode="after")
    def _of_its_method(self) -> RoundingSettings:
        if (self.method == "plan") != (self.plan is not None):
            raise ValueError(f"method {self.method!r} with plan = {self.plan!r}: a plan is for method plan, and needed")
        idle = [key for key in ("set", "to_bytes") if getattr(self, key) != type(self).model_fields[key].default]
        if self.method == "fit" and idle:
            raise ValueError(f"{', '.join(idle)} acts on a plan only, and the method is fit")
        if self.method == "plan" and self.fit != FitSettings():
            raise ValueError("the table fit acts with method fit only")
        if self.codec not in CHOICES:
            raise ValueError(f"codec {self.codec!r}; there are: {', '.join(CHOICES)}")
        return self


class ProtocolSettings(Settings):
    """A further protocol that the artifact is scored by."""

    protocol: Literal["sliding", "ttt"] = Field(description="Overlapping windows, or test-time training.")
    ttt: str | None = Field(None, description="Preset or method of test-time training.")
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of test-time training.")
    stride: int | None = Field(None, ge=1, description="Tokens by which a window moves on.")

    @property
    def name(self) -> str:
        """Name of the protocol in rows."""
        return " ".join(filter(None, [self.protocol, self.ttt, *self.set, f"stride {self.stride}" * bool(self.stride)]))

    @property
    def words(self) -> list[str]:
        """The options of `pgolf-post eval`."""
        given = {"--protocol": self.protocol, "--ttt": self.ttt, "--stride": self.stride}
        words = [word for flag, value in given.items() if value for word in (flag, str(value))]
        return [*words, *(word for change in self.set for word in ("--set", change))]


class Round(Settings):
    """One round."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name by which tables call the round.")
    recipe: str = Field(description="TOML file of the trainer's recipe, relative to the round's file.")
    set: tuple[str, ...] = Field((), description="KEY=VALUE changes of the recipe.")
    threads: int = Field(2, ge=1, description="Threads of every stage.")
    save_seconds: float = Field(
        120.0, gt=0, description="Processor seconds of training between the checkpoints that a killed round resumes."
    )
    expected_windows: int = Field(
        400, ge=LEAST_WINDOWS, description="Windows on which the expected gap is measured, at scale 1."
    )
    budget: BudgetSettings = BudgetSettings()
    rounding: RoundingSettings
    protocols: tuple[ProtocolSettings, ...] = Field((), description="Scored after plain windows.")


def read_round(path: Path) -> tuple[Round, dict[str, Any]]:
    """Return a round and its recipe's tables. Raises SettingsError, NotFoundError."""
    wanted = read_settings(path, Round)
    return wanted, read_toml(path.parent / wanted.recipe)


# ---- scale -----------------------------------------------------------------------------------------------------------


def scaled_tokens(tokens: int, scale: float) -> int:
    """Return a scaled number of tokens, of a few whole windows at least; 0 stays 0."""
    return 0 if not tokens else min(tokens, max(LEAST_WINDOWS * WINDOW_TOKENS, math.ceil(tokens * scale)))


def scaled_fit(settings: FitSettings, scale: float) -> FitSettings:
    """Return settings of fit whose text is scaled."""
    keys = ("kappa_tokens", "tune_tokens")
    return settings.model_copy(update={key: scaled_tokens(getattr(settings, key), scale) for key in keys})
