"""Requant: a checkpoint view and its statistics → an artifact on disk, read back, counted and (if asked) scored.

Only what was re-read from disk is reported: the artifact is decoded by the decoder that ships, its symbols are hashed
again, and a score is the score of the decoded tensors. The same settings find the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import MismatchError, VerificationError
from pgolf_post.families import load_module
from pgolf_post.pack.container import ARTIFACT_FILE, PackSettings, count_units, pack, read_artifact, write_artifact
from pgolf_post.plan import QuantizeSettings
from pgolf_post.progress import progress_bar
from pgolf_post.quantize.run import quantize_view
from pgolf_post.quantize.tensor import symbols_sha256
from pgolf_post.score.bpb import Score
from pgolf_post.score.plain import PlainProtocol, score_folder
from pgolf_post.storage import sha256_file

STAGE, STAGE_VERSION, PAYLOAD = "artifact", 1, ARTIFACT_FILE
SCORE_STAGE, SCORE_VERSION, SCORE_PAYLOAD = "score", 1, "documents.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A packed model on disk."""

    folder: Path
    id: str
    meta: Mapping[str, Any]  # symbols_sha256, tensors: [facts], seconds
    cached: bool

    @property
    def path(self) -> Path:
        return self.folder / PAYLOAD

    @property
    def symbols_sha256(self) -> str:
        return str(self.meta["symbols_sha256"])

    @property
    def artifact_bytes(self) -> int:
        return self.path.stat().st_size


def requant(view: View, stats: Stats, settings: QuantizeSettings, codec: str = "brotli", fresh: bool = False) -> Artifact:
    """Quantize and pack a view; cached by view, statistics, settings and codec.

    Raises VerificationError if decoding the written file does not give back the symbols that were packed.
    """
    identity = {**settings.model_dump(mode="json"), "codec": codec}
    artifact_id = derived_id(STAGE, STAGE_VERSION, [view.id, stats.id], identity)
    folder = view.checkpoint.derived(STAGE, artifact_id)

    def make(building: Path) -> Mapping[str, Any]:
        model = quantize_view(view, stats, settings)
        with progress_bar("packing", count_units(model)) as advance:
            write_artifact(building / PAYLOAD, pack(model, PackSettings(codec=codec), advance))
        packed, decoded = model.symbols_sha256(), symbols_sha256(read_artifact(building / PAYLOAD).symbols)
        if decoded != packed:
            raise VerificationError(f"decoded symbols {decoded[:12]} are not the packed {packed[:12]}")
        rows = [{"name": name, **tensor.facts} for name, tensor in model.quantized.items()]
        return {"symbols_sha256": packed, "view_id": view.id, "tensors": rows}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, "stats_id": stats.id}
    meta, cached = load_or_make(folder, PAYLOAD, {**config, **identity}, make, fresh)
    return Artifact(folder, artifact_id, meta, cached)


def score_artifact(path: Path, data: DataFolder, protocol: PlainProtocol, fresh: bool = False) -> tuple[dict[str, Any], bool]:
    """Sums of the score of what the artifact decodes to, and whether they were cached; per-document sums are kept beside it."""

    def run() -> Score:
        decoded = read_artifact(path)
        tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
        module = load_module(decoded.manifest["config"], tensors, str(path))
        return score_folder(module, data, protocol, "scoring artifact")

    root = path.parent.parent.parent if path.parent.parent.name == STAGE else path.parent / "derived"
    return cached_score(root, sha256_file(path), data, protocol, run, fresh)


def score_view(view: View, data: DataFolder, protocol: PlainProtocol, fresh: bool = False) -> tuple[dict[str, Any], bool]:
    """Sums of the score of a view's own weights, and whether they were cached."""

    def run() -> Score:
        return score_folder(load_module(view.config, view.tensors, str(view)), data, protocol, "scoring checkpoint")

    return cached_score(view.checkpoint.path / "derived", view.id, data, protocol, run, fresh)


def cached_score(
    root: Path,
    subject_id: str,
    data: DataFolder,
    protocol: PlainProtocol,
    run: Any,
    fresh: bool,
) -> tuple[dict[str, Any], bool]:
    """Look a score up by what was scored, the text and the protocol, or run it and keep its per-document sums."""
    identity = {**protocol.model_dump(mode="json"), "data_manifest_sha256": data.manifest_sha256}
    folder = root / SCORE_STAGE / derived_id(SCORE_STAGE, SCORE_VERSION, [subject_id], identity)[:12]

    def make(building: Path) -> Mapping[str, Any]:
        score: Score = run()
        score.save(building / SCORE_PAYLOAD)
        return {**score.sums(), "documents": len(score.document_nats), "subject_id": subject_id}

    return load_or_make(folder, SCORE_PAYLOAD, {"stage": SCORE_STAGE, "version": SCORE_VERSION, **identity}, make, fresh)


def require_tokenizer(config: Mapping[str, Any], data: DataFolder, source: str) -> None:
    """Raise MismatchError if a model's tokenizer is not the data folder's."""
    wanted = config["tokenizer"]["sha256"]
    if data.tokenizer_sha256 != wanted:
        raise MismatchError(
            f"{data.path} has tokenizer {data.tokenizer_sha256[:12]}, {source} was trained with {wanted[:12]}",
            hint="pass the folder made with the same tokenizer: --data FOLDER",
        )
