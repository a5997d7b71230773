"""What a sweep will do, before any work: trials, what is there already, bytes, seconds and memory.

Bytes are what rows of Gaussian weights would need on each rule's grid: a grid of steps s on weights of deviation σ has
½·log2(2πe·(σ²/s² + 1/12)) bits a weight, which is near what the entropy coder reaches. Seconds are those of earlier
trials on the same weights, or else come from a timed window and from what quantizing and packing cost per weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pgolf_post import artifacts as requant
from pgolf_post.calibrate.memory import plan_memory
from pgolf_post.calibrate.stage import calibration_text, stats_id_of
from pgolf_post.checkpoint import View
from pgolf_post.errors import PgolfError
from pgolf_post.families import load_module
from pgolf_post.ledger import Row
from pgolf_post.plan import GridRule, Plan, TensorPlan
from pgolf_post.quantize.clip import grid_scales
from pgolf_post.quantize.model import plan_view
from pgolf_post.quantize.rows import as_matrix, spread_scales
from pgolf_post.sweep.artifacts import artifact_folder
from pgolf_post.sweep.run import State, Sweep
from pgolf_post.sweep.settings import SweepSpec, Trial, trial_plan
from pgolf_post.sweep.trial import Listed

QUANTIZE_SECONDS_PER_WEIGHT = 2.5 / 36e6  # GPTQ with factorizations, one core (docs/BENCHMARKS.md, Quantizing)
PACK_SECONDS_PER_WEIGHT = 4.0 / 36e6  # rans, coded and read back (docs/BENCHMARKS.md, Codecs)
CALIBRATION_RATIO = 1.6  # of collecting to scoring the same tokens (docs/BENCHMARKS.md, Calibration)
TTT_RATIO = 30.0  # of test-time training to plain scoring, order of magnitude
FIXED_BYTES = 2000  # manifest, tables and frames
WEIGHT_COPIES = 6  # view, module, stretched, rounded, symbols with steps, decoded: float32 each at most


@dataclass(frozen=True)
class PlanRow:
    """One trial, not yet run."""

    listed: Listed
    done: bool
    cached: tuple[str, ...]  # of stats, artifact
    predicted_bytes: int | None
    seconds: float | None
    peak_bytes: int | None
    problem: str = ""

    def facts(self) -> dict[str, Any]:
        trial = self.listed.trial
        named = {"id": self.listed.id, "name": trial.name, "role": trial.role, "changes": dict(trial.changes)}
        estimates = {"predicted_bytes": self.predicted_bytes, "seconds": self.seconds, "peak_bytes": self.peak_bytes}
        return {**named, "done": self.done, "cached": list(self.cached), **estimates, "problem": self.problem}


def plan_rows(sweep: Sweep) -> list[PlanRow]:
    """Every trial of a sweep with what it will take. A trial that cannot be run says why."""
    state, rates = sweep.state(), dict[str, float]()
    collected: set[str] = set()  # statistics that an earlier trial of the list will have collected
    found = []
    for listed in state.listed:
        try:
            found.append(_plan_row(sweep, state, listed, rates, collected))
        except PgolfError as error:
            done = listed.id in state.rows
            found.append(PlanRow(listed, done, (), None, None, None, str(error)))
    return found


def _plan_row(sweep: Sweep, state: State, listed: Listed, rates: dict[str, float], collected: set[str]) -> PlanRow:
    trial, done = listed.trial, listed.id in state.rows
    if trial.settings.train:
        return PlanRow(listed, done, (), None, trial.settings.train.seconds, None)
    view = sweep.bench.weights.view(trial.settings)
    cached = _cached(sweep, state.spec, trial, view)
    predicted = gaussian_bytes(view, trial_plan(trial.settings)) if trial.settings.quantize else None
    wanted = f"{view.id}:{trial.settings.calibration.model_dump_json()}"
    there = ("stats",) if wanted in collected else ()
    seconds = 0.0 if done else _seconds(sweep, state, trial, view, (*cached, *there), rates)
    if trial.settings.quantize:
        collected.add(wanted)
    return PlanRow(listed, done, cached, predicted, seconds, peak_bytes(view, trial.settings.quantize))


def _cached(sweep: Sweep, spec: SweepSpec, trial: Trial, view: View) -> tuple[str, ...]:
    """Which of a trial's results are on disk. Text that the model would write itself is not written to find out."""
    if not trial.settings.quantize or trial.settings.calibration.source == "self":
        return ()
    data, settings = sweep.bench.calibration.data(spec, view.checkpoint), trial.settings.calibration
    window = settings.seq_len or view.train_seq_len
    text = calibration_text(view, data, settings, window)
    for wanted in (settings, settings.model_copy(update={"fisher": True})):  # which serve who did not ask for them too
        stats_id = stats_id_of(view, wanted, text, window)
        if (view.checkpoint.derived("stats", stats_id) / "meta.json").is_file():
            folder, _ = artifact_folder(view, stats_id, trial.settings)
            return ("stats", "artifact") if (folder / requant.PAYLOAD).is_file() else ("stats",)
    return ()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def gaussian_bytes(view: View, plan: Plan) -> int:
    """Bytes of an artifact as far as the deviations of the rows tell them."""
    total = float(FIXED_BYTES)
    for row in plan_view(view, plan):
        tensor = view.tensors[row.name]
        total += _tensor_bytes(row, as_matrix(tensor.float())) if isinstance(row.rule, GridRule) else 2 * tensor.numel()
    return round(total)


