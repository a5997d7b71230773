"""One trial from its settings to its row: quantize → predict → pack → screen → plain → sliding → test-time training.

Each stage runs only if its condition holds; the control, baselines and noise repeats ignore conditions, because the
others are compared with them. Differences are paired with the control's score of the same stage; what they mean is
verdict.py's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.derived import derived_id
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row, Verdict
from pgolf_post.ledger.schema import priced
from pgolf_post.pack.report.size import count
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.paired import pair, t_interval
from pgolf_post.score.session import StoppedError
from pgolf_post.sweep.artifacts import Quantized, unquantized
from pgolf_post.sweep.conditions import holds
from pgolf_post.sweep.scores import stage_protocol
from pgolf_post.sweep.settings import DRAWN, SCORING, SweepSpec, Trial, trial_plan
from pgolf_post.sweep.training import recipe_tree
from pgolf_post.sweep.verdict import judge, noise_floor
from pgolf_post.sweep.weights import FIELDS as WEIGHT_FIELDS
from pgolf_post.sweep.workbench import VERSIONS, Workbench

TRIAL_VERSION = 2


class DroppedError(Exception):
    """A trial that a condition or gate ends before it is packed or scored."""


@dataclass(frozen=True)
class Listed:
    """A trial and the id that its row has, or will have."""

    trial: Trial
    id: str
    control_id: str


@dataclass(frozen=True)
class Provenance:
    """What every row says beside its result."""

    sweep: str
    commit: str | None = None
    device: str | None = None
    dollars_per_hour: float | None = None


def trial_id(bench: Workbench, spec: SweepSpec, trial: Trial, control_id: str) -> str:
    """What a trial's row is found by: the ids of what its weights are made of, and every setting that acts."""
    settings = trial.settings
    data = None if settings.train else bench.calibration.data(spec, bench.weights.checkpoint(settings))
    identity = {
        "calibration": settings.calibration.model_dump(mode="json"),
        "weights": settings.model_dump(mode="json", include={"blend", "ema", "quantize", "jitter_seed"}),
        "plan": trial_plan(settings).identity(),
        "codec": settings.codec,
        "ttt": settings.ttt,
        "stages": spec.stages.model_dump(mode="json"),
        "deciding": [spec.ranking, spec.noise_repeats if trial.role != "noise" else 0],
        "budget": [spec.budget_bytes, list(spec.code), spec.gates.drop_if_over_budget],
        "role": trial.role,
        "control": control_id,
        "versions": VERSIONS,
        **({"data": data.manifest_sha256} if data else {}),
    }
    return derived_id("trial", TRIAL_VERSION, bench.weights.source_ids(settings), identity)


def list_trials(bench: Workbench, spec: SweepSpec, trials: Sequence[Trial]) -> list[Listed]:
    """Trials with their ids. One that cannot even be named is given an id of its error, so that it can have a row."""
    listed, controls = [], dict[str, str]()
    for trial in trials:
        control_id = controls.get(trial.group, "")
        try:
            found = trial_id(bench, spec, trial, control_id)
        except PgolfError as error:
            if trial.role == "control":
                raise
            settings = trial.settings.model_dump(mode="json")
            found = derived_id("trial", TRIAL_VERSION, [control_id], {"settings": settings, "error": str(error)})
        if trial.role == "control":
            controls[trial.group] = control_id = found
        listed.append(Listed(trial, found, control_id))
    return listed


