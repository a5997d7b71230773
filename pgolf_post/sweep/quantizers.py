"""Two ways to quantize a trial's weights: by a plan, as `requant` does it, or to a byte budget, as `fit` does it.

Either says under which key the artifact is looked up, and how its model is made where it is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pgolf_post.artifacts import ArtifactKey, plan_key
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.fit.artifact import artifact_limit, fit_key, fitted, partial_of
from pgolf_post.fit.build import Builder
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.pack.report.size import count_code
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.settings import parse_settings
from pgolf_post.sweep.block_rules import trial_plan
from pgolf_post.sweep.claims import claim
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.recent import Recent
from pgolf_post.sweep.settings import FitStage, SweepSpec, TrialSettings
from pgolf_post.sweep.spending import Spending
from pgolf_post.sweep.weights import jittered


@dataclass(frozen=True)
class Request:
    """A trial's weights and statistics, to be quantized."""

    spec: SweepSpec
    settings: TrialSettings
    view: View
    stats: Stats
    data: DataFolder


@dataclass(frozen=True)
class Made:
    """A quantized model before it is packed."""

    model: QuantizedModel
    packed: Callable[[], bytes]  # its file
    facts: Mapping[str, Any] = field(default_factory=dict)  # more for meta.json
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds by phase


class Quantizer(Protocol):
    """One way to quantize."""

    seconds: ClassVar[str]  # the name of what it takes among a trial's seconds

    def key(self, request: Request) -> ArtifactKey:
        """Return what decides the artifact."""

    def make(self, request: Request) -> Made:
        """Quantize."""


@dataclass(frozen=True)
class ByPlan:
    """Quantizing by the trial's plan."""

    factors: Callable[[Stats], StatsFactors]  # shared by trials with the same statistics
    seconds: ClassVar[str] = "quantize"

    def key(self, request: Request) -> ArtifactKey:
        settings = request.settings
        plan = trial_plan(settings)
        return plan_key(request.view, request.stats.id, plan, settings.codec, jitter_seed=settings.jitter_seed)

    def make(self, request: Request) -> Made:
        settings, stats = request.settings, request.stats
        view = jittered(request.view, settings.jitter_seed)
        factors, started = self.factors(stats), time.perf_counter()
        model = quantize_view(view, stats, trial_plan(settings), factors)
        phases = {"quantize": time.perf_counter() - started}
        packing = parse_settings(PackSettings, {"codec": settings.codec}, "sweep")
        return Made(model, lambda: pack(model, packing), phases=phases)


class ByFit:
    """Quantizing to the trial's byte budget. κ, which is part of the key, is measured once for all budgets."""

    seconds: ClassVar[str] = "fit"

    def __init__(self, places: Places, spending: Spending) -> None:
        self.places, self.spending = places, spending
        self._fitters = Recent[Fitter](1)  # one holds every matrix's factorized Hessian

    def key(self, request: Request) -> ArtifactKey:
        settings, limit = request.settings, limit_of(request.spec, request.settings)
        return fit_key(self._fitter(request), limit, settings.codec, settings.jitter_seed)

    def make(self, request: Request) -> Made:
        settings, fitter = request.settings, self._fitter(request)
        if settings.jitter_seed:  # κ and text are those of the weights as they are
            view = jittered(request.view, settings.jitter_seed)
            fitter = replace(fitter, view=view, builder=Builder(view, fitter.stats, fitter.settings))
        partial = partial_of(self.key(request))
        limit = limit_of(request.spec, settings)
        solution, facts, phases = fitted(fitter, limit, settings.codec, partial)
        partial.remove()
        return Made(solution.model, lambda: solution.data, facts, phases)

    def _fitter(self, request: Request) -> Fitter:
        view, stats = request.view, request.stats
        wanted = fit_stage(request.settings).settings()
        key = f"{view.id}:{stats.id}:{request.data.manifest_sha256}:{wanted.model_dump_json()}"
        if key in self._fitters:
            return self._fitters[key]
        clock = TrainingClock()
        clock.add("statistics", stats.seconds)
        # κ of one set of weights is measured by one process while others wait.
        with self.spending.timed("fit"), claim(self.places.locks, f"kappa-{view.id}", wait=True):
            fitter = prepare(view, request.data, request.settings.calibration, wanted, clock, stats=stats)
        return self._fitters.keep(key, fitter)


def fit_stage(settings: TrialSettings) -> FitStage:
    """Return a trial's settings of its fit."""
    return settings.fit or FitStage()


def limit_of(spec: SweepSpec, settings: TrialSettings) -> int:
    """Return the bytes that a fitted artifact may have: its budget less the counted code. Raises SettingsError."""
    budget = fit_stage(settings).budget
    total = spec.budget_bytes if budget is None else budget
    return artifact_limit(total, count_code([Path(path) for path in spec.code]))


def identity(spec: SweepSpec, settings: TrialSettings) -> dict[str, Any]:
    """Return what a trial's id says of how it is quantized."""
    if settings.method == "plan":
        return trial_plan(settings).identity()
    fit = fit_stage(settings).settings().identity()
    return {"method": "fit", "fit": fit, "artifact_limit": limit_of(spec, settings)}
