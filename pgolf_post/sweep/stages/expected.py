"""The `expected` stage: the loss of drawn windows before quantization plus the divergence that quantizing causes.

Differences between two quantizations of the same weights are then free of the luck of the text's words
(score/compare/expected.py).
"""

from __future__ import annotations

import numpy as np

from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.expected import expected_score
from pgolf_post.sweep.stages.base import Job, Scorer, StageScore
from pgolf_post.sweep.stages.drawn import DrawnStage, Text, score_drawn
from pgolf_post.sweep.stages.screen import words_of

VERSION = 1


class ExpectedStage(DrawnStage):
    """Windows drawn likewise: the loss before quantization, and what quantizing is expected to add (its divergence)."""


def score(scorer: Scorer, job: Job) -> StageScore:
    """Score drawn windows as the weights before quantization expect it."""
    parents = [job.model.subject.id, job.reference.subject.id]
    return score_drawn("expected", VERSION, scorer, job, parents, _expectation)


def _expectation(scorer: Scorer, job: Job, text: Text, chosen: np.ndarray) -> Score:
    model, reference = job.model.subject, job.reference.subject
    if reference.id == model.id:  # nothing diverges from itself
        return words_of(scorer, job, text, chosen)
    device = scorer.ranks.device
    module = scorer.pool.load(model.config, job.model.tensors(), model.name, device)
    before = scorer.reference_pool.load(reference.config, job.reference.tensors(), reference.name, device)
    return expected_score(before, module, text.tokens, text.token_bytes, text.spans, chosen, text.pieces)
