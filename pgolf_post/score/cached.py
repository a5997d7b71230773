"""Scores of checkpoints and artifacts, each kept under what was scored, on which text, by which protocol.

An artifact's score is that of the tensors which the shipped decoder gives back, never of tensors still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.progress import say
from pgolf_post.base.storage import read_json, sha256_file
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import Stage, require_writable_result, verified_meta
from pgolf_post.errors import MismatchError, PgolfError
from pgolf_post.families import get_family
from pgolf_post.pack.artifact import DecodedArtifact, read_artifact
from pgolf_post.score.bpb import Score
from pgolf_post.score.breakdown.details import Details
from pgolf_post.score.breakdown.sums import FILE as BREAKDOWN_FILE
from pgolf_post.score.breakdown.sums import Breakdown, break_down
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, folder_text, score_text
from pgolf_post.score.session import Session

SCORE = Stage("score", 2, "documents.safetensors")

Scored = tuple[Score, dict[str, Any], Breakdown | None]  # sums, JSON facts of the pass, sums by bin
CachedScore = tuple[dict[str, Any], bool]  # {bpb, nats, tokens, bytes, documents, …}, whether it was cached


@dataclass(frozen=True)
class ScoredModel:
    """The identity of what is scored: a checkpoint's view or an artifact's decoded weights."""

    id: str  # of the view's tensors, or sha256 of the artifact's file
    config: Mapping[str, Any]
    name: str  # for people
    root: Path  # folder that keeps its scores


def score_view(
    view: View,
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
    breakdown: bool = False,
) -> CachedScore:
    """Return the score of a view's own weights. Raises MismatchError for data of another tokenizer."""
    require_tokenizer(view.config, data, str(view))
    model = ScoredModel(view.id, view.config, str(view), view.checkpoint.path / "derived")
    return score_model(model, lambda: view.tensors, data, protocol, fresh, session, pool, breakdown)


def score_artifact(
    path: Path,
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
    decoded: DecodedArtifact | None = None,  # what this very file was decoded to, where that is in memory already
    breakdown: bool = False,
) -> CachedScore:
    """Return the score of an artifact's decoded weights, kept in its checkpoint folder or else beside the file.

    Raises DamagedFileError for a file that does not decode, MismatchError for data of another tokenizer.
    """
    session = session or Session()
    if decoded is None:
        with session.clock.phase("decompress"):
            decoded = read_artifact(path)
    config = decoded.manifest["config"]
    require_tokenizer(config, data, str(path))
    model = ScoredModel(sha256_file(path), config, str(path), scores_root(path))
    tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
    return score_model(model, lambda: tensors, data, protocol, fresh, session, pool, breakdown)


def scores_root(path: Path) -> Path:
    """Return the folder that keeps an artifact's scores: its checkpoint's derived/ folder, else one beside the file."""
    folder = path.parent.parent
    in_checkpoint = (folder.name, folder.parent.name) == ("artifact", "derived")
    return folder.parent if in_checkpoint else path.parent / "derived"


def score_model(
    model: ScoredModel,
    tensors: Callable[[], Mapping[str, torch.Tensor]],  # called where nothing is cached
    data: DataFolder,
    protocol: Protocol,
    fresh: bool = False,
    session: Session | None = None,
    pool: ModelPool | None = None,
    breakdown: bool = False,  # keep the sums by bin, too; a score that lacks them is made again
) -> CachedScore:
    """Look a score up by model, text and protocol, or run it and keep its sums.

    The session's clock counts the seconds; its `partial` and `identity` are not read and stay as they are.
    """
    pool = pool or ModelPool()
    identity = {**protocol.model_dump(mode="json"), "data_manifest_sha256": data.manifest_sha256}
    whole_id = SCORE.id([model.id], identity)
    folder = SCORE.folder(model.root, whole_id)
    partial = folder.with_name(f"{folder.name}.partial.safetensors")
    details = Details() if breakdown else None
    own_session = replace(session or Session(), identity=whole_id, partial=partial, details=details)
    ranks, clock = own_session.ranks, own_session.clock

    def run() -> Scored:
        with clock.phase("load"):
            text = folder_text(data, protocol)
            module = pool.load(model.config, tensors(), model.name, ranks.device)
        pool.warm_up(module, protocol, len(text[0]), clock)
        score, facts = score_text(module, get_family(model.config["family"]), *text, protocol, own_session)
        return score, facts, break_down(score, details, *text, data.tokenizer) if details else None

    def keep(building: Path, result: Scored) -> Mapping[str, Any]:
        score, facts, by_bin = result
        score.save(building / SCORE.payload)
        own = {**score.sums(), "documents": len(score.document_nats), "subject_id": model.id, **facts}
        if by_bin is None:
            return own
        by_bin.save(building / BREAKDOWN_FILE)
        return {**own, "breakdown": by_bin.summary()}

    def lacks_breakdown() -> bool:
        return breakdown and not (folder / BREAKDOWN_FILE).is_file()

    if ranks.world_size == 1:
        if lacks_breakdown() and not fresh and (folder / "meta.json").is_file():
            say(f"score {folder.name} was kept without a breakdown; scoring again")
            fresh = True
        meta, cached = SCORE.load_or_make(folder, identity, lambda building: keep(building, run()), fresh)
        return {**meta, "folder": str(folder)}, cached

    # rank 0 says whether the score is there; all score together, rank 0 keeps it
    if ranks.main_says(not fresh and not lacks_breakdown() and _is_intact(folder)):
        return {**read_json(folder / "meta.json"), "folder": str(folder)}, True
    if ranks.is_main:
        require_writable_result(folder)
    result = run()
    if ranks.is_main:
        SCORE.store(folder, identity, lambda building: keep(building, result))
    ranks.wait()
    return {**read_json(folder / "meta.json"), "folder": str(folder)}, False


def load_score(facts: Mapping[str, Any]) -> Score:
    """Return the sums, by unit, of what `score_view` or `score_artifact` returned."""
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
