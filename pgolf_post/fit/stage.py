"""`fit`: a checkpoint and a number of bytes in, the artifact with the lowest loss we know how to make out.

Statistics and κ are read from the cache or made. The budget is then solved for, if asked for once more with fine-tuning
between blocks, and the result written, read back by the decoder that ships, and kept beside the checkpoint under
everything that decided it. Seconds that touch training data are said, because the challenge counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pgolf_post.artifacts import PAYLOAD, STAGE, PackedArtifact, artifact_facts
from pgolf_post.base.progress import say
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.stage import PARTIAL_SUFFIX, calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.fit.build import Builder
from pgolf_post.fit.kappa import Kappa, by_tensor, groups_of
from pgolf_post.fit.kappa_cache import cached_kappas
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Build, Search, Solution
from pgolf_post.fit.steps import expected_loss
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune import STEP_NAME, fine_tuned, split_text
from pgolf_post.fit.tune_partial import TunePartial
from pgolf_post.pack.artifact import write_verified
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import DistillSettings
from pgolf_post.quantize.distill import distill

STAGE_VERSION = 1
DISTILL = DistillSettings()


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
    texts: tuple[CalibrationSet, CalibrationSet] | None = None  # to fine-tune on, and to judge it; None: it is not done

    @property
    def kappa(self) -> dict[str, float]:
        """Tensor → κ."""
        return by_tensor(self.builder, self.kappas, self.settings.kappa)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the symbols, beside view, statistics and bytes."""
        settings = self.settings.model_dump(mode="json", exclude={"distill", "tune_tokens"})
        tuning = (
            {"tokens": self.settings.tune_tokens, "text_sha256": [text.sha256 for text in self.texts]}
            if self.texts
            else {}
        )
        extra = {"distill": DISTILL.model_dump() if self.distills else {}, "tune": tuning}
        return {"fit": settings, "kappa": self.kappa, **{name: value for name, value in extra.items() if value}}


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

    Raises SettingsError if the seconds allowed do not even hold the statistics or the text is too short to tune on, and
    what `calibrate` raises.
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
            kappas, cached_seconds = cached_kappas(builder, data, settings, fresh, ranks)
            step.add(cached_seconds)
    distills = settings.distill and clock.allows("distillation", _distill_seconds(stats))
    tunes = settings.tune_tokens > 0 and clock.allows(STEP_NAME, tune_seconds(stats, settings.tune_tokens))
    texts = None
    if tunes:
        seq_len = calibration.seq_len or view.train_seq_len
        texts = split_text(calibration_text(view, data, calibration, seq_len, ranks))
    return Fitter(view, data, stats, settings, builder, kappas, clock, distills, texts)


def _kappa_seconds(builder: Builder, stats: Stats, settings: FitSettings) -> float:
    """About what κ will take: statistics cost three forward passes a token."""
    groups = len(groups_of(builder, settings.kappa))
    return stats.seconds / stats.num_tokens / 3 * settings.kappa_tokens * (groups + 1)


def tune_seconds(stats: Stats, tokens: int) -> float:
    """About what fine-tuning will take: two forward passes and a backward one, about as statistics do."""
    return stats.seconds / stats.num_tokens * tokens


def _distill_seconds(stats: Stats) -> float:
    """About what distillation will take: each step is a forward and a backward pass, with the teacher's head beside."""
    return stats.seconds / stats.num_tokens * (DISTILL.steps * DISTILL.batch_tokens + DISTILL.tokens)


def solve(fitter: Fitter, artifact_limit: int, codec: str = "rans", fresh: bool = False) -> PackedArtifact:
    """The best artifact of at most so many bytes; cached by everything that decides it."""
    view = fitter.view
    identity = {**fitter.identity, "artifact_limit": artifact_limit, "codec": codec}
    artifact_id = derived_id(STAGE, STAGE_VERSION, [view.id, fitter.stats.id], identity)
    folder = view.checkpoint.derived(STAGE, artifact_id)
    partial = TunePartial(folder.with_name(folder.name + PARTIAL_SUFFIX))
    if fresh:
        partial.remove()

    def make(building: Path) -> Mapping[str, Any]:
        search = Search(fitter.builder, fitter.kappa, codec)
        solution, extra = search.solve(artifact_limit, _say_try), {}
        if fitter.texts:
            made = _fine_tuned(fitter, search, solution, artifact_limit, fitter.texts, partial)
            solution, extra["fine_tuned"] = made
        if fitter.distills:
            solution, extra["distilled"] = _distilled(fitter, solution, artifact_limit, codec)
        facts = artifact_facts(solution.model, view, fitter.stats, codec)
        write_verified(building / PAYLOAD, solution.data, facts["symbols_sha256"])
        return {**facts, **_facts(fitter, solution), **extra}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id}
    config |= {"stats_id": fitter.stats.id, "plan": "fit", **identity}
    meta, cached = load_or_make(folder, PAYLOAD, config, make, fresh)
    partial.remove()
    return PackedArtifact(folder, artifact_id, meta, cached)


def _fine_tuned(
    fitter: Fitter,
    search: Search,
    solution: Solution,
    limit: int,
    texts: tuple[CalibrationSet, CalibrationSet],
    partial: TunePartial,
) -> tuple[Solution, dict[str, Any]]:
    """The solution with its blocks fine-tuned, where that fits and lowers the divergence on text not tuned on."""
    tokens, (lesson, exam) = fitter.settings.tune_tokens, texts
    tuned = fine_tuned(fitter.builder, search, solution, limit, lesson, tokens, fitter.clock, partial)
    if tuned is None:
        return solution, {"kept": False, "tokens": tokens}
    with fitter.clock.step("held-out text"):
        probe = Probe(fitter.view, exam)
        before, after = (probe.divergence(_decoded(found)).mean for found in (solution, tuned))
    kept = after < before
    say(f"held-out divergence {before:.6f}, fine-tuned {after:.6f}: {'kept' if kept else 'NOT kept'}")
    facts = {"kept": kept, "tokens": tokens, "divergence_before": before, "divergence_after": after}
    return tuned if kept else solution, facts


def _decoded(solution: Solution) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(tensor.dequantize()) for name, tensor in solution.model.quantized.items()}


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


def _say_try(found: Build) -> None:
    say(f"c {found.constant:.3e}: {found.num_bytes:,} bytes {'packed' if found.packed else 'predicted'}")


def _facts(fitter: Fitter, solution: Solution) -> dict[str, Any]:
    """What meta.json says of a solution, beside what it says of any artifact."""
    kappa, quantized = fitter.kappa, solution.model.quantized.values()
    predicted = sum(float(tensor.facts["predicted_loss"]) * kappa[tensor.name] for tensor in quantized)
    return {
        "constant": solution.constant,
        "predicted_nats": predicted,
        "equal_slope_nats": expected_loss(fitter.builder.num_weights, solution.constant),
        "builds": len(solution.tries),
        "train_seconds": dict(fitter.clock.seconds),
    }
