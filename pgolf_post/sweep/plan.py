"""The plan of a sweep, before any work: its trials, what is there already, bytes, seconds and memory.

Bytes are what rows of Gaussian weights would need on each rule's grid: a grid of steps s on weights of deviation σ has
½·log2(2πe·(σ²/s² + 1/12)) bits a weight, which is near what the entropy coder reaches; a fit fills its budget. Seconds
are those of earlier trials on the same weights, or else come from a timed window and from what quantizing and packing
cost per weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pgolf_post.artifacts import ARTIFACT, plan_key
from pgolf_post.base.progress import print_table, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.base.storage import read_json
from pgolf_post.calibrate.memory import plan_memory
from pgolf_post.calibrate.stage import STATS, calibration_text, stats_id_of
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_folders
from pgolf_post.errors import PgolfError
from pgolf_post.families import load_module
from pgolf_post.fit.settings import TUNING_FIELDS, FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.ledger import Row
from pgolf_post.plan import Plan, TensorPlan
from pgolf_post.quantize.clip import grid_steps
from pgolf_post.quantize.gptq.trellis import DIAGONALS
from pgolf_post.quantize.model import plan_view
from pgolf_post.quantize.rounding import spread_steps
from pgolf_post.quantize.rows import as_matrix
from pgolf_post.rules import GridRule
from pgolf_post.sweep.block_rules import trial_plan
from pgolf_post.sweep.calibration import calibration_of
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.quantizers import fit_stage, limit_of
from pgolf_post.sweep.run import Sweep
from pgolf_post.sweep.settings import SweepSpec, TrialSettings
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.state import State
from pgolf_post.sweep.training import run_id
from pgolf_post.sweep.training_price import Measured, TrainingPrice, training_price
from pgolf_post.sweep.trials import Trial

QUANTIZE_SECONDS_PER_WEIGHT = 2.5 / 36e6  # GPTQ with factorizations, one core (docs/results/quantize.md)
PACK_SECONDS_PER_WEIGHT = 4.0 / 36e6  # rans, coded and read back (docs/results/codecs.md)
CALIBRATION_RATIO = 1.6  # of collecting to scoring the same tokens (docs/results/quantize.md)
FIT_SECONDS_PER_WEIGHT = 29 / 36e6  # factors and all builds of a budget (docs/results/fit.md)
LANES_SECONDS_PER_WEIGHT = 242 / 36e6  # down the columns, 64 states; about in proportion to them
STATES_COST = 64
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
    note: str = ""  # what the seconds are of, or why they are not known

    def facts(self) -> dict[str, Any]:
        """The row as JSON."""
        trial = self.listed.trial
        named = {"id": self.listed.id, "name": trial.name, "role": trial.role, "changes": dict(trial.changes)}
        estimates = {"predicted_bytes": self.predicted_bytes, "seconds": self.seconds, "peak_bytes": self.peak_bytes}
        there = {"done": self.done, "cached": list(self.cached)}
        return {**named, **there, **estimates, "problem": self.problem, "note": self.note}


def plan_rows(sweep: Sweep, measure: bool = False) -> list[PlanRow]:
    """Return every trial of a sweep with what it will take. A trial that cannot be run says why.

    With `measure`, the steps of trainings that no earlier run tells of are timed.
    """
    state, rates = sweep.state(), dict[str, float]()
    collected: set[str] = set()  # statistics that an earlier trial of the list will have collected
    rows = []
    timed = Measured(sweep.options.places.results / "recipes") if measure else None
    for listed in state.listed:
        try:
            rows.append(_plan_row(sweep, state, listed, rates, collected, timed))
        except PgolfError as error:
            done = listed.id in state.rows
            rows.append(PlanRow(listed, done, (), None, None, None, str(error)))
    return rows


def show_plan(rows: list[PlanRow], state: State, title: str, dollars_per_hour: float | None = None) -> float:
    """Print the plan as a table; returns the seconds that are known of trials to do."""
    header = ("trial", "what is there", "predicted bytes", "seconds", "peak MiB", "remarks")
    print_table(f"{title}: {state.spec.question}", header, [_cells(row) for row in rows])
    seconds = sum(row.seconds for row in rows if row.seconds is not None and not row.done)
    unknown = [row for row in rows if row.seconds is None and not row.done and not row.problem]
    partly = [row for row in rows if row.listed.trial.settings.train and row not in unknown and not row.done]
    told = f", and {len(unknown)} trials of unknown length" if unknown else ""
    told += f"; of {len(partly)} trials the training alone is counted" if partly else ""
    dollars = f" (${seconds / 3600 * dollars_per_hour:.2f})" if dollars_per_hour is not None else ""
    say(f"{len(state.open)} of {len(rows)} trials to do, about {seconds:.0f} s on one worker{dollars}{told}")
    return seconds


def _cells(row: PlanRow) -> tuple[str, ...]:
    there = "done" if row.done else ", ".join(row.cached)
    numbers = (
        f"{row.predicted_bytes:,}" if row.predicted_bytes is not None else "",
        f"{row.seconds:.1f}" if row.seconds is not None else "" if row.problem else "unknown",
        f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes is not None else "",
    )
    return (row.listed.trial.name, there, *numbers, row.problem or row.note)


def _plan_row(
    sweep: Sweep,
    state: State,
    listed: Listed,
    rates: dict[str, float],
    collected: set[str],
    timed: Measured | None,
) -> PlanRow:
    trial, done, settings = listed.trial, listed.id in state.rows, listed.trial.settings
    if settings.train:
        return _training_row(sweep, listed, done, collected, timed)
    view = sweep.bench.weights.view(settings)
    cached = _cached(sweep, state.spec, trial, view)
    predicted = predicted_bytes(state.spec, settings, view) if settings.quantize else None
    wanted = f"{view.id}:{calibration_of(settings).model_dump_json()}"
    there = ("stats",) if wanted in collected else ()
    seconds = 0.0 if done else _seconds(sweep, state, trial, view, (*cached, *there), rates)
    if settings.quantize:
        collected.add(wanted)
    return PlanRow(listed, done, cached, predicted, seconds, peak_bytes(view, settings))


def _training_row(sweep: Sweep, listed: Listed, done: bool, begun: set[str], timed: Measured | None) -> PlanRow:
    """Return a trial that trains first, at the price of its training; later stages need the weights to be priced."""
    stage = listed.trial.settings.train
    assert stage is not None
    name = run_id(stage)
    price = TrainingPrice(0.0, "an earlier trial of the list trains it")
    if name not in begun:
        runs = sweep.ledger.rows("run")
        price = training_price(stage, sweep.options.places.root, runs, sweep.provenance.device)
        if price.seconds is None and timed is not None:
            price = timed.price(stage)
    begun.add(name)
    cached = ("run",) if price.seconds == 0 else ()
    seconds = 0.0 if done else price.seconds
    return PlanRow(listed, done, cached, None, seconds, None, note=f"training alone: {price.told_by}")


def _cached(sweep: Sweep, spec: SweepSpec, trial: Trial, view: View) -> tuple[str, ...]:
    """Return which of a trial's results are on disk. Text that the model writes itself is not written to find out."""
    if not trial.settings.quantize or trial.settings.calibration.source == "self":
        return ()
    data, settings = sweep.bench.calibration.data(spec, view.checkpoint), calibration_of(trial.settings)
    window = settings.seq_len or view.train_seq_len
    text = calibration_text(view, data, settings, window)
    for wanted in (settings, settings.model_copy(update={"fisher": True})):  # which serve who did not ask for them too
        stats_id = stats_id_of(view, wanted, text, window)
        if (view.checkpoint.derived(STATS.name, stats_id) / "meta.json").is_file():
            there = _is_fitted if trial.settings.method == "fit" else _is_quantized
            return ("stats", "artifact") if there(spec, trial.settings, view, stats_id) else ("stats",)
    return ()


