"""What trials share: weights and Hessians loaded once, Hessians factorized once, one model whose weights are swapped.

Every result is a derived folder beside its checkpoint, under the same id that `calibrate`, `requant` and `eval` use, so
a sweep finds what they made and they find what it made. Symbols that another trial packed already are not packed again
(the artifact is a link to its file), and an artifact is scored once, whatever the number of trials that lead to it.
Several processes may work at once: a result that two of them need is made by one while the other waits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post import requant
from pgolf_post.blend import linear_blend, require_trained, swa_parts
from pgolf_post.calibrate import Stats, calibrate
from pgolf_post.calibrate import run as calibrate_run
from pgolf_post.checkpoint import Checkpoint, View, default_checkpoint, view_id
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, intact_meta, load_or_make
from pgolf_post.ema_profiles import ExponentialLength, Length, PowerLength
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.families import build_module, get_family, train_seq_len
from pgolf_post.pack.artifact import read_artifact, write_verified
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.predict import predict_bytes
from pgolf_post.plan import Plan
from pgolf_post.posthoc_ema import config_at, find_combination, run_snapshots, synthesise
from pgolf_post.progress import hushed
from pgolf_post.quantize.factors import StatsFactors
from pgolf_post.quantize.run import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.ranks import Ranks
from pgolf_post.score import cached as score_cache
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import Subject, load_score, require_tokenizer, score_subject
from pgolf_post.score.pieces import cut_documents
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, folder_text, protocol_spans
from pgolf_post.score.screen import score_chosen
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol, num_targets
from pgolf_post.score.spans import Span
from pgolf_post.score.ttt.settings import ttt_protocol
from pgolf_post.settings import parse_settings
from pgolf_post.storage import read_json, sha256_file
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.spec import SweepSpec, TrialSettings, trial_plan
from pgolf_post.sweep.training import run_id, trained

JITTER = 1e-4
KEPT_SMALL = 64  # artifacts' facts and scores' sums
KEPT = 3  # sets of weights, and of factorized Hessians, held at once
SCREEN_STAGE, SCREEN_VERSION, SCREEN_PAYLOAD = "screen", 1, "documents.safetensors"

VERSIONS = {
    "stats": calibrate_run.STAGE_VERSION,
    "artifact": requant.STAGE_VERSION,
    "score": score_cache.STAGE_VERSION,
    SCREEN_STAGE: SCREEN_VERSION,
}  # a stage that works otherwise than before makes other trials


class DroppedError(Exception):
    """A trial that a condition or gate ends before it is packed."""


@dataclass(frozen=True)
class Text:
    """A scored text."""

    tokens: np.ndarray  # (n,) uint16
    token_bytes: np.ndarray  # (n,) int64
    spans: list[Span]
    pieces: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class Quantized:
    """A trial's artifact on disk and the tensors it decodes to, or the weights themselves."""

    subject: Subject
    tensors: Callable[[], Mapping[str, Tensor]]
    facts: Mapping[str, Any]  # artifact_id, artifact_bytes, symbols_sha256 …
    content_sha256: str  # of symbols, factors and floats: what a NO-OP is judged by


@dataclass
class Places:
    """Where things are."""

    checkpoint: Path | None = None  # of trials that name none
    data: Path | None = None
    root: Path = Path("checkpoints")  # the ledger, and runs that trials train
    results: Path = Path("sweeps/results")

    @property
    def locks(self) -> Path:
        return self.results / "locks"


