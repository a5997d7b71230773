"""A byte budget in, the artifact with the lowest loss we know how to make out.

First the budget is solved for. With fine-tuning it is solved again, tuning between blocks. With distillation the floats
are tuned last. Either is kept only if it lowers the divergence or loss on held-out text and still fits. The artifact is
written, decoded by the shipped decoder and cached under a hash of its inputs (artifacts.py). Seconds on training data
are recorded, because the challenge counts them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgolf_post.artifacts import FITTED, ArtifactKey, PackedArtifact, find, keep
from pgolf_post.base.progress import say
from pgolf_post.base.storage import PARTIAL_SUFFIX
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import require_writable_result
from pgolf_post.errors import SettingsError
from pgolf_post.fit.limits import require_less_than_fp16
from pgolf_post.fit.prepare import DISTILL, Fitter, prepare
from pgolf_post.fit.probe import Probe, as_stored, probe_text
from pgolf_post.fit.regularize import regularized
from pgolf_post.fit.replay import fine_tuned
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Build, Search, Solution
from pgolf_post.fit.steps import expected_loss
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune_partial import TunePartial
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.size import BUDGET_BYTES, count_code
from pgolf_post.quantize.distill import distill
from pgolf_post.settings import parse_settings


def fit(
    view: View,
    data: DataFolder,
    budget: int = BUDGET_BYTES,  # bytes of artifact and code together
    *,
    code: Sequence[Path] = (),  # counted files and folders
    calibration: CalibrationSettings = CalibrationSettings(),  # noqa: B008 (frozen)
    settings: FitSettings = FitSettings(),  # noqa: B008 (frozen)
    codec: str = "rans",
    fresh: bool = False,
    prepared: Fitter | None = None,  # from `prepare`, where several budgets share statistics and κ
) -> PackedArtifact:
    """Return the artifact with the lowest loss that we know how to make in a byte budget, at most 2,000 bytes under it.

        >>> artifact = pg.fit(view, data, 16_000_000, code=[Path("train_gpt.py")])

    Statistics and κ are read from the cache or made from `data`'s training split; the artifact is cached by all
    that decides it. Raises SettingsError for an unknown codec, if the code fills the budget alone, or if the weights do
    not fill it in fp16; OverBudgetError if the coarsest artifact is larger, NumericsError as `factorize` does,
    VerificationError if the written file does not decode to its symbols.
    """
    parse_settings(PackSettings, {"codec": codec}, "fit")
    limit = artifact_limit(budget, count_code(code))
    require_less_than_fp16(view, limit)  # before anything is computed
    return fit_artifact(prepared or prepare(view, data, calibration, settings, fresh=fresh), limit, codec, fresh)


def fit_artifact(fitter: Fitter, artifact_limit: int, codec: str = "rans", fresh: bool = False) -> PackedArtifact:
    """Return the best artifact of at most so many bytes; cached by everything that decides it."""
    key = fit_key(fitter, artifact_limit, codec)
    partial = partial_of(key)
    if fresh:
        partial.remove()
    artifact = None if fresh else find(key)
    if artifact is None:
        require_writable_result(key.folder)
        started = time.perf_counter()
        solution, facts, phases = fitted(fitter, artifact_limit, codec, partial)
        artifact = keep(key, solution.model, fitter.stats, codec, lambda: solution.data, facts, phases, started)
    partial.remove()
    return artifact


def artifact_limit(total_bytes: int, code_bytes: int) -> int:
    """Return what a budget leaves for the artifact. Raises SettingsError if the code fills it alone."""
    if code_bytes >= total_bytes:
        raise SettingsError(
            f"the code takes {code_bytes:,} of {total_bytes:,} bytes: nothing is left for weights",
            hint="raise --budget, or shorten the code: pgolf-post pack-code",
        )
    return total_bytes - code_bytes


def fit_key(fitter: Fitter, artifact_limit: int, codec: str, jitter_seed: int = 0) -> ArtifactKey:
    """Return what decides a fitted artifact. `jitter_seed` as for `plan_key`."""
    jitter = {"jitter_seed": jitter_seed} if jitter_seed else {}
    identity = {**fitter.identity, "artifact_limit": artifact_limit, "codec": codec, **jitter}
    return ArtifactKey(fitter.view, fitter.stats.id, "fit", identity, FITTED)


def partial_of(key: ArtifactKey) -> TunePartial:
    """Return the file that holds an artifact's fine-tuning while it is under way."""
    return TunePartial(key.folder.with_name(key.folder.name + PARTIAL_SUFFIX))


