"""Score whatever can be scored: a view of a checkpoint, a packed artifact, or the path of either.

The sums are looked up by what was scored, the text and the protocol, and made where they are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.artifacts import PackedArtifact
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError
from pgolf_post.families import train_seq_len
from pgolf_post.pack.artifact import DecodedArtifact, find_artifact, is_artifact, read_artifact
from pgolf_post.score.bpb import Score
from pgolf_post.score.breakdown.sums import FILE as BREAKDOWN_FILE
from pgolf_post.score.breakdown.sums import Breakdown
from pgolf_post.score.cached import SCORE, score_artifact, score_view
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.session import Session

Scorable = View | Checkpoint | PackedArtifact | Path | str


@dataclass(frozen=True)
class StoredScore:
    """A score on disk: its sums, and where they are kept by document."""

    folder: Path
    facts: dict[str, Any]  # meta.json: bpb, nats, tokens, bytes, documents, *_seconds, what a protocol learned …
    cached: bool  # found, not made

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return float(self.facts["bpb"])

    @property
    def nats(self) -> float:
        """Sum over all scored tokens, in float64."""
        return float(self.facts["nats"])

    @property
    def tokens(self) -> int:
        """Number of tokens scored."""
        return int(self.facts["tokens"])

    @property
    def bytes(self) -> int:
        """Bytes of the text that these tokens are."""
        return int(self.facts["bytes"])

    @cached_property
    def sums(self) -> Score:
        """The sums by document and by unit, read from disk. Raises DamagedFileError."""
        return Score.load(self.folder / SCORE.payload)

    @cached_property
    def breakdown(self) -> Breakdown:
        """The sums by bin. Raises NotFoundError where the score was made without `breakdown=True`, DamagedFileError."""
        return Breakdown.load(self.folder / BREAKDOWN_FILE)


def score(
    scored: Scorable,
    data: DataFolder,
    protocol: Protocol | None = None,  # None: plain windows of the model's training length, over the validation split
    *,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
    decoded: DecodedArtifact | None = None,  # what the artifact was decoded to, where that is in memory already
    breakdown: bool = False,  # keep the sums by bin, too, at the cost of one more product with the head
) -> StoredScore:
    """Return the score of a model on a text, from disk where it was scored before.

    A path is an artifact's (file or folder) or a checkpoint's, whose EMA is taken where it has one, else raw.

        >>> pg.score(artifact, data).bpb
        1.7371

    Raises MismatchError where model and text have different tokenizers, NotFoundError, DamagedFileError, and
    NumericsError for predictions that are not finite.
    """
    opened, session = _opened(scored), session or Session()
    if isinstance(opened, View):
        protocol = protocol or PlainProtocol(seq_len=opened.train_seq_len)
        return _stored(*score_view(opened, data, protocol, fresh, session, pool, breakdown))
    if decoded is None and isinstance(scored, PackedArtifact):
        decoded = scored.verified
    if decoded is None:
        with session.clock.phase("decompress"):
            decoded = read_artifact(opened)
    protocol = protocol or PlainProtocol(seq_len=train_seq_len(decoded.manifest["config"]))
    return _stored(*score_artifact(opened, data, protocol, fresh, session, pool, decoded, breakdown))


def open_weights(scored: Scorable) -> tuple[str, Mapping[str, Any], Mapping[str, Tensor]]:
    """Return the name, config and tensors of what can be scored. Raises NotFoundError, DamagedFileError."""
    opened = _opened(scored)
    if isinstance(opened, View):
        return str(opened), opened.config, opened.tensors
    decoded = scored.decoded() if isinstance(scored, PackedArtifact) else read_artifact(opened)
    tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
    return str(opened), decoded.manifest["config"], tensors


def _opened(scored: Scorable) -> View | Path:  # Path: of an artifact's file
    if isinstance(scored, View):
        return scored
    if isinstance(scored, Checkpoint):
        return scored.load()
    if isinstance(scored, PackedArtifact):
        return scored.path
    try:
        artifact = find_artifact(Path(scored))
    except NotFoundError:
        return Checkpoint.open(Path(scored)).load()
    return artifact if is_artifact(artifact) else Checkpoint.open(Path(scored)).load()


def _stored(facts: dict[str, Any], cached: bool) -> StoredScore:
    return StoredScore(Path(facts["folder"]), facts, cached)