def _is_quantized(spec: SweepSpec, settings: TrialSettings, view: View, stats_id: str) -> bool:
    """Whether there is an artifact by the trial's plan."""
    key = plan_key(view, stats_id, trial_plan(settings), settings.codec, jitter_seed=settings.jitter_seed)
    return (key.folder / ARTIFACT.payload).is_file()


def _is_fitted(spec: SweepSpec, settings: TrialSettings, view: View, stats_id: str) -> bool:
    """Whether there is an artifact of the trial's fit. Its id has κ in it, which are not measured to find out."""
    fit = fit_stage(settings).settings().identity(TUNING_FIELDS)
    wanted = {"stats_id": stats_id, "fit": fit, "artifact_limit": limit_of(spec, settings)}
    wanted |= {"codec": settings.codec, "jitter_seed": settings.jitter_seed or None}
    others = {"distill": fit_stage(settings).distill, "tune": fit_stage(settings).tune_tokens > 0}
    for folder in derived_folders(view.checkpoint.path):
        if folder.parent.name != ARTIFACT.name:
            continue
        config = read_json(folder / "config.json")
        same = all(config.get(key) == value for key, value in wanted.items())
        if same and all((key in config) == given for key, given in others.items()):
            return True
    return False


# ---- bytes -----------------------------------------------------------------------------------------------------------


def predicted_bytes(spec: SweepSpec, settings: TrialSettings, view: View) -> int:
    """Return about what a trial's artifact will take."""
    if settings.method == "fit":
        return limit_of(spec, settings) - WINDOW_BYTES // 2
    return gaussian_bytes(view, trial_plan(settings))