def fitted(
    fitter: Fitter, artifact_limit: int, codec: str, partial: TunePartial
) -> tuple[Solution, dict[str, Any], dict[str, float]]:  # and, for meta.json, facts of it and seconds by phase
    """Solve for a budget. Raises what `Search.solve` does."""
    started, read_before = time.perf_counter(), fitter.clock.total
    fitter, start, extra = regularized(fitter, artifact_limit, codec)
    search = Search(fitter.builder, fitter.kappa, codec)
    solution = search.solve(artifact_limit, _say_build, start)
    if fitter.texts:
        solution, extra["fine_tuned"] = _fine_tuned(fitter, search, solution, artifact_limit, fitter.texts, partial)
    if fitter.distills:
        solution, extra["distilled"] = _distilled(fitter, solution, artifact_limit, codec)
    spent = time.perf_counter() - started - (fitter.clock.total - read_before)
    phases = {"quantize": max(spent - search.pack_seconds, 0.0), "compress": search.pack_seconds}
    return solution, {**_facts(fitter, solution), **extra}, phases


def _fine_tuned(
    fitter: Fitter,
    search: Search,
    solution: Solution,
    limit: int,
    texts: tuple[CalibrationSet, CalibrationSet],
    partial: TunePartial,
) -> tuple[Solution, dict[str, Any]]:
    """Fine-tune the blocks of a solution; keep that if it fits and lowers the divergence on held-out text."""
    tokens, (_, held_out) = fitter.settings.tune_tokens, texts
    # Text that the model wrote is no training data: its seconds are said, and not counted.
    own = fitter.settings.tune_source == "self"
    clock = TrainingClock() if own else fitter.clock
    tuned = fine_tuned(fitter.builder, search, solution, limit, texts, tokens, clock, partial, fitter.ranks)
    source = {"source": "self", "seconds": clock.total} if own else {}
    if tuned is None:
        return solution, {"kept": False, "tokens": tokens, **source}
    with clock.step("held-out text"):
        probe = Probe(fitter.view, held_out)
        before, after = (probe.divergence(as_stored(one.model)).mean for one in (solution, tuned))
    kept = after < before
    say(f"held-out divergence {before:.6f}, fine-tuned {after:.6f}: {'kept' if kept else 'NOT kept'}")
    if own:
        say(f"{clock.total:.1f} s of fine-tuning on text that the model wrote itself: no training data was read")
    facts = {"kept": kept, "tokens": tokens, "divergence_before": before, "divergence_after": after, **source}
    return tuned if kept else solution, facts


def _distilled(fitter: Fitter, solution: Solution, limit: int, codec: str) -> tuple[Solution, dict[str, Any]]:
    """Tune the floats of a solution; keep that if it lowers held-out losses and still fits."""
    text = probe_text(fitter.view, fitter.data, DISTILL.tokens, fitter.settings.kappa_seed + 1)
    with fitter.clock.step("distillation"):
        model, report = distill(solution.model, fitter.view, text, DISTILL)
    data = pack(model, PackSettings(codec=codec)) if report.kept else solution.data
    if len(data) > limit:
        say(f"distilled floats do not fit: {len(data):,} of {limit:,} bytes; the untuned ones stay")
        return solution, {**report.facts(), "kept": False}
    return replace(solution, model=model, data=data), report.facts()


def _say_build(build: Build) -> None:
    trellis = f", {build.states} states" if build.states else ""
    say(f"c {build.constant:.3e}: {build.num_bytes:,} bytes {'packed' if build.packed else 'predicted'}{trellis}")


def _facts(fitter: Fitter, solution: Solution) -> dict[str, Any]:
    kappa, quantized = fitter.kappa, solution.model.quantized.values()
    predicted = sum(float(tensor.facts["predicted_loss"]) * kappa.get(tensor.name, 1.0) for tensor in quantized)
    return {
        "constant": solution.constant,
        "predicted_nats": predicted,
        "equal_slope_nats": expected_loss(fitter.builder.num_weights, solution.constant),
        "builds": len(solution.builds),
        "train_seconds": dict(fitter.clock.seconds),
    }
