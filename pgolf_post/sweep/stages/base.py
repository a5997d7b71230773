"""A scoring stage of a trial: its settings, its protocol, and the function that scores by it.

A stage is one file of this folder and one row of `STAGES`. Its settings become the table [stages.NAME] of a spec, its
facts (`NAME_bpb`, `NAME_low_bpb` …) can stand in conditions, and a spec may rank by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from pgolf_post.base.ranks import Ranks
from pgolf_post.data import DataFolder
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol
from pgolf_post.settings import Settings
from pgolf_post.sweep.trial_model import TrialModel


class TrialStage(Settings):
    """One stage of a trial after quantizing."""

    only_if: str = Field("", description="Condition on the trial's facts so far, such as headroom_bytes >= 0.")

    def num_tokens(self, val_tokens: int) -> int:
        """Return how many tokens the stage scores of a validation text of so many."""
        return val_tokens


@dataclass(frozen=True)
class Window:
    """Settings that a stage's protocol reads beside the stage's own."""

    seq_len: int  # the spec's, else the model's training length
    given: int | None  # the spec's
    changes: Mapping[str, Any]  # the trial's own changes of this stage, such as ttt.learning_rate


@dataclass(frozen=True)
class Job:
    """One trial's model before one stage."""

    stage: TrialStage
    protocol: Protocol
    model: TrialModel
    reference: TrialModel  # the weights before quantization
    data: DataFolder


@dataclass
class Scorer:
    """Models whose weights are swapped, and texts, shared by all stages and trials of a process."""

    ranks: Ranks
    pool: ModelPool
    reference_pool: ModelPool
    learning_pool: ModelPool = field(default_factory=ModelPool)  # never compiled: adapters hang on the eager forward
    texts: dict[str, Any] = field(default_factory=dict)


StageScore = tuple[dict[str, Any], bool]  # {bpb, nats, tokens, bytes, folder, …}, whether it was cached


@dataclass(frozen=True)
class SweepStage:
    """A row of STAGES."""

    settings: type[TrialStage]
    protocol: Callable[[Any, Window], Protocol]  # raises SettingsError for settings that cannot be used
    score: Callable[[Scorer, Job], StageScore]
    reads: str  # what the score is computed from, for people
    passes: float  # forward passes a scored token takes, about
    paired_by: Literal["document", "piece"] = "document"  # the unit of the paired difference
    compares: bool = False  # whether the weights before quantization are read too
    default: TrialStage | None = None  # what a spec has that does not name the stage
    version: int | None = None  # of a stage with scores of its own; None: the scores are those of `eval`
