"""Scores of checkpoints and artifacts, each kept under what was scored, on which text, by which protocol.

An artifact's score is that of the tensors which the shipped decoder gives back, never of tensors still in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import MismatchError
from pgolf_post.families import load_module
from pgolf_post.pack.container import read_artifact
from pgolf_post.score.bpb import Score
from pgolf_post.score.plain import PlainProtocol, score_folder
from pgolf_post.storage import sha256_file

STAGE, STAGE_VERSION, PAYLOAD = "score", 2, "documents.safetensors"

CachedScore = tuple[dict[str, Any], bool]  # {bpb, nats, tokens, bytes, documents, …}, whether it was cached


def score_view(view: View, data: DataFolder, protocol: PlainProtocol, fresh: bool = False) -> CachedScore:
    """The score of a view's own weights."""
    require_tokenizer(view.config, data, str(view))

    def run() -> Score:
        return score_folder(load_module(view.config, view.tensors, str(view)), data, protocol, "scoring checkpoint")

    return _cached(view.checkpoint.path / "derived", view.id, data, protocol, run, fresh)


def score_artifact(path: Path, data: DataFolder, protocol: PlainProtocol, fresh: bool = False) -> CachedScore:
    """The score of what an artifact decodes to, kept in the checkpoint folder that holds it, else beside the file."""
    decoded = read_artifact(path)
    config = decoded.manifest["config"]
    require_tokenizer(config, data, str(path))

    def run() -> Score:
        tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
        return score_folder(load_module(config, tensors, str(path)), data, protocol, "scoring artifact")

    folder = path.parent.parent
    root = folder.parent if (folder.name, folder.parent.name) == ("artifact", "derived") else path.parent / "derived"
    return _cached(root, sha256_file(path), data, protocol, run, fresh)


def _cached(
    root: Path, subject_id: str, data: DataFolder, protocol: PlainProtocol, run: Callable[[], Score], fresh: bool
) -> CachedScore:
    """Look a score up by subject, text and protocol, or run it and keep its per-document sums."""
    identity = {**protocol.model_dump(mode="json"), "data_manifest_sha256": data.manifest_sha256}
    folder = root / STAGE / derived_id(STAGE, STAGE_VERSION, [subject_id], identity)[:12]

    def make(building: Path) -> Mapping[str, Any]:
        score = run()
        score.save(building / PAYLOAD)
        return {**score.sums(), "documents": len(score.document_nats), "subject_id": subject_id}

    return load_or_make(folder, PAYLOAD, {"stage": STAGE, "version": STAGE_VERSION, **identity}, make, fresh)


def require_tokenizer(config: Mapping[str, Any], data: DataFolder, source: str) -> None:
    """Raise MismatchError if a model's tokenizer is not the data folder's."""
    wanted = config["tokenizer"]["sha256"]
    if data.tokenizer_sha256 != wanted:
        raise MismatchError(
            f"{data.path} has tokenizer {data.tokenizer_sha256[:12]}, {source} was trained with {wanted[:12]}",
            hint="pass the folder made with the same tokenizer: --data FOLDER",
        )
