"""What a trial's artifact scores: a screen of a few windows, or any protocol of `eval`, found if it was scored before.

An artifact is scored once, whatever the number of trials that lead to it. Screens draw the same windows for every
trial, and are kept beside the checkpoint as other scores are. The `expected` stage draws them too, and says what the
weights lose there before quantization plus their quantization's divergence (score/compare/expected.py): the differences
between two quantizations of the same weights are then free of the luck of the text's words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_post.base.progress import hushed
from pgolf_post.base.ranks import Ranks
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.families import train_seq_len
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import load_score, score_model
from pgolf_post.score.compare.expected import expected_score
from pgolf_post.score.compare.pieces import cut_documents
from pgolf_post.score.compare.windows import score_chosen
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import Protocol, folder_text, protocol_spans
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.spans import Span, num_targets
from pgolf_post.score.ttt.methods import ttt_protocol
from pgolf_post.settings import parse_settings
from pgolf_post.sweep.artifacts import Quantized
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.common import KEPT_SMALL, Places, Recent, Spending
from pgolf_post.sweep.settings import DRAWN, ScreenStage, SweepSpec, TrialSettings

SCREEN_VERSION, SCREEN_PAYLOAD = 1, "documents.safetensors"


def stage_protocol(spec: SweepSpec, stage: str, settings: TrialSettings, config: Mapping[str, Any]) -> Protocol:
    """What a scoring stage does to a model of this config. Raises SettingsError for a setting that does not exist."""
    chosen: Any = getattr(spec.stages, stage)
    window = spec.stages.seq_len or train_seq_len(config)
    if stage in DRAWN:
        return PlainProtocol(seq_len=window)
    if stage == "plain":
        return PlainProtocol(seq_len=window, max_tokens=chosen.max_tokens)
    if stage == "sliding":
        fields = {"seq_len": window, "stride": chosen.stride, "max_tokens": chosen.max_tokens}
        return parse_settings(SlidingProtocol, fields, "[stages.sliding]")
    changes = [*chosen.set, *(f"{key}={json.dumps(value)}" for key, value in settings.ttt.items())]
    common = {"max_tokens": chosen.max_tokens, "seq_len": spec.stages.seq_len}
    return ttt_protocol(chosen.preset, changes, common, window)


@dataclass(frozen=True)
class Text:
    """A scored text of n tokens."""

    tokens: np.ndarray  # (n,) uint16
    token_bytes: np.ndarray  # (n,) int64
    spans: list[Span]
    pieces: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class OneDevice(Ranks):
    """One process alone, on a device that it was given."""

    chosen: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def device(self) -> torch.device:
        return self.chosen


class Scores:
    """Finds, makes and holds trials' scores, with one model whose weights are swapped."""

    def __init__(self, places: Places, spending: Spending, compiled: bool, device: torch.device | None) -> None:
        self.places, self.spending = places, spending
        self.ranks = Ranks() if device is None else OneDevice(chosen=device)
        self.pool, self.reference_pool = ModelPool(compiled), ModelPool(compiled)
        self._scores = Recent[tuple[dict[str, Any], Score]](KEPT_SMALL)
        self._texts: dict[str, Text] = {}

    def score(
        self,
        spec: SweepSpec,
        stage: str,
        settings: TrialSettings,
        quantized: Quantized,
        weights: Quantized,  # before quantization
        data: DataFolder,
    ) -> tuple[dict[str, Any], Score]:
        """A scoring stage's facts and sums; found if they are there."""
        protocol = stage_protocol(spec, stage, settings, quantized.subject.config)
        screen: ScreenStage | None = getattr(spec.stages, stage) if stage in DRAWN else None
        drawn = screen.model_dump_json(exclude={"only_if"}) if screen else ""
        reference = weights if stage == "expected" else None
        beside = f":{reference.subject.id}" if reference else ""
        key = f"{quantized.subject.id}{beside}:{data.manifest_sha256}:{stage}:{protocol.model_dump_json()}{drawn}"
        if key in self._scores:
            self.spending.shared.append(stage)
            return self._scores[key]
        with self.spending.timed(stage), claim(self.places.locks, f"{stage}-{quantized.subject.id}", wait=True):
            if screen:
                facts, cached = self._drawn(stage, screen, quantized, reference, data, protocol)
            else:
                session = Session(ranks=self.ranks, quiet=True)
                facts, cached = score_model(
                    quantized.subject, quantized.tensors, data, protocol, False, session, self.pool
                )
        if cached:
            self.spending.shared.append(stage)
        return self._scores.keep(key, (facts, load_score(facts)))

    def _drawn(
        self,
        name: str,
        stage: ScreenStage,
        quantized: Quantized,
        reference: Quantized | None,  # whose expectation is wanted; None: what the text's words say
        data: DataFolder,
        protocol: Protocol,
    ) -> tuple[dict[str, Any], bool]:
        """A score of drawn windows, its facts, and whether they were there."""
        identity = {**protocol.model_dump(mode="json"), **stage.model_dump(mode="json", exclude={"only_if"})}
        identity["data_manifest_sha256"] = data.manifest_sha256
        subject = quantized.subject
        sources = [subject.id, *([reference.subject.id] if reference else [])]
        screen_id = derived_id(name, SCREEN_VERSION, sources, identity)
        folder = subject.root / name / screen_id[:12]

        def make(building: Path) -> Mapping[str, Any]:
            text = self._text(data, protocol)
            wanted = max(1, min(len(text.spans), stage.tokens // protocol.seq_len))
            order = np.random.default_rng(stage.seed).permutation(len(text.spans))
            found = self._score_windows(quantized, reference, text, np.sort(order[:wanted]))
            found.save(building / SCREEN_PAYLOAD)
            return {**found.sums(), "windows": wanted, "subject_id": subject.id}

        config = {"stage": name, "version": SCREEN_VERSION, **identity}
        with hushed():
            meta, cached = load_or_make(folder, SCREEN_PAYLOAD, config, make)
        return {**meta, "folder": str(folder)}, cached

    def _score_windows(
        self, quantized: Quantized, reference: Quantized | None, text: Text, chosen: np.ndarray
    ) -> Score:
        subject = quantized.subject
        module = self.pool.load(subject.config, quantized.tensors(), subject.name, self.ranks.device)
        if reference is None or reference.subject.id == subject.id:  # nothing diverges from itself
            return score_chosen(module, text.tokens, text.token_bytes, text.spans, text.pieces, chosen)
        source = reference.subject
        before = self.reference_pool.load(source.config, reference.tensors(), source.name, self.ranks.device)
        return expected_score(before, module, text.tokens, text.token_bytes, text.spans, chosen, text.pieces)

    def _text(self, data: DataFolder, protocol: Protocol) -> Text:
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
