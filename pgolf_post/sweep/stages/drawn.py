"""Scores of windows that are drawn from the whole text: the same windows for every trial, so that scores can be paired.

They are kept beside the checkpoint as other scores are, in a folder named after the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from pgolf_post.base.progress import hushed
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.pieces import cut_documents
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import folder_text, protocol_spans
from pgolf_post.score.spans import Span, num_targets
from pgolf_post.settings import LARGEST_SEED
from pgolf_post.sweep.stages.base import Job, Scorer, StageScore, TrialStage, Window

PAYLOAD = "documents.safetensors"


class DrawnStage(TrialStage):
    """Windows drawn from the whole text."""

    tokens: int = Field(16384, ge=1, description="Scored tokens, as whole windows.")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the draw.")

    def num_tokens(self, val_tokens: int) -> int:
        return self.tokens


@dataclass(frozen=True)
class Text:
    """A scored text of n tokens."""

    tokens: np.ndarray  # (n,) uint16
    token_bytes: np.ndarray  # (n,) int64
    spans: list[Span]
    pieces: np.ndarray  # (n,) int64


ScoreWindows = Callable[[Scorer, Job, Text, np.ndarray], Score]  # is given the numbers of the spans that were drawn


def protocol(stage: DrawnStage, window: Window) -> PlainProtocol:
    """Return the protocol of plain windows."""
    return PlainProtocol(seq_len=window.seq_len)


def score_drawn(
    name: str, version: int, scorer: Scorer, job: Job, parents: list[str], score_windows: ScoreWindows
) -> StageScore:
    """Score drawn windows, or find their score: cached by the models, the text, the protocol and the draw."""
    stage, subject = job.stage, job.model.subject
    assert isinstance(stage, DrawnStage)
    assert isinstance(job.protocol, PlainProtocol)
    derived, plain = Stage(name, version, PAYLOAD), job.protocol
    identity = {**plain.model_dump(mode="json"), **stage.model_dump(mode="json", exclude={"only_if"})}
    identity["data_manifest_sha256"] = job.data.manifest_sha256
    folder = derived.folder(subject.root, derived.id(parents, identity))

    def make(building: Path) -> Mapping[str, Any]:
        text = _text(scorer, job.data, plain)
        count = max(1, min(len(text.spans), stage.tokens // plain.seq_len))
        order = np.random.default_rng(stage.seed).permutation(len(text.spans))
        score = score_windows(scorer, job, text, np.sort(order[:count]))
        score.save(building / PAYLOAD)
        return {**score.sums(), "windows": count, "subject_id": subject.id}

    with hushed():
        meta, cached = derived.load_or_make(folder, identity, make)
    return {**meta, "folder": str(folder)}, cached


def _text(scorer: Scorer, data: DataFolder, plain: PlainProtocol) -> Text:
    """Return the whole text that windows are drawn from, cut into pieces."""
    key = f"{data.manifest_sha256}:{plain.seq_len}"
    if key not in scorer.texts:
        tokens, token_bytes = folder_text(data, plain)
        spans = protocol_spans(PlainProtocol(seq_len=plain.seq_len), num_targets(len(tokens), plain.seq_len, "drop"))
        scorer.texts[key] = Text(tokens, token_bytes, spans, cut_documents(data, tokens, token_bytes))
    text: Text = scorer.texts[key]
    return text