def gaussian_bytes(view: View, plan: Plan) -> int:
    """Return the bytes of an artifact as far as the deviations of the rows tell them."""
    total = float(FIXED_BYTES)
    for entry in plan_view(view, plan):
        tensor, is_grid = view.tensors[entry.name], isinstance(entry.rule, GridRule)
        total += _tensor_bytes(entry, as_matrix(tensor.float())) if is_grid else 2 * tensor.numel()
    return round(total)


def _tensor_bytes(entry: TensorPlan, weight: torch.Tensor) -> float:
    rule = entry.rule
    assert isinstance(rule, GridRule)
    unit_steps = grid_steps(entry.name, weight, rule.without_hessian(), entry.clip, None)
    steps = spread_steps(unit_steps, weight)
    deviation = weight.std(dim=1, keepdim=True, correction=0)
    ratio = (deviation / steps).double().square() + 1 / 12
    bits = (0.5 * torch.log2(2 * np.pi * np.e * ratio)).clamp(min=0.05).expand_as(weight).sum()
    kept = 1 - (rule.prune_share if rule.prune != "none" else 0.0)
    return float(bits) / 8 * kept + 2 * len(unit_steps)


# ---- seconds and memory ----------------------------------------------------------------------------------------------


def _fit_seconds_per_weight(fit: FitSettings) -> float:
    """Return the seconds of a fit, after its statistics, for each weight."""
    if not fit.trellis_states or fit.lane_rows == DIAGONALS:
        return FIT_SECONDS_PER_WEIGHT
    return max(FIT_SECONDS_PER_WEIGHT, LANES_SECONDS_PER_WEIGHT * fit.trellis_states / STATES_COST)


def _seconds(
    sweep: Sweep, state: State, trial: Trial, view: View, cached: tuple[str, ...], rates: dict[str, float]
) -> float:
    """Return a trial's seconds: stage by stage, as earlier trials took them, or as a timed window and constants say."""
    weights, spec = sum(tensor.numel() for tensor in view.tensors.values()), state.spec
    earlier = _earlier(sweep.ledger.rows("trial"), view.id, sweep.provenance.device)
    rate = _cached_rate(rates, view)
    total = 0.0
    if trial.settings.quantize and "stats" not in cached:
        total += rate * CALIBRATION_RATIO * trial.settings.calibration.tokens
    if trial.settings.quantize and "artifact" not in cached:
        if trial.settings.method == "fit":
            total += earlier("fit", _fit_seconds_per_weight(fit_stage(trial.settings)) * weights)
        else:
            total += earlier("quantize", QUANTIZE_SECONDS_PER_WEIGHT * weights)
        total += earlier("pack", PACK_SECONDS_PER_WEIGHT * weights)
    val_tokens = len(sweep.bench.calibration.data(spec, view.checkpoint).tokens("val", None))
    for name in spec.stages.scoring():
        if trial.role != "noise" or name == spec.deciding_stage:
            tokens = spec.stages.get(name).num_tokens(val_tokens)
            total += earlier(name, rate * STAGES[name].passes * tokens)
    return total


def _earlier(rows: list[Row], view_id: str, device: str | None) -> Callable[[str, float], float]:
    """Return the median seconds of a stage in rows of the same weights on the same device, else an estimate."""
    same = [row for row in rows if row.result.get("checkpoint_id") == view_id and row.device == device]

    def median(stage: str, otherwise: float) -> float:
        spent = [row.result.get("stage_seconds", {}).get(stage) for row in same]
        made = [
            seconds for row, seconds in zip(same, spent, strict=True) if seconds and stage not in row.result["shared"]
        ]
        return statistics.median(made) if made else otherwise

    return median


def _cached_rate(rates: dict[str, float], view: View) -> float:
    """Return the seconds per token of a forward pass, from one timed window after a warm one; once per config."""
    key = str(view.config["model"])
    if key not in rates:
        device = ALONE.device
        module: Any = load_module(view.config, view.tensors, str(view)).to(device)
        length = view.train_seq_len
        tokens = torch.full((1, length), 2, device=device)
        with torch.no_grad():
            for _ in range(2):
                started = time.perf_counter()
                module.logits(module.hidden(tokens).flatten(0, 1))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                rates[key] = (time.perf_counter() - started) / length
    return rates[key]


def peak_bytes(view: View, settings: TrialSettings) -> int:
    """Return a trial's memory at its peak: copies of the weights, and calibration's sums with their factors beside."""
    weights = 4 * sum(tensor.numel() for tensor in view.tensors.values())
    if not settings.quantize:
        return 3 * weights
    fisher = calibration_of(settings).fisher
    # A backward pass's memory is estimated by a short forward pass, which the meta-module cannot run.
    module = load_module(view.config, view.tensors, str(view)) if fisher else view.module
    lookups = view.family.lookups(module) if fisher else []
    length = view.train_seq_len
    plan = plan_memory(module, view.family.sites(module), lookups, length, length, fisher)
    return WEIGHT_COPIES * weights + 2 * plan.sums_bytes + plan.activation_bytes
