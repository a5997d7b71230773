"""`fit`: a checkpoint and a number of bytes in, the artifact with the lowest loss we know how to make out.

Statistics and κ are read from the cache or made; they are all that touches training data, and the seconds they took are
said, because the challenge counts them. The budget is then solved for, and the result written, read back by the decoder
that ships, and kept beside the checkpoint under everything that decided it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.text import CalibrationSet, draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import SettingsError, VerificationError
from pgolf_post.families import train_seq_len
from pgolf_post.fit.budget import TrainingClock
from pgolf_post.fit.build import Builder
from pgolf_post.fit.kappa import Kappa, by_tensor, groups_of, measure_kappas
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES, Search, Solution, Try
from pgolf_post.fit.steps import constant_for, expected_loss
from pgolf_post.pack.artifact import ARTIFACT_FILE, read_artifact, write_artifact
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.progress import say
from pgolf_post.quantize.distill import distill
from pgolf_post.quantize.distill_settings import DistillSettings
from pgolf_post.quantize.tensor import symbols_sha256
from pgolf_post.ranks import ALONE, Ranks
from pgolf_post.requant import Artifact
from pgolf_post.storage import read_json, write_json

STAGE, STAGE_VERSION, PAYLOAD = "artifact", 1, ARTIFACT_FILE
DISTILL = DistillSettings()
KAPPA_STAGE, KAPPA_VERSION, KAPPA_FILE = "kappa", 1, "kappa.json"


@dataclass(frozen=True)
class Fitter:
    """What all budgets of one checkpoint share."""

    view: View
    data: DataFolder
    stats: Stats
    settings: FitSettings
    builder: Builder
    kappas: Mapping[str, Kappa]  # tensor or role → measurement; empty where κ is off
    clock: TrainingClock  # of the steps that read training text, now or when what they made was cached
    distills: bool  # whether floats are tuned: asked for, and there is time

    @property
    def kappa(self) -> dict[str, float]:
        """Tensor → κ."""
        return by_tensor(self.builder, self.kappas, self.settings.kappa)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the symbols, beside view, statistics and bytes."""
        settings = self.settings.model_dump(mode="json", exclude={"distill"})
        return {"fit": settings, "kappa": self.kappa, **({"distill": DISTILL.model_dump()} if self.distills else {})}


def prepare(
    view: View,
    data: DataFolder,
    calibration: CalibrationSettings,
    settings: FitSettings,
    clock: TrainingClock | None = None,
    fresh: bool = False,
    ranks: Ranks = ALONE,
    stats: Stats | None = None,  # instead of the view's own, knowingly
) -> Fitter:
    """Statistics, κ and everything else that does not depend on the budget. Runs on all ranks.

    Raises SettingsError if the seconds allowed do not even hold the statistics, and what `calibrate` raises.
    """
    clock = clock or TrainingClock()
    if stats is None:
        with clock.step("statistics") as step:
            stats = calibrate(view, data, calibration.model_copy(update={"fisher": True}), fresh, ranks)
            step.add(stats.seconds if stats.cached else 0.0)
    builder = Builder(view, stats, settings)
    kappas: Mapping[str, Kappa] = {}
    if settings.kappa != "off" and clock.allows("kappa", _kappa_seconds(builder, stats, settings)):
        with clock.step("kappa") as step:
            kappas, cached_seconds = _kappas(builder, data, settings, fresh, ranks)
            step.add(cached_seconds)
    distills = settings.distill and clock.allows("distillation", _distill_seconds(stats))
    return Fitter(view, data, stats, settings, builder, kappas, clock, distills)


def probe_text(view: View, data: DataFolder, tokens: int, seed: int) -> CalibrationSet:
    """Training text, drawn by another seed than the statistics'. Never more than there is."""
    seq_len = train_seq_len(view.config)
    available = sum(len(shard) // seq_len for _, shard in data.shards("train")) * seq_len
    return draw_training_text(data, CalibrationSettings(tokens=min(tokens, available), seed=seed + 1), seq_len)


def _kappa_seconds(builder: Builder, stats: Stats, settings: FitSettings) -> float:
    """About what κ will take: statistics cost three forward passes a token."""
    groups = len(groups_of(builder, settings.kappa))
    return stats.seconds / stats.num_tokens / 3 * settings.kappa_tokens * (groups + 1)


def _distill_seconds(stats: Stats) -> float:
    """About what distillation will take: each step is a forward and a backward pass, with the teacher's head beside."""
    return stats.seconds / stats.num_tokens * (DISTILL.steps * DISTILL.batch_tokens + DISTILL.tokens)


def _kappas(
    builder: Builder, data: DataFolder, settings: FitSettings, fresh: bool, ranks: Ranks
) -> tuple[dict[str, Kappa], float]:
    """κ by group, from the cache or measured, and the seconds that took when it is from the cache."""
    view = builder.view
    text = probe_text(view, data, settings.kappa_tokens, settings.kappa_seed)
    identity = {**settings.model_dump(mode="json"), "text_sha256": text.sha256}
    folder = view.checkpoint.derived(
        KAPPA_STAGE, derived_id(KAPPA_STAGE, KAPPA_VERSION, [view.id, builder.stats.id], identity)
    )
    started = time.perf_counter()

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / KAPPA_FILE, {group: found.facts() for group, found in measured.items()})
        return {"view_id": view.id, "seconds": round(time.perf_counter() - started, 3)}

    if ranks.main_says(not fresh and (folder / "meta.json").is_file()):
        measured: dict[str, Kappa] = {}
    else:
        measured = measure_kappas(builder, Probe(view, text, ranks), settings.kappa)
    config = {"stage": KAPPA_STAGE, "version": KAPPA_VERSION, "view": view.name, "view_id": view.id, **identity}
    if not measured:
        return _read_kappas(folder), float(read_json(folder / "meta.json")["seconds"])
    if ranks.is_main:
        load_or_make(folder, KAPPA_FILE, config, make, fresh=True)
    ranks.wait()
    return measured, 0.0


