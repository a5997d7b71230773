"""Scores of checkpoints and artifacts, each kept under what was scored, on which text, by which protocol.

An artifact's score is that of the tensors which the shipped decoder gives back, never of tensors still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.storage import read_json, sha256_file
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, verified_meta
from pgolf_post.errors import MismatchError, PgolfError
from pgolf_post.families import get_family
from pgolf_post.pack.artifact import Artifact, read_artifact
from pgolf_post.score.bpb import Score
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, folder_text, score_text
from pgolf_post.score.session import Session

SCORE = Stage("score", 2, "documents.safetensors")

CachedScore = tuple[dict[str, Any], bool]  # {bpb, nats, tokens, bytes, documents, …}, whether it was cached


def score_view(
    view: View,
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
) -> CachedScore:
    """The score of a view's own weights."""
    require_tokenizer(view.config, data, str(view))
    subject = Subject(view.id, view.config, str(view), view.checkpoint.path / "derived")
    return score_subject(subject, lambda: view.tensors, data, protocol, fresh, session, pool)


def score_artifact(
    path: Path,
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
    decoded: Artifact | None = None,  # what this very file was decoded to, where that is in memory already
) -> CachedScore:
    """The score of what an artifact decodes to, kept in the checkpoint folder that holds it, else beside the file."""
    session = session or Session()
    if decoded is None:
        with session.clock.phase("decompress"):
            decoded = read_artifact(path)
    config = decoded.manifest["config"]
    require_tokenizer(config, data, str(path))
    folder = path.parent.parent
    root = folder.parent if (folder.name, folder.parent.name) == ("artifact", "derived") else path.parent / "derived"
    subject = Subject(sha256_file(path), config, str(path), root)

    tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
    return score_subject(subject, lambda: tensors, data, protocol, fresh, session, pool)


@dataclass(frozen=True)
class Subject:
    """What is scored: its id, config, name for people, and the folder that keeps its scores."""

    id: str
    config: Mapping[str, Any]
    name: str
    root: Path


def score_subject(
    subject: Subject,
    tensors: Callable[[], Mapping[str, torch.Tensor]],
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
) -> CachedScore:
    """Look a score up by subject, text and protocol, or run it and keep its sums."""
    session, pool = session or Session(), pool or ModelPool()
    identity = {**protocol.model_dump(mode="json"), "data_manifest_sha256": data.manifest_sha256}
    whole_id = SCORE.id([subject.id], identity)
    folder = SCORE.folder(subject.root, whole_id)
    session.identity, session.partial = whole_id, folder.with_name(f"{folder.name}.partial.safetensors")

    def run() -> tuple[Score, dict[str, Any]]:
        with session.clock.phase("load"):
            text = folder_text(data, protocol)
            module = pool.load(subject.config, tensors(), subject.name, session.ranks.device)
        pool.warm_up(module, protocol, len(text[0]), session.clock)
        return score_text(module, get_family(subject.config["family"]), *text, protocol, session)

    def keep(building: Path, found: tuple[Score, dict[str, Any]]) -> Mapping[str, Any]:
        score, facts = found
        score.save(building / SCORE.payload)
        return {**score.sums(), "documents": len(score.document_nats), "subject_id": subject.id, **facts}

    if session.ranks.world_size == 1:
        found, cached = SCORE.load_or_make(folder, identity, lambda building: keep(building, run()), fresh)
        return {**found, "folder": str(folder)}, cached
    if session.ranks.main_says(not fresh and _is_intact(folder)):
        return {**read_json(folder / "meta.json"), "folder": str(folder)}, True
    result = run()
    if session.ranks.is_main:
        SCORE.store(folder, identity, lambda building: keep(building, result))
    session.ranks.wait()
    return {**read_json(folder / "meta.json"), "folder": str(folder)}, False


def load_score(facts: Mapping[str, Any]) -> Score:
    """The sums, by unit, of what `score_view` and `score_artifact` returned."""
    return Score.load(Path(facts["folder"]) / SCORE.payload)


def _is_intact(folder: Path) -> bool:
    try:
        verified_meta(folder, SCORE.payload)
    except PgolfError:
        return False
    return True


def require_tokenizer(config: Mapping[str, Any], data: DataFolder, source: str) -> None:
    """Raise MismatchError if a model's tokenizer is not the data folder's."""
    wanted = config["tokenizer"]["sha256"]
    if data.tokenizer_sha256 != wanted:
        raise MismatchError(
            f"{data.path} has tokenizer {data.tokenizer_sha256[:12]}, {source} was trained with {wanted[:12]}",
            hint="pass the folder made with the same tokenizer: --data FOLDER",
        )