# ---- running one -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trial that is being run, and what it is compared with."""

    bench: Workbench
    spec: SweepSpec
    listed: Listed
    control: Row | None  # None for the control itself
    control_trial: Trial
    noise: Sequence[Row]
    provenance: Provenance
    parents: tuple[str, ...] = ()
    extra_rows: tuple[Row, ...] = ()
    attempt: int = 1

    @property
    def trial(self) -> Trial:
        return self.listed.trial

    def row(self) -> tuple[Row, tuple[Row, ...]]:
        """The trial's row, whatever comes of it, and rows of what it was made of. Ctrl-C is not an outcome."""
        started = time.perf_counter()
        self.bench.spending.start_trial()
        result: dict[str, Any] = {"attempt": self.attempt} if self.attempt > 1 else {}
        try:
            self._stages(result)
        except StoppedError as error:
            raise KeyboardInterrupt from error
        except DroppedError as dropped:
            result["dropped"] = str(dropped)
        except Exception as error:
            result["error"] = _said(error)
        verdict, conclusion = self._verdict(result)
        seconds = round(time.perf_counter() - started, 3)
        result["stage_seconds"] = {stage: round(spent, 3) for stage, spent in self.bench.spending.seconds.items()}
        result["shared"] = list(dict.fromkeys(self.bench.spending.shared))
        facts = self.provenance
        row = Row(
            "trial", self.listed.id, self.parents, self.trial.name, facts.sweep, self._settings(), "", result,
            facts.commit, facts.device, seconds, None, verdict, conclusion,
        )  # fmt: skip
        return priced(row, facts.dollars_per_hour), self.extra_rows

    def _settings(self) -> dict[str, Any]:
        """What was asked for: what is changed, and all of it."""
        trial = self.trial
        named = {"role": trial.role, "changes": dict(trial.changes), "axis": trial.axis, "group": trial.group}
        return {**named, "question": self.spec.question, "trial": trial.settings.model_dump(mode="json")}

    def _stages(self, result: dict[str, Any]) -> None:
        """Every stage in order, its facts into `result`. Raises DroppedError where a condition or gate ends it."""
        bench, spec, settings = self.bench, self.spec, self.trial.settings
        view = bench.weights.view(settings)
        data = bench.calibration.data(spec, view.checkpoint)
        result["checkpoint_id"] = view.id
        self.parents = (view.id,)
        weights = unquantized(view)
        quantized = self._quantized(view, result) if settings.quantize else weights
        result["content_sha256"] = quantized.content_sha256
        protocols = {stage: stage_protocol(spec, stage, settings, view.config) for stage in spec.stages.scoring()}
        result["protocols"] = {
            stage: derived_id("protocol", 1, [], protocol.model_dump(mode="json"))
            for stage, protocol in protocols.items()
        }
        if spec.gates.drop_if_over_budget and self._is_ordinary and result.get("headroom_bytes", 0) < 0:
            raise DroppedError(f"{-result['headroom_bytes']:,} bytes over the budget")
        for stage in spec.stages.scoring():
            if self._wants(stage, result):
                facts, score = bench.scores.score(spec, stage, settings, quantized, weights, data)
                kept = ("bpb", "nats", "tokens", "bytes")
                result[stage] = {key: facts[key] for key in kept} | self._difference(stage, score)
        if spec.deciding_stage in result:
            result["bpb"] = result[str(spec.deciding_stage)]["bpb"]

    def _quantized(self, view: View, result: dict[str, Any]) -> Quantized:
        """The trial's artifact, counted, with rows of what it was made of."""
        bench, settings = self.bench, self.trial.settings
        stats = bench.calibration.stats(self.spec, settings, view)
        result["stats_id"] = stats.id
        self.parents = (view.id, stats.id)
        made = bench.artifacts.quantized(view, stats, settings, lambda predict: self._before_packing(predict, result))
        report = count(Path(made.subject.name), [Path(path) for path in self.spec.code], self.spec.budget_bytes)
        result |= {**made.facts, **report.facts()}
        self.parents = (str(made.facts["artifact_id"]),)
        self.extra_rows = self._lineage(view, stats, made)
        return made

    @property
    def _is_ordinary(self) -> bool:
        """Whether conditions and gates are for it; controls, baselines and noise repeats ignore them."""
        return self.trial.role == "trial"

    def _before_packing(self, predict: Callable[[], int], result: dict[str, Any]) -> None:
        stage, pack = self.spec.stages.predict, self.spec.stages.pack
        if stage is not None:
            result["predicted_bytes"] = predict()
            over = result["predicted_bytes"] - self.spec.budget_bytes
            if self.spec.gates.drop_if_over_budget and self._is_ordinary and over > 0.02 * self.spec.budget_bytes:
                raise DroppedError(f"predicted {over:,} bytes over the budget")
        if self._is_ordinary and not holds(pack.only_if, self._facts(result)):
            raise DroppedError(f"not packed: {pack.only_if}")

    def _wants(self, stage: str, result: dict[str, Any]) -> bool:
        if self.trial.role == "noise":
            return stage == self.spec.deciding_stage
        condition = getattr(self.spec.stages, stage).only_if
        if not self._is_ordinary or holds(condition, self._facts(result)):
            return True
        result.setdefault("skipped", {})[stage] = condition
        return False

    def _facts(self, result: Mapping[str, Any]) -> dict[str, float | None]:
        facts: dict[str, float | None] = {"budget_bytes": float(self.spec.budget_bytes)}
        for name in ("predicted_bytes", "artifact_bytes", "total_bytes", "headroom_bytes"):
            facts[name] = result.get(name)
        for stage in SCORING:
            found = result.get(stage, {})
            facts |= {f"{stage}_{key}": found.get(key) for key in ("bpb", "difference_bpb", "low_bpb", "high_bpb")}
        return facts

    def _difference(self, stage: str, score: Score) -> dict[str, Any]:
        """The paired difference from the control's score of the same stage."""
        if self.control is None:
            return {}
        control = self._control_score(stage)
        clusters = pair(score, control, "piece") if stage in DRAWN else paired_documents(score, control)
        facts = t_interval(clusters, self.spec.stages.level).facts()
        return {key: facts[key] for key in ("difference_bpb", "low_bpb", "high_bpb", "clusters", "effective_clusters")}

    def _control_score(self, stage: str) -> Score:
        """The control's own sums of a stage, from the disk where they are not in memory; no part of this trial."""
        bench, spec, settings = self.bench, self.spec, self.control_trial.settings
        with bench.spending.timed("pair"), bench.spending.unshared():
            view = bench.weights.view(settings)
            quantized = bench.artifacts.quantized(view, bench.calibration.stats(spec, settings, view), settings)
            data = bench.calibration.data(spec, view.checkpoint)
            return bench.scores.score(spec, stage, settings, quantized, unquantized(view), data)[1]

    def _lineage(self, view: View, stats: Stats, quantized: Quantized) -> tuple[Row, ...]:
        """Rows of the weights, statistics and artifact, so that the tree can be drawn."""
        settings, sweep = self.trial.settings, self.provenance.sweep
        made = {key: value for key, value in settings.model_dump(mode="json").items() if key in WEIGHT_FIELDS and value}
        checkpoint = view.checkpoint
        source = tuple(part for part in self.bench.weights.source_ids(settings) if part != view.id and ":" not in part)
        if settings.blend:
            source = tuple(part.partition(":")[2] for part in self.bench.weights.source_ids(settings))
        runs: tuple[Row, ...] = ()
        if settings.train:
            source = (f"run:{checkpoint.path.parent.name}",)  # as `ledger scan` calls it
            recipe = recipe_tree(settings.train)
            runs = (Row("run", source[0], (), Path(settings.train.recipe).stem, checkpoint.path.parent.name, recipe),)
        facts = self.provenance
        where: dict[str, Any] = {"commit": facts.commit, "device": facts.device}
        name, run = f"{checkpoint.path.name} ({view.name})", checkpoint.path.parent.name
        artifact = {key: quantized.facts[key] for key in ("artifact_bytes", "symbols_sha256")}
        return (
            *runs,
            Row("checkpoint", view.id, source, name, run, made),
            Row(
                "stats", stats.id, (view.id,), "calibration", sweep, settings.calibration.model_dump(mode="json"),
                result={"tokens": stats.num_tokens}, **where,
            ),
            Row(
                "artifact", str(quantized.facts["artifact_id"]), (view.id, stats.id), self.trial.name, sweep,
                {"plan": settings.plan, "set": settings.set, "codec": settings.codec}, result=artifact, **where,
            ),
        )  # fmt: skip

    # ---- what it means -----------------------------------------------------------------------------------------------

    def _verdict(self, result: dict[str, Any]) -> tuple[Verdict | None, str | None]:
        """(verdict, conclusion) of a trial; None for what the others are compared with."""
        stage = self.spec.deciding_stage
        floor = noise_floor([row for row in self.noise if "error" not in row.result], stage)
        if self.control is None or self.trial.role == "noise" or "error" in result:
            return None, None
        same = ("content_sha256", "protocols", "artifact_bytes")
        if all(result.get(key) == self.control.result.get(key) for key in same):
            result["no_op"] = True
            return "no-op", "NO-OP: the very artifact of the control"
        if self.trial.role == "baseline" or "dropped" in result:
            return None, None
        if stage is not None and stage not in result:
            return None, f"dropped before {stage}"
        if floor is not None:
            result["noise_floor_bpb"] = floor
        return judge(self.spec, result, self.control.result, floor)


def _said(error: Exception) -> str:
    """An error for a row: ours as they are, others with their kind."""
    return str(error) if isinstance(error, PgolfError) else f"{type(error).__name__}: {error}"
