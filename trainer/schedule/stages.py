"""Stages of a run: other tokens per step and other windows from a progress on (`[[schedule.stages]]`).

A batch that grows as the learning rate falls (Smith et al. 2018, arXiv:1711.00489), and windows that grow late, when
short ones have taught what they can (Li et al. 2022, arXiv:2108.06084). The table `data` holds from the start; each
stage changes what it names and keeps the rest. Tokens seen and the position in the text are counted over all stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field, model_validator

from pgolf_post.settings import Settings


class StageSettings(Settings):
    """One table `[[schedule.stages]]`. What is left out stays as in the stage before."""

    at: float = Field(gt=0, lt=1, description="progress from which the stage holds")
    batch_tokens: int | None = Field(None, ge=2, description="tokens per optimizer step")
    seq_len: int | None = Field(None, ge=2, description="tokens of a window; all lengths divide the longest")

    @model_validator(mode="after")
    def _changes(self) -> StageSettings:
        if self.batch_tokens is None and self.seq_len is None:
            raise ValueError(f"the stage at {self.at:g} changes nothing: give it batch_tokens, seq_len, or both")
        return self


@dataclass(frozen=True)
class Stage:
    """Tokens of a step and of a window from progress `at` on."""

    at: float
    batch_tokens: int
    seq_len: int


def stages_of(batch_tokens: int, seq_len: int, settings: Sequence[StageSettings]) -> tuple[Stage, ...]:
    """Return the stages of a run that begins with these sizes, that beginning included."""
    stages = [Stage(0.0, batch_tokens, seq_len)]
    for each in settings:
        before = stages[-1]
        stages.append(Stage(each.at, each.batch_tokens or before.batch_tokens, each.seq_len or before.seq_len))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], at: float) -> Stage:
    """Return the stage that holds at progress `at`."""
    return next(stage for stage in reversed(stages) if stage.at <= at)


def require_in_order(settings: Sequence[StageSettings]) -> None:
    """Raise ValueError for stages out of order."""
    for number, (before, stage) in enumerate(pairwise(settings), start=2):
        if stage.at <= before.at:
            raise ValueError(
                f"stage {number} is at progress {stage.at:g}, stage {number - 1} at {before.at:g}; list them by rising "
                "progress"
            )


def require_divisible(stages: Sequence[Stage], micro_batch_tokens: int | None) -> None:
    """Raise ValueError for a step that is not whole micro-batches of whole windows, or windows that do not nest."""
    longest = max(stage.seq_len for stage in stages)
    for stage in stages[1:]:
        micro = micro_batch_tokens or stage.batch_tokens
        if micro % stage.seq_len or stage.batch_tokens % micro:
            raise ValueError(
                f"schedule.stages at {stage.at:g}: batch_tokens {stage.batch_tokens} must be a multiple of "
                f"micro_batch_tokens {micro}, which must be a multiple of seq_len {stage.seq_len}"
            )
    for stage in stages:
        if longest % stage.seq_len:
            raise ValueError(
                f"schedule.stages: seq_len {stage.seq_len} at {stage.at:g} does not divide the longest, {longest}, so "
                "that windows of one stage would cut those of another"
            )


@dataclass(frozen=True)
class StagePlace:
    """The stage that a run is in, and where its steps began."""

    stage: Stage
    first_step: int = 0
    tokens_before: int = 0  # seen before that step
    first_token: int = 0  # of that step, in the order of the text

    def tokens_seen(self, step: int) -> int:
        """Return the tokens seen when `step` steps of the run are done."""
        return self.tokens_before + (step - self.first_step) * self.stage.batch_tokens

    def token(self, step: int) -> int:
        """Return the position, in the order of the text, at which step `step` (counted from 0) begins."""
        return self.first_token + (step - self.first_step) * self.stage.batch_tokens

    def enter(self, stage: Stage, step: int, longest: int) -> StagePlace:
        """Return the place of another stage that begins with this step, at the next whole window of the longest."""
        return StagePlace(stage, step, self.tokens_seen(step), -(-self.token(step) // longest) * longest)

    def facts(self) -> dict[str, Any]:
        """Return the place as meta.json keeps it."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> StagePlace:
        """Return the place that `facts` described."""
        return cls(**{**facts, "stage": Stage(**facts["stage"])})
