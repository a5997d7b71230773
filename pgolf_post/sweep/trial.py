"""One trial from its settings to its row: quantize → predict → pack → the scoring stages of STAGES.

Each stage runs only if its condition holds; the control, baselines and noise repeats ignore conditions, because the
others are compared with them. Differences are paired with the control's score of the same stage; verdict.py says what
they mean.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgolf_post.checkpoint import Checkpoint, View, run_checkpoints
from pgolf_post.derived import derived_id
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row, Verdict
from pgolf_post.ledger.disk import checkpoint_rows
from pgolf_post.ledger.schema import priced
from pgolf_post.pack.report.size import count
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.paired import pair, t_interval
from pgolf_post.score.session import StoppedError
from pgolf_post.sweep.calibration import calibration_of
from pgolf_post.sweep.conditions import SCORE_FACTS, SIZES, holds
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.quantizers import Request, fit_stage
from pgolf_post.sweep.scores import stage_protocol
from pgolf_post.sweep.settings import SweepSpec
from pgolf_post.sweep.spending import BudgetSpentError
from pgolf_post.sweep.stages import STAGES
from pgolf_post.sweep.training import TrainingStoppedError, run_id
from pgolf_post.sweep.trial_model import TrialModel, unquantized
from pgolf_post.sweep.trials import Trial
from pgolf_post.sweep.verdict import judge, noise_floor
from pgolf_post.sweep.weights import FIELDS as WEIGHT_FIELDS
from pgolf_post.sweep.workbench import Workbench

STOP_FACTS = ("step", "tokens_seen", "train_seconds")


class DroppedError(Exception):
    """A trial that a condition or gate ends before it is packed or scored."""


@dataclass(frozen=True)
class Provenance:
    """Origin of rows: the sweep, code, device and price they are made with."""

    sweep: str
    commit: str | None = None
    device: str | None = None
    dollars_per_hour: float | None = None


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
        """Run the trial. Returns its row, whatever comes of it, and rows of what it was made of; Ctrl-C passes."""
        started = time.perf_counter()
        self.bench.spending.start_trial()
        result: dict[str, Any] = {"attempt": self.attempt} if self.attempt > 1 else {}
        try:
            self._stages(result)
        except StoppedError as error:
            raise KeyboardInterrupt from error
        except BudgetSpentError:
            raise
        except DroppedError as dropped:
            result["dropped"] = str(dropped)
        except TrainingStoppedError as stopped:
            self._stopped_early(stopped, result)
        except PgolfError as error:
            result["error"] = str(error)
        except Exception as error:  # not foreseen: the row keeps what is needed to find out
            result |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
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
        """Return what was asked for: what is changed, and all of it."""
        trial = self.trial
        return {**trial.named(), "question": self.spec.question, "trial": trial.settings.facts()}

    def _stages(self, result: dict[str, Any]) -> None:
        """Run every stage in order; facts go into `result`. Raises DroppedError where a condition or gate ends it."""
        # Weights, before and after quantizing.
        bench, spec, settings = self.bench, self.spec, self.trial.settings
        view = bench.weights.view(settings)
        data = bench.calibration.data(spec, view.checkpoint)
        result["checkpoint_id"] = view.id
        self.parents = (view.id,)
        self.extra_rows = self._run_rows(view.checkpoint)
        reference = unquantized(view)
        model = self._quantized(view, result) if settings.quantize else reference
        result["content_sha256"] = model.content_sha256

        # How they will be scored: what cannot be used is said before any scoring.
        protocols = {
            stage: stage_protocol(spec, stage, settings, view.train_seq_len) for stage in spec.stages.scoring()
        }
        result["protocols"] = {
            stage: derived_id("protocol", 1, [], protocol.model_dump(mode="json"))
            for stage, protocol in protocols.items()
        }

        # Scores, each with its difference from the control's.
        if spec.gates.drop_if_over_budget and self._is_ordinary and result.get("headroom_bytes", 0) < 0:
            raise DroppedError(f"{-result['headroom_bytes']:,} bytes over the budget")
        for stage in spec.stages.scoring():
            if self._wants(stage, result):
                facts, score = bench.scores.score(spec, stage, settings, model, reference, view, data)
                kept = ("bpb", "nats", "tokens", "bytes")
                result[stage] = {key: facts[key] for key in kept} | self._difference(stage, score)
        if spec.deciding_stage in result:
            result["bpb"] = result[str(spec.deciding_stage)]["bpb"]

    def _quantized(self, view: View, result: dict[str, Any]) -> TrialModel:
        """Return the trial's artifact, counted, with rows of what it was made of."""
        request = self.bench.request(self.spec, self.trial.settings, view)
        result["stats_id"] = request.stats.id
        self.parents = (view.id, request.stats.id)
        model = self.bench.artifacts.model(request, lambda predict: self._before_packing(predict, result))
        report = count(Path(model.subject.name), [Path(path) for path in self.spec.code], self.spec.budget_bytes)
        result |= {**model.facts, **report.facts()}
        self.parents = (str(model.facts["artifact_id"]),)
        self.extra_rows = self._lineage(request, model)
        return model

    def _stopped_early(self, stopped: TrainingStoppedError, result: dict[str, Any]) -> None:
        """Put what a stopped training left into `result`. It is an error of what other trials are compared with."""
        if not self._is_ordinary:
            result["error"] = f"{stopped}: other trials are compared with it (leave out [stop] in its recipe)"
            return
        checkpoint = stopped.checkpoint
        view = checkpoint.view_name(None)
        facts, metric = dict(checkpoint.meta["stopped_early"]), checkpoint.meta["views"][view].get("metric") or {}
        self.parents, self.extra_rows = (checkpoint.view_id(view),), self._run_rows(checkpoint)
        result["checkpoint_id"] = self.parents[0]
        result["stopped_early"] = facts.pop("reason")
        result["at_stop"] = facts | {key: checkpoint.meta[key] for key in STOP_FACTS if key in checkpoint.meta}
        result["at_stop"] |= {key: metric[key] for key in ("bpb", "nats", "tokens", "bytes") if key in metric}

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
        condition = self.spec.stages.get(stage).only_if
        if not self._is_ordinary or holds(condition, self._facts(result)):
            return True
        result.setdefault("skipped", {})[stage] = condition
        return False

    def _facts(self, result: Mapping[str, Any]) -> dict[str, float | None]:
        facts: dict[str, float | None] = {"budget_bytes": float(self.spec.budget_bytes)}
        facts |= {name: result.get(name) for name in SIZES if name not in facts}
        for stage in STAGES:
            scored = result.get(stage, {})
            facts |= {f"{stage}_{key}": scored.get(key) for key in SCORE_FACTS}
        return facts

    def _difference(self, stage: str, score: Score) -> dict[str, Any]:
        """Return the paired difference from the control's score of the same stage."""
        if self.control is None:
            return {}
        control = self._control_score(stage)
        by_piece = STAGES[stage].paired_by == "piece"
        clusters = pair(score, control, "piece") if by_piece else paired_documents(score, control)
        facts = t_interval(clusters, self.spec.stages.level).facts()
        return {key: facts[key] for key in ("difference_bpb", "low_bpb", "high_bpb", "clusters", "effective_clusters")}

    def _control_score(self, stage: str) -> Score:
        """Return the control's own sums of a stage, from disk where they are not in memory; no part of this trial."""
        bench, spec, settings = self.bench, self.spec, self.control_trial.settings
        with bench.spending.timed("pair"), bench.spending.unshared():
            view = bench.weights.view(settings)
            model, data = bench.quantized(spec, settings, view), bench.calibration.data(spec, view.checkpoint)
            return bench.scores.score(spec, stage, settings, model, unquantized(view), view, data)[1]

    def _lineage(self, request: Request, model: TrialModel) -> tuple[Row, ...]:
        """Return rows of the weights, statistics and artifact, so that the tree can be drawn."""
        settings, sweep, view, stats = self.trial.settings, self.provenance.sweep, request.view, request.stats
        made = {key: value for key, value in settings.model_dump(mode="json").items() if key in WEIGHT_FIELDS and value}
        checkpoint = view.checkpoint
        source = tuple(part for part in self.bench.weights.source_ids(settings) if part != view.id and ":" not in part)
        if settings.blend:
            source = tuple(part.partition(":")[2] for part in self.bench.weights.source_ids(settings))
        runs: tuple[Row, ...] = ()
        if settings.train:
            source = (f"run:{checkpoint.path.parent.name}",)  # as `ledger scan` calls it
            runs = self.extra_rows
        facts = self.provenance
        where: dict[str, Any] = {"commit": facts.commit, "device": facts.device}
        name, run = f"{checkpoint.path.name} ({view.name})", checkpoint.path.parent.name
        by_plan = {"plan": settings.plan, "set": settings.set}
        by_fit = {"method": "fit", "fit": fit_stage(settings).model_dump(mode="json")}
        quantizing = {**(by_fit if settings.method == "fit" else by_plan), "codec": settings.codec}
        artifact = {key: model.facts[key] for key in ("artifact_bytes", "symbols_sha256")}
        return (
            *runs,
            Row("checkpoint", view.id, source, name, run, made),
            Row(
                "stats", stats.id, (view.id,), "calibration", sweep, calibration_of(settings).model_dump(mode="json"),
                result={"tokens": stats.num_tokens}, **where,
            ),
            Row(
                "artifact", str(model.facts["artifact_id"]), (view.id, stats.id), self.trial.name, sweep,
                quantizing, result=artifact, **where,
            ),
        )  # fmt: skip

    def _run_rows(self, checkpoint: Checkpoint) -> tuple[Row, ...]:
        """Return the rows of a run that was trained for the trial, which its trainer did not write itself."""
        train, facts = self.trial.settings.train, self.provenance
        if train is None:
            return ()
        asked = self.bench.weights.asked.get(run_id(train))
        rows = [row for saved in run_checkpoints(checkpoint) for row in checkpoint_rows(saved)]
        name = asked.title if asked else checkpoint.path.parent.name
        own = {row.id: replace(row, name=name) if row.kind == "run" else row for row in rows}
        return tuple(replace(row, commit=row.commit or facts.commit) for row in own.values())

    # ---- what it means -----------------------------------------------------------------------------------------------

    def _verdict(self, result: dict[str, Any]) -> tuple[Verdict | None, str | None]:
        """Return the verdict and conclusion of a trial; None for what the others are compared with."""
        stage = self.spec.deciding_stage
        floor = noise_floor([row for row in self.noise if "error" not in row.result], stage)
        if self.control is None or self.trial.role == "noise" or "error" in result:
            return None, None
        if "stopped_early" in result:
            return "stopped early", str(result["stopped_early"])
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
