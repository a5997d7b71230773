"""Scores of the validation text itself, by a protocol of `eval`: the same that the command finds and makes."""

from __future__ import annotations

from pydantic import Field

from pgolf_post.score.cached import score_model
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.sweep.stages.base import Job, Scorer, StageScore, TrialStage


class WholeTextStage(TrialStage):
    """The validation text, or its beginning."""

    max_tokens: int | None = Field(None, ge=2, description="Score only the first so many tokens.")

    def num_tokens(self, val_tokens: int) -> int:
        return self.max_tokens or val_tokens


def score(scorer: Scorer, job: Job) -> StageScore:
    """Score the text by the job's protocol, cached as `eval` does."""
    session = Session(ranks=scorer.ranks, quiet=True)
    pool = scorer.learning_pool if isinstance(job.protocol, TTTProtocol) else scorer.pool
    return score_model(job.model.subject, job.model.tensors, job.data, job.protocol, False, session, pool)
