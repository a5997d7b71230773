"""The model that a trial scores: its artifact's decoded weights, or weights that were never quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgolf_post.checkpoint import View
from pgolf_post.score.cached import ScoredModel


@dataclass(frozen=True)
class TrialModel:
    """A model whose tensors are read when they are needed."""

    subject: ScoredModel
    tensors: Callable[[], Mapping[str, Tensor]]
    facts: Mapping[str, Any]  # artifact_id, artifact_bytes, symbols_sha256 …; none of weights as they are
    content_sha256: str  # of symbols, factors and floats: what a NO-OP is judged by


def unquantized(view: View) -> TrialModel:
    """Return the weights themselves as what is scored."""
    subject = ScoredModel(view.id, view.config, str(view), view.checkpoint.path / "derived")
    return TrialModel(subject, lambda: view.tensors, {}, view.id)