class Workbench:
    """One process's share of a sweep: caches in memory over results on disk."""

    def __init__(self, places: Places, compiled: bool = False, device: torch.device | None = None) -> None:
        self.places = places
        self.ranks = Ranks() if device is None else _OnDevice(chosen=device)
        self.pool = ModelPool(compiled)
        self.seconds: dict[str, float] = {}
        self.shared: list[str] = []  # stages of the current trial whose result was there already
        self._views: dict[str, View] = {}
        self._stats: dict[str, Stats] = {}
        self._factors: dict[str, StatsFactors] = {}
        self._quantized: dict[str, Quantized] = {}
        self._scores: dict[str, tuple[dict[str, Any], Score]] = {}
        self._data: dict[str, DataFolder] = {}
        self._texts: dict[str, Text] = {}
        self._decoded: dict[str, Mapping[str, Tensor]] = {}

    def start_trial(self) -> None:
        """Forget the last trial's times."""
        self.seconds, self.shared = {}, []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    # ---- weights -----------------------------------------------------------------------------------------------------

    def checkpoint(self, settings: TrialSettings) -> Checkpoint:
        """The checkpoint that a trial starts from; trained first, where it says so."""
        if settings.train:
            name = f"train-{run_id(settings.train)}"
            with self.timed("train"), claim(self.places.locks, name, wait=True, inherit=True):
                return trained(settings.train, self.places.root, self.places.results / "recipes")
        if settings.checkpoint:
            return Checkpoint.open(Path(settings.checkpoint))
        if self.places.checkpoint:
            return Checkpoint.open(self.places.checkpoint)
        return self._default

    @cached_property
    def _default(self) -> Checkpoint:
        return default_checkpoint(self.places.root)

    def source_ids(self, settings: TrialSettings) -> list[str]:
        """The ids of the files that a trial's weights are made of, without reading them."""
        if settings.train:
            return [f"train:{run_id(settings.train)}", settings.weights or ""]
        checkpoint = self.checkpoint(settings)
        if settings.blend:
            require_trained(checkpoint)
            parts = swa_parts(checkpoint, settings.blend.ema_share, settings.blend.selection())
            return [f"{part.share!r}:{part.checkpoint.view_id(part.view)}" for part in parts]
        if settings.ema:
            return [snapshot.tensors_sha256 for snapshot in run_snapshots(checkpoint)]
        return [checkpoint.view_id(settings.weights)]

    def view(self, settings: TrialSettings) -> View:
        """A trial's weights."""
        fields = settings.model_dump(mode="json", include={"checkpoint", "weights", "train", "blend", "ema"})
        key = json.dumps(fields, sort_keys=True)
        if key not in self._views:
            checkpoint = self.checkpoint(settings)
            with self.timed("weights"):
                _keep(self._views, key, self._load(checkpoint, settings))
        return self._views[key]

    def _load(self, checkpoint: Checkpoint, settings: TrialSettings) -> View:
        if settings.blend:
            require_trained(checkpoint)
            blend = linear_blend(swa_parts(checkpoint, settings.blend.ema_share, settings.blend.selection()))
            config = blend.reference.config
            return View(blend.reference, "raw", view_id(blend.tensors, config), blend.tensors)
        if settings.ema:
            return self._average(checkpoint, settings)
        return checkpoint.load(settings.weights)

    def _average(self, checkpoint: Checkpoint, settings: TrialSettings) -> View:
        wanted = settings.ema
        assert wanted is not None
        length: Length
        if wanted.sigma is not None:
            length = PowerLength(wanted.sigma)
        else:
            assert wanted.half_life_steps is not None
            length = ExponentialLength(wanted.half_life_steps)
        snapshots, step = run_snapshots(checkpoint), int(checkpoint.meta["step"])
        made = synthesise(find_combination(snapshots, length, step, wanted.max_error))
        buffers = [name for name, _ in build_module(checkpoint.config).named_buffers()]
        saved = checkpoint.load("raw").tensors if buffers else {}
        tensors = {**{name: saved[name] for name in buffers if name in saved}, **made}
        config = config_at(checkpoint, snapshots, step)
        return View(checkpoint, "raw", view_id(tensors, config), tensors)

    # ---- data and statistics -----------------------------------------------------------------------------------------

    def data(self, spec: SweepSpec, checkpoint: Checkpoint) -> DataFolder:
        """What a trial calibrates on and is scored on. Raises NotFoundError, MismatchError."""
        named = self.places.data or (Path(spec.data) if spec.data else None)
        found = named or Path(str(checkpoint.meta.get("data_dir")))
        if str(found) not in self._data:
            if not found.is_dir():
                raise NotFoundError(
                    f"the data folder of {checkpoint.path} ({found}) is not here", hint="pass --data FOLDER"
                )
            self._data[str(found)] = DataFolder.open(found)
        data = self._data[str(found)]
        require_tokenizer(checkpoint.config, data, str(checkpoint.path))
        if named is None and data.manifest_sha256 != checkpoint.config["data"]["manifest_sha256"]:
            raise MismatchError(
                f"{found} was rebuilt since {checkpoint.path} was trained on it", hint=f"--data {found}"
            )
        return data

    def stats(self, spec: SweepSpec, settings: TrialSettings, view: View) -> Stats:
        """The view's statistics; collected by one process while others that need them wait."""
        data = self.data(spec, view.checkpoint)
        key = f"{view.id}:{data.manifest_sha256}:{settings.calibration.model_dump_json()}"
        if key in self._stats:
            self.shared.append("calibrate")
            return self._stats[key]
        with self.timed("calibrate"), claim(self.places.locks, f"stats-{view.id}", wait=True):
            stats = calibrate(view, data, settings.calibration)
        if stats.cached:
            self.shared.append("calibrate")
        _keep(self._stats, key, stats)
        return stats

    def factors(self, stats: Stats) -> StatsFactors:
        """The statistics' factorized Hessians."""
        if stats.id not in self._factors:
            _keep(self._factors, stats.id, StatsFactors(stats))
        return self._factors[stats.id]

    # ---- artifacts ---------------------------------------------------------------------------------------------------

    def artifact_folder(self, view: View, stats_id: str, settings: TrialSettings) -> tuple[Path, str]:
        """Where `requant` would put this artifact, and its id; a repeat with jittered scales has one of its own."""
        identity = {**trial_plan(settings).identity(), "codec": settings.codec}
        if settings.jitter_seed:
            identity["jitter_seed"] = settings.jitter_seed
        artifact_id = derived_id(requant.STAGE, requant.STAGE_VERSION, [view.id, stats_id], identity)
        return view.checkpoint.derived(requant.STAGE, artifact_id), artifact_id

    def unquantized(self, view: View) -> Quantized:
        """The weights themselves as what is scored."""
        subject = Subject(view.id, view.config, str(view), view.checkpoint.path / "derived")
        return Quantized(subject, lambda: view.tensors, {}, view.id)

    def quantized(
        self,
        view: View,
        stats: Stats,
        settings: TrialSettings,
        on_model: Callable[[Callable[[], int]], None] | None = None,
    ) -> Quantized:
        """The packed artifact of a trial, read back; found if it is there.

        `on_model` is called after quantizing, and after finding, with a function that predicts the bytes; it may raise
        DroppedError. Raises VerificationError if the file does not decode to the symbols that were packed.
        """
        codec = parse_settings(PackSettings, {"codec": settings.codec}, "sweep").codec
        plan = trial_plan(settings)
        folder, artifact_id = self.artifact_folder(view, stats.id, settings)
        view = jittered(view, settings.jitter_seed) if settings.jitter_seed else view
        if artifact_id in self._quantized and on_model is None:
            return self._quantized[artifact_id]
        with claim(self.places.locks, f"artifact-{artifact_id}", wait=True):
            with hushed():
                meta = intact_meta(folder, requant.PAYLOAD)
            if meta is None or "content_sha256" not in meta:
                meta = self._make_artifact(view, stats, plan, codec, folder, on_model)
            else:
                self.shared.append("artifact")
                if on_model:
                    predicted = int(meta["predicted_bytes"]) if "predicted_bytes" in meta else None
                    on_model(lambda: predicted if predicted is not None else self._predict_again(view, stats, plan))
        path = folder / requant.PAYLOAD
        facts = {
            "artifact_id": artifact_id,
            "artifact_sha256": meta["payload_sha256"],
            "artifact_bytes": path.stat().st_size,
            "symbols_sha256": meta["symbols_sha256"],
        }
        subject = Subject(facts["artifact_sha256"], view.config, str(path), view.checkpoint.path / "derived")
        made = Quantized(subject, lambda: self._tensors(path, subject.id), facts, str(meta["content_sha256"]))
        _keep(self._quantized, artifact_id, made, KEPT_SMALL)
        return made

    def _predict_again(self, view: View, stats: Stats, plan: Plan) -> int:
        with self.timed("predict"):
            return predict_bytes(quantize_view(view, stats, plan, self.factors(stats)))

    def _make_artifact(
        self,
        view: View,
        stats: Stats,
        plan: Plan,
        codec: str,
        folder: Path,
        on_model: Callable[[Callable[[], int]], None] | None,
    ) -> dict[str, Any]:
        with self.timed("quantize"):
            model = quantize_view(view, stats, plan, self.factors(stats))
            facts = requant.artifact_facts(model, view, stats, codec)
        predicted: list[int] = []

        def predict() -> int:
            with self.timed("predict"):
                predicted.append(predict_bytes(model))
            return predicted[-1]

        if on_model:
            on_model(predict)

        def make(building: Path) -> Mapping[str, Any]:
            twin = self._twin(folder.parent, facts)
            if twin is not None:
                self.shared.append("pack")
                _link(twin, building / requant.PAYLOAD)
            else:
                self._pack(model, codec, building / requant.PAYLOAD, facts["symbols_sha256"])
            return {**facts, **({"predicted_bytes": predicted[-1]} if predicted else {})}

        config: dict[str, Any] = {"stage": requant.STAGE, "version": requant.STAGE_VERSION, "view": view.name}
        config |= {"view_id": view.id, "stats_id": stats.id, "plan": plan.name, **plan.identity(), "codec": codec}
        with self.timed("pack"):
            return load_or_make(folder, requant.PAYLOAD, config, make, fresh=True)[0]

    def _pack(self, model: QuantizedModel, codec: str, path: Path, packed: str) -> None:
        decoded = write_verified(path, pack(model, PackSettings(codec=codec)), packed)
        tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
        _keep(self._decoded, sha256_file(path), tensors, 1)

    def _twin(self, stage: Path, facts: Mapping[str, Any]) -> Path | None:
        """An artifact that was made of the very same model by the same codec."""
        for meta_path in sorted(stage.glob("*/meta.json")):
            meta = read_json(meta_path)
            if all(meta.get(key) == facts[key] for key in ("content_sha256", "codec", "lineage")):
                path = meta_path.parent / requant.PAYLOAD
                if path.is_file() and sha256_file(path) == meta["payload_sha256"]:
                    return path
        return None

    def _tensors(self, path: Path, sha256: str) -> Mapping[str, Tensor]:
        if sha256 not in self._decoded:
            arrays = read_artifact(path).tensors
            _keep(self._decoded, sha256, {name: torch.from_numpy(array) for name, array in arrays.items()}, 1)
        return self._decoded[sha256]

    # ---- scores ------------------------------------------------------------------------------------------------------

    def protocol(self, spec: SweepSpec, stage: str, settings: TrialSettings, config: Mapping[str, Any]) -> Protocol:
        """What a scoring stage does. Raises SettingsError for a TTT setting that does not exist."""
        chosen: Any = getattr(spec.stages, stage)
        window = spec.stages.seq_len or train_seq_len(config)
        if stage == "screen":
            return PlainProtocol(seq_len=window)
        if stage == "plain":
            return PlainProtocol(seq_len=window, max_tokens=chosen.max_tokens)
        if stage == "sliding":
            fields = {"seq_len": window, "stride": chosen.stride, "max_tokens": chosen.max_tokens}
            return parse_settings(SlidingProtocol, fields, "[stages.sliding]")
        changes = [*chosen.set, *(f"{key}={json.dumps(value)}" for key, value in settings.ttt.items())]
        common = {"max_tokens": chosen.max_tokens, "seq_len": spec.stages.seq_len}
        return ttt_protocol(chosen.preset, changes, common, window)

    def score(
        self, spec: SweepSpec, stage: str, settings: TrialSettings, quantized: Quantized, data: DataFolder
    ) -> tuple[dict[str, Any], Score]:
        """A scoring stage's facts and sums; found if they are there."""
        protocol = self.protocol(spec, stage, settings, quantized.subject.config)
        screening = spec.stages.screen.model_dump_json(exclude={"only_if"}) if spec.stages.screen else ""
        wanted = protocol.model_dump_json() + (screening if stage == "screen" else "")
        key = f"{quantized.subject.id}:{data.manifest_sha256}:{stage}:{wanted}"
        if key in self._scores:
            self.shared.append(stage)
            return self._scores[key]
        with self.timed(stage), claim(self.places.locks, f"{stage}-{quantized.subject.id}", wait=True):
            if stage == "screen":
                facts, cached = self._screen(spec, quantized, data, protocol)
            else:
                session = Session(ranks=self.ranks, quiet=True)
                facts, cached = score_subject(
                    quantized.subject, quantized.tensors, data, protocol, False, session, self.pool
                )
        if cached:
            self.shared.append(stage)
        _keep(self._scores, key, (facts, load_score(facts)), KEPT_SMALL)
        return self._scores[key]

    def _screen(
        self, spec: SweepSpec, quantized: Quantized, data: DataFolder, protocol: Protocol
    ) -> tuple[dict[str, Any], bool]:
        stage = spec.stages.screen
        assert stage is not None
        identity = {**protocol.model_dump(mode="json"), **stage.model_dump(mode="json", exclude={"only_if"})}
        identity["data_manifest_sha256"] = data.manifest_sha256
        subject = quantized.subject
        screen_id = derived_id(SCREEN_STAGE, SCREEN_VERSION, [subject.id], identity)
        folder = subject.root / SCREEN_STAGE / screen_id[:12]

        def make(building: Path) -> Mapping[str, Any]:
            text = self.text(data, protocol)
            wanted = max(1, min(len(text.spans), stage.tokens // protocol.seq_len))
            order = np.random.default_rng(stage.seed).permutation(len(text.spans))
            module = self.pool.load(subject.config, quantized.tensors(), subject.name, self.ranks.device)
            chosen = np.sort(order[:wanted])
            found = score_chosen(module, text.tokens, text.token_bytes, text.spans, text.pieces, chosen)
            found.save(building / SCREEN_PAYLOAD)
            return {**found.sums(), "windows": wanted, "subject_id": subject.id}

        config = {"stage": SCREEN_STAGE, "version": SCREEN_VERSION, **identity}
        with hushed():
            meta, cached = load_or_make(folder, SCREEN_PAYLOAD, config, make)
        return {**meta, "folder": str(folder)}, cached

    def text(self, data: DataFolder, protocol: Protocol) -> Text:
        """The whole text that windows are drawn from, cut into pieces."""
        key = f"{data.manifest_sha256}:{protocol.seq_len}"
        if key not in self._texts:
            tokens, token_bytes = folder_text(data, protocol)
            assert not isinstance(protocol, SlidingProtocol)
            spans = protocol_spans(
                PlainProtocol(seq_len=protocol.seq_len), num_targets(len(tokens), protocol.seq_len, "drop")
            )
            self._texts[key] = Text(tokens, token_bytes, spans, cut_documents(data, tokens, token_bytes))
        return self._texts[key]

    def num_blocks(self, settings: TrialSettings) -> int:
        """How many blocks the model of a trial has."""
        config = self.checkpoint(settings).config
        return get_family(config["family"]).num_layers(build_module(config))


@dataclass(frozen=True)
class _OnDevice(Ranks):
    """One process alone, on a device that it was given."""

    chosen: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        return self.chosen


def _keep(cache: dict[str, Any], key: str, value: Any, most: int = KEPT) -> None:
    """Add to a cache, letting go of the oldest."""
    cache[key] = value
    while len(cache) > most:
        del cache[next(iter(cache))]


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        destination.write_bytes(source.read_bytes())


def jittered(view: View, seed: int) -> View:
    """The weights with each row moved by up to ±1e-4 of itself against its scale, at random.

    Scales are stored in fp16, whose steps are wider than that: a scale jittered by 1e-4 would mostly be rounded back.
    So the row moves instead of its scale, which to the rounding is the same.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in view.tensors.items():
        if tensor.ndim > 1:
            rows = 2 * torch.rand(len(tensor), generator=generator) - 1
            tensor = tensor * (1 + JITTER * rows).reshape(-1, *[1] * (tensor.ndim - 1))
        moved[name] = tensor
    return replace(view, tensors=moved)
