"""Records of one seed: from its artifact back to its checkpoint and training run, and on to every score.

Everything is read from disk, from the folders that stages left: an artifact lies in its checkpoint's folder
(`derived/artifact/ID`), so do its scores, and a checkpoint names its run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import read_json, sha256_file
from pgolf_post.checkpoint import Checkpoint, list_checkpoints, run_checkpoints
from pgolf_post.errors import MismatchError, NotFoundError, PgolfError
from pgolf_post.ledger.phases import READS_TRAINING_TEXT, of_artifact, reading_seconds
from pgolf_post.ledger.store import Ledger
from pgolf_post.pack.artifact import find_artifact, read_artifact

SUMS = ("bpb", "nats", "tokens", "bytes")
IDENTITY_KEYS = ("view", "view_id", "stats_id", "calibration_sha256", "jitter_seed", "spans")


@dataclass(frozen=True)
class Seed:
    """One artifact and what it was made of."""

    artifact: Path
    checkpoint: Checkpoint

    @classmethod
    def open(cls, path: Path) -> Seed:
        """Open an artifact in its checkpoint's folder. Raises NotFoundError, MismatchError if it lies elsewhere."""
        artifact = find_artifact(path)
        try:
            return cls(artifact, Checkpoint.open(artifact.resolve().parents[3]))
        except (PgolfError, IndexError):
            raise MismatchError(
                f"{artifact} does not lie in its checkpoint's folder, so its run is not known",
                hint="name the artifact where requant or fit wrote it: CHECKPOINT/derived/artifact/ID",
            ) from None

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """The artifact's own manifest: config, lineage, symbols_sha256."""
        return read_artifact(self.artifact).manifest

    @cached_property
    def sha256(self) -> str:
        return sha256_file(self.artifact)

    @property
    def num_bytes(self) -> int:
        return self.artifact.stat().st_size

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Facts that the artifact's stage wrote of it."""
        return read_json(self.artifact.parent / "meta.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that decided the artifact."""
        return read_json(self.artifact.parent / "config.json")

    @property
    def view_id(self) -> str:
        return str(self.settings["view_id"])

    @cached_property
    def run(self) -> Checkpoint | None:
        """The newest checkpoint of the training run; None where no training run is here."""
        checkpoint = self.checkpoint
        while checkpoint.meta["kind"] != "raw" and checkpoint.meta.get("parents"):
            parent = self._parent(checkpoint)
            if parent is None:
                return None
            checkpoint = parent
        return run_checkpoints(checkpoint)[-1] if checkpoint.meta["kind"] == "raw" else None

    def _parent(self, checkpoint: Checkpoint) -> Checkpoint | None:
        first = checkpoint.meta["parents"][-1]
        wanted = first["id"] if isinstance(first, Mapping) else first
        here = list_checkpoints(checkpoint.path.parent.parent)
        return next((c for c in here if wanted in {view["id"] for view in c.meta["views"].values()}), None)

    @property
    def seed(self) -> int | None:
        """The training run's seed; None where it is not known."""
        seed = (self.run or self.checkpoint).meta.get("seed")
        return None if seed is None else int(seed)

    @property
    def label(self) -> str:
        """The seed's number, or the run's name where it is not known."""
        return self.checkpoint.path.parent.name if self.seed is None else str(self.seed)

    @property
    def name(self) -> str:
        """Name of the seed in tables."""
        return f"seed {self.seed}" if self.seed is not None else self.checkpoint.path.parent.name

    # ---- scores ----------------------------------------------------------------------------------------------------

    def scores(self) -> list[dict[str, Any]]:
        """Return every score of the artifact and of its view: stage, protocol, sums, seconds."""
        found = []
        for folder in sorted((self.checkpoint.path / "derived" / "score").glob("*/meta.json")):
            meta, config = read_json(folder), read_json(folder.parent / "config.json")
            of = {self.sha256: "artifact", self.view_id: "view"}.get(str(meta.get("subject_id")))
            if of is not None:
                found.append({"of": of, "protocol": config, **{key: meta[key] for key in SUMS}, "meta": meta})
        return found

    def stages(self) -> dict[str, float]:
        """Return bpb by stage: the unquantized view, quantized, sliding, ttt; each the score of most tokens."""
        best: dict[str, tuple[int, float]] = {}
        metric = self.checkpoint.meta["views"].get(str(self.settings["view"]), {}).get("metric") or {}
        if metric:
            best[str(self.settings["view"])] = (int(metric["tokens"]), float(metric["bpb"]))
        for score in self.scores():
            kind = str(score["protocol"].get("protocol"))
            own = "quantized" if kind == "plain" else kind
            stage = own if score["of"] == "artifact" else str(self.settings["view"]) if kind == "plain" else ""
            if stage and score["tokens"] >= best.get(stage, (0, 0.0))[0]:
                best[stage] = (int(score["tokens"]), float(score["bpb"]))
        return {stage: bpb for stage, (_, bpb) in best.items()}

    # ---- seconds ---------------------------------------------------------------------------------------------------

    def training_seconds(self) -> dict[str, float] | None:
        """Return seconds of everything that reads training data, in order; None if the run's are not known."""
        times = (self.run.meta if self.run else {}).get("ledger")
        if not times:
            return None
        return {"training": float(times["training_data_seconds"]), **self.later_seconds()}

    def later_seconds(self) -> dict[str, float]:
        """Return seconds of what read training data after the run: statistics, κ, tuning, a sequential plan."""
        own, stats, later = reading_seconds(self.meta), self.stats(), dict[str, float]()
        if "statistics" in own:
            later["statistics"] = float(own["statistics"])
        elif stats.get("source") == READS_TRAINING_TEXT:
            later["statistics"] = float(stats["seconds"])
        made = of_artifact(self.meta, self.settings)
        return later | {phase.name: phase.seconds for phase in made if phase.reads_training_data}

    def stats(self) -> dict[str, Any]:
        """Return source and seconds of the statistics that the artifact was made with; empty if they are gone."""
        folder = self.checkpoint.derived("stats", str(self.settings.get("stats_id", "")))
        if not (folder / "meta.json").is_file():
            return {}
        return {
            "seconds": read_json(folder / "meta.json")["seconds"],
            "source": read_json(folder / "config.json").get("source"),
        }

    def stats_settings(self) -> dict[str, Any]:
        """Return the settings of the statistics that the artifact was made with. Raises NotFoundError if gone."""
        return read_json(self.checkpoint.derived("stats", str(self.settings["stats_id"])) / "config.json")

    # ---- what seeds must have in common ----------------------------------------------------------------------------

    def in_common(self) -> dict[str, Any]:
        """Return the settings that all seeds of a submission share, by dotted key."""
        recipe = {
            table: dict(values) for table, values in ((self.run.meta if self.run else {}).get("recipe") or {}).items()
        }
        for key in ("name", "seed", "checkpoint_root"):
            recipe.get("run", {}).pop(key, None)
        quantized = {key: value for key, value in self.settings.items() if key not in IDENTITY_KEYS}
        config = {key: self.checkpoint.config[key] for key in ("family", "model", "graph", "tokenizer", "data")}
        return dict(_flat({"config": config, "recipe": recipe, "artifact": quantized}))

    def is_in_ledger(self) -> bool:
        """Return whether the ledger has the checkpoint's view that the artifact was made of."""
        try:
            with Ledger.open(self.checkpoint.path.parent.parent, read_only=True) as ledger:
                return ledger.get("checkpoint", self.view_id) is not None
        except NotFoundError:
            return False


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