def _read_kappas(folder: Path) -> dict[str, Kappa]:
    return {group: Kappa(**facts) for group, facts in read_json(folder / KAPPA_FILE).items()}


def solve(fitter: Fitter, artifact_limit: int, codec: str = "rans", fresh: bool = False) -> Artifact:
    """The best artifact of at most so many bytes; cached by everything that decides it."""
    view = fitter.view
    identity = {**fitter.identity, "artifact_limit": artifact_limit, "codec": codec}
    artifact_id = derived_id("fit", STAGE_VERSION, [view.id, fitter.stats.id], identity)
    folder = view.checkpoint.derived(STAGE, artifact_id)

    def make(building: Path) -> Mapping[str, Any]:
        solution = Search(fitter.builder, fitter.kappa, codec).solve(artifact_limit, _say_try)
        if fitter.distills:
            solution, tuned = _distilled(fitter, solution, artifact_limit, codec)
        write_artifact(building / PAYLOAD, solution.data)
        packed = solution.model.symbols_sha256()
        decoded = symbols_sha256(read_artifact(building / PAYLOAD).symbols)
        if decoded != packed:
            raise VerificationError(f"decoded symbols {decoded[:12]} are not the packed {packed[:12]}")
        more = {"distilled": tuned} if fitter.distills else {}
        return {"symbols_sha256": packed, "view_id": view.id, **_facts(fitter, solution), **more}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id}
    config |= {"stats_id": fitter.stats.id, "plan": "fit", **identity}
    meta, cached = load_or_make(folder, PAYLOAD, config, make, fresh)
    return Artifact(folder, artifact_id, meta, cached)


def _distilled(fitter: Fitter, solution: Solution, limit: int, codec: str) -> tuple[Solution, dict[str, Any]]:
    """The solution with its floats tuned, where that lowers held-out losses and still fits."""
    text = probe_text(fitter.view, fitter.data, DISTILL.tokens, fitter.settings.kappa_seed + 1)
    with fitter.clock.step("distillation"):
        model, report = distill(solution.model, fitter.view, text, DISTILL)
    data = pack(model, PackSettings(codec=codec)) if report.kept else solution.data
    if len(data) > limit:
        say(f"distilled floats do not fit: {len(data):,} of {limit:,} bytes; the untuned ones stay")
        return solution, {**report.facts(), "kept": False}
    return replace(solution, model=model, data=data), report.facts()


def _say_try(found: Try) -> None:
    say(f"c {found.constant:.3e}: {found.num_bytes:,} bytes {'packed' if found.packed else 'predicted'}")


def _facts(fitter: Fitter, solution: Solution) -> dict[str, Any]:
    """What meta.json says of a solution, beside its bytes."""
    quantized = solution.model.quantized.values()
    kappa = fitter.kappa
    predicted = sum(float(tensor.facts["predicted_loss"]) * kappa[tensor.name] for tensor in quantized)
    stale = {"stale": dict(fitter.stats.stale)} if fitter.stats.stale else {}
    return {
        **stale,
        "constant": solution.constant,
        "predicted_nats": predicted,
        "equal_slope_nats": expected_loss(fitter.builder.num_weights, solution.constant),
        "builds": len(solution.tries),
        "train_seconds": dict(fitter.clock.seconds),
        "tensors": [{"name": tensor.name, **tensor.facts} for tensor in quantized],
    }


# ---- bytes for a loss ------------------------------------------------------------------------------------------------

GAP_TRIES, GAP_CLOSE = 4, 0.03


def limit_for_gap(fitter: Fitter, gap_bpb: float, codec: str = "rans") -> int:
    """The artifact bytes at which quantizing should cost `gap_bpb`, measured on training text.

    What is measured is the divergence from the unquantized model, which grows as c². Raises SettingsError for a gap
    that is not positive.
    """
    if not gap_bpb > 0:
        raise SettingsError(f"a target gap of {gap_bpb:g} bpb: it must be positive")
    text = probe_text(fitter.view, fitter.data, fitter.settings.kappa_tokens, fitter.settings.kappa_seed)
    wanted = gap_bpb * np.log(2) * bytes_per_token(fitter.data, text)
    probe, search = Probe(fitter.view, text), Search(fitter.builder, fitter.kappa, codec)
    constant = constant_for(fitter.builder.num_weights, wanted)
    for _ in range(GAP_TRIES):
        model = fitter.builder.model(fitter.builder.quantize(search.constants(constant)))
        decoded = {name: torch.from_numpy(tensor.dequantize()) for name, tensor in model.quantized.items()}
        found = probe.divergence(decoded)
        spread = f"{found.mean:.5f} ± {2 * found.error:.5f}"
        say(f"c {constant:.3e}: {spread} nats/token on training text, {wanted:.5f} wanted")
        if abs(found.mean / wanted - 1) <= GAP_CLOSE or found.mean <= 0:
            break
        constant *= (wanted / found.mean) ** 0.5
    return search.packed_bytes(model) + WINDOW_BYTES // 2


def bytes_per_token(data: DataFolder, text: CalibrationSet) -> float:
    """Of a text's targets: what turns bits per token into bits per byte."""
    before, after = text.tokens[:, :-1].ravel(), text.tokens[:, 1:].ravel()
    return float(data.byte_table.count(before, after).mean())