def _tensor_bytes(row: TensorPlan, weight: torch.Tensor) -> float:
    rule = row.rule
    assert isinstance(rule, GridRule)
    plain = "percentile" if rule.scale == "percentile-hessian" else rule.scale
    rule = rule.model_copy(update={"hessian_lambda": 0.0, "scale": plain})
    scales = grid_scales(row.name, weight, rule, row.clip, None)
    steps = spread_scales(scales, weight)
    deviation = weight.std(dim=1, keepdim=True, correction=0)
    ratio = (deviation / steps).double().square() + 1 / 12
    bits = (0.5 * torch.log2(2 * np.pi * np.e * ratio)).clamp(min=0.05).expand_as(weight).sum()
    kept = 1 - (rule.prune_share if rule.prune != "none" else 0.0)
    return float(bits) / 8 * kept + 2 * len(scales)


# ---- seconds and memory ----------------------------------------------------------------------------------------------


def _seconds(
    sweep: Sweep, state: State, trial: Trial, view: View, cached: tuple[str, ...], rates: dict[str, float]
) -> float:
    """What a trial will take: stage by stage, as earlier trials did, or as a timed window and constants say."""
    weights, spec = sum(tensor.numel() for tensor in view.tensors.values()), state.spec
    earlier = _earlier(sweep.ledger.rows("trial"), view.id, sweep.provenance.device)
    rate = _cached_rate(rates, view)
    total = 0.0
    if trial.settings.quantize and "stats" not in cached:
        total += rate * CALIBRATION_RATIO * trial.settings.calibration.tokens
    if trial.settings.quantize and "artifact" not in cached:
        total += earlier("quantize", QUANTIZE_SECONDS_PER_WEIGHT * weights)
        total += earlier("pack", PACK_SECONDS_PER_WEIGHT * weights)
    if spec.stages.screen:
        total += earlier("screen", rate * spec.stages.screen.tokens)
    if spec.stages.expected:
        total += earlier("expected", 2 * rate * spec.stages.expected.tokens)
    data = sweep.bench.calibration.data(spec, view.checkpoint)
    for name, ratio in (("plain", 1.0), ("sliding", 8.0), ("ttt", TTT_RATIO)):
        stage: Any = getattr(spec.stages, name)
        if stage is not None and (trial.role != "noise" or name == spec.deciding_stage):
            tokens = stage.max_tokens or len(data.tokens("val", None))
            total += earlier(name, rate * ratio * tokens)
    return total


def _earlier(rows: list[Row], view_id: str, device: str | None) -> Callable[[str, float], float]:
    """The median seconds of a stage in rows of the same weights on the same device, else an estimate."""
    same = [row for row in rows if row.result.get("checkpoint_id") == view_id and row.device == device]

    def median(stage: str, otherwise: float) -> float:
        spent = [row.result.get("stage_seconds", {}).get(stage) for row in same]
        found = [
            seconds for row, seconds in zip(same, spent, strict=True) if seconds and stage not in row.result["shared"]
        ]
        return statistics.median(found) if found else otherwise

    return median


def _cached_rate(rates: dict[str, float], view: View) -> float:
    """Seconds per token of a forward pass, from one timed window after a warm one; measured once per config."""
    key = str(view.config["model"])
    if key not in rates:
        module: Any = load_module(view.config, view.tensors, str(view))
        length = view.train_seq_len
        tokens = torch.full((1, length), 2)
        with torch.no_grad():
            for _ in range(2):
                started = time.perf_counter()
                module.logits(module.hidden(tokens).flatten(0, 1))
                rates[key] = (time.perf_counter() - started) / length
    return rates[key]


def peak_bytes(view: View, quantize: bool) -> int:
    """Memory at a trial's peak: copies of the weights, and the sums of calibration with their factors beside them."""
    weights = 4 * sum(tensor.numel() for tensor in view.tensors.values())
    if not quantize:
        return 3 * weights
    length = view.train_seq_len
    plan = plan_memory(view.module, view.family.sites(view.module), [], length, length, False)
    return WEIGHT_COPIES * weights + 2 * plan.sums_bytes + plan.activation_bytes
