"""The `screen` stage: what a model loses on the words of drawn windows."""

from __future__ import annotations

import numpy as np

from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.windows import score_chosen
from pgolf_post.sweep.stages.base import Job, Scorer, StageScore
from pgolf_post.sweep.stages.drawn import DrawnStage, Text, score_drawn

VERSION = 1


class ScreenStage(DrawnStage):
    """Plain windows drawn from the whole text, the same for every trial."""


def score(scorer: Scorer, job: Job) -> StageScore:
    """Score drawn windows."""
    return score_drawn("screen", VERSION, scorer, job, [job.model.subject.id], words_of)


def words_of(scorer: Scorer, job: Job, text: Text, chosen: np.ndarray) -> Score:
    """Score the words of chosen windows."""
    subject = job.model.subject
    module = scorer.pool.load(subject.config, job.model.tensors(), subject.name, scorer.ranks.device)
    return score_chosen(module, text.tokens, text.token_bytes, text.spans, text.pieces, chosen)
