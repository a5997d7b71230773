"""The training loop: step until the schedule says the run is over, leave a checkpoint at every phase boundary.

The clock that drives the schedule counts optimizer steps only; scoring and writing checkpoints are excluded, and the
ledger in meta.json says what they took (`train_seconds` against `wall_seconds`). A loss that is not finite ends the run
at once, with the last checkpoint intact.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.checkpoint import (
    TRAINING_FILE,
    Checkpoint,
    ViewName,
    complete_config,
    point_latest,
    read_tensors,
    save_checkpoint,
)
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.progress import progress_bar, say
from pgolf_post.score.metric import measure_module
from pgolf_post.score.plain import PlainProtocol
from trainer.architecture import GraphState
from trainer.batches import WindowSampler
from trainer.config import Precision, Recipe
from trainer.distributed import ALONE, Ranks
from trainer.ledger import LEDGER_FILE, Ledger, show_ledger, write_ledger
from trainer.log import LOG_FILE, StepClock, append_line, end_torn_line, step_line
from trainer.model import GolfGPT
from trainer.optim import EMA, Optimizer, RunningMean
from trainer.phases import PhaseTracker
from trainer.provenance import provenance
from trainer.reserve import Reserve, measure_reserve, resumed_reserve
from trainer.schedule import active_loops_at, lr_multiplier, progress, weight_decay_multiplier


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast dtype: bf16 where asked for or, for "auto", where the processor multiplies it natively."""
    if precision in ("fp32", "fp64"):
        return None
    if precision == "bf16" or device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def micro_batch_tokens(recipe: Recipe, world_size: int) -> int:
    """Tokens of one backward pass on one rank. Raises SettingsError if ranks cannot share a step's batch equally."""
    data = recipe.data
    tokens = data.micro_batch_tokens or data.batch_tokens // world_size
    if tokens % data.seq_len or data.batch_tokens % (tokens * world_size):
        raise SettingsError(
            f"data.batch_tokens {data.batch_tokens} cannot be shared by {world_size} ranks in micro-batches of "
            f"{tokens} tokens of whole sequences of {data.seq_len}",
            hint="change data.micro_batch_tokens or the number of processes",
        )
    return tokens


class Trainer:
    """One run: the model, its optimizer, its data order and its clock."""

    def __init__(self, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        self.recipe, self.ranks, self.ledger = recipe, ranks, Ledger()
        self.micro_tokens = micro_batch_tokens(recipe, ranks.world_size)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self.device = ranks.device
        self.dtype = autocast_dtype(recipe.run.precision, self.device)
        self.data = DataFolder.open(recipe.data.dir)
        self.sampler = WindowSampler(self.data, recipe.data.seq_len, recipe.run.seed)
        torch.manual_seed(recipe.run.seed)
        self.model = GolfGPT(recipe.model_config_for(self.data.vocab_size), GraphState())
        self.model.initialise()
        self.model.to(self.device, torch.float64 if recipe.run.precision == "fp64" else torch.float32)
        self.optimizer = Optimizer(self.model, recipe.optim, ranks)
        self.provenance = {**provenance(self.device), "world_size": ranks.world_size}
        optim = recipe.optim
        self.ema = EMA(self.model, optim.ema_decay, optim.ema_every) if optim.ema_decay else None
        self.swa = RunningMean(self.model, optim.swa_every) if optim.swa_start is not None else None
        self.phases = PhaseTracker.from_recipe(recipe)
        self.run_dir = recipe.run.checkpoint_root / recipe.run.name
        self.step = 0
        self.train_seconds = 0.0
        self.clock = StepClock(recipe.data.batch_tokens, self.train_seconds)
        self.started = self.ledger.started
        self.earlier_wall_seconds = 0.0  # of the processes that this one resumes
        self.parents: list[str] = []
        self.reserve: Reserve | None = None  # under a cap, settled before the first step
        self.ledger.add("load", time.perf_counter() - self.started)

    @property
    def progress(self) -> float:
        reserve_seconds = self.reserve.seconds if self.reserve else 0.0
        return progress(self.recipe.schedule, self.step, self.train_seconds, reserve_seconds)

    @property
    def wall_seconds(self) -> float:
        return round(self.earlier_wall_seconds + time.perf_counter() - self.started, 3)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    # ---- running -----------------------------------------------------------------------------------------------

    def run(self) -> Checkpoint:
        """Train to the end. Returns the final checkpoint. Raises NumericsError if the loss stops being finite."""
        if self.ranks.is_main:
            self._make_run_dir()
        self.ranks.wait()
        self._settle_reserve()
        loss = math.nan
        with progress_bar(f"training {self.recipe.run.name}", 1000) as advance:
            shown = 0
            while (at := self.progress) < 1.0:
                self.update_graph(at)
                if phase := self.phases.due(self.step, at):
                    self.save(phase)
                loss, norm = self.timed_step(at)
                if self.ranks.is_main:
                    self._log(loss, norm, at)
                self.clock.require(self.recipe.run.min_tokens_per_second)
                permille = int(1000 * self.progress)
                advance(permille - shown, note=f"step {self.step} loss {loss:.4f}")
                shown = permille
        self.update_graph(1.0)
        final = self.save("final")
        self._close_ledger()
        self._say_summary(loss, final)
        return final

    def _settle_reserve(self) -> None:
        """Before the clock starts: what a cap must leave free. A resumed run keeps what it began with."""
        with self.ledger.phase("warm_up"):
            self.reserve = self.reserve or measure_reserve(self)
        if self.reserve:
            say(f"cap {self.recipe.schedule.seconds:g} s: {self.reserve}")

    def _close_ledger(self) -> None:
        """Show where the time went and leave it in the run's folder."""
        if self.ranks.is_main:
            facts = self.ledger.as_facts(self.recipe.schedule.seconds)
            write_ledger(self.run_dir / LEDGER_FILE, facts)
            show_ledger(facts)

    def _make_run_dir(self) -> None:
        """The run's folder, with a log that can be appended to. Raises PgolfError if it is taken or cannot be made."""
        self._refuse_taken_run()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PgolfError(
                f"could not make the run's folder {self.run_dir}: {error}",
                hint="choose another place with --set run.checkpoint_root=FOLDER",
            ) from error
        end_torn_line(self.run_dir / LOG_FILE)

    def _refuse_taken_run(self) -> None:
        """Raise PgolfError if this run would come upon checkpoints that it did not write."""
        saved = sorted(self.run_dir.glob("step_*"))
        if saved and not self.parents:
            raise PgolfError(
                f"{self.run_dir} already holds checkpoints; a run never overwrites another",
                hint=f"choose another name with --set run.name=NAME, or continue it with --resume {saved[-1]}",
            )
        later = [path for path in saved if int(path.name.removeprefix("step_").split("-")[0]) > self.step]
        if later:
            raise PgolfError(
                f"{self.run_dir} holds checkpoints later than step {self.step}, such as {later[-1].name}; "
                "a run never overwrites another",
                hint=f"--resume {later[-1]}, or branch off under another name with --set run.name=NAME",
            )

    def update_graph(self, at: float) -> None:
        """Switch depth recurrence on, in one phase or two, once its share of the run has come."""
        wanted = active_loops_at(self.recipe.schedule, self.model.config.max_active_loops, at)
        if wanted != self.model.graph.active_loops:
            self.model.set_graph(self.model.graph.model_copy(update={"active_loops": wanted}))

    def timed_step(self, at: float) -> tuple[float, float]:
        """One optimizer step on the clock: (mean training loss in nats per token, gradient norm)."""
        started = time.perf_counter()
        loss_share = self._accumulate_gradients()
        schedule, momentum = self.recipe.schedule, self.recipe.optim.momentum_for(self.step)
        norm = self.optimizer.step(lr_multiplier(schedule, at), momentum, weight_decay_multiplier(schedule, at))
        loss = self.ranks.sum_float(float(loss_share))
        if not math.isfinite(loss):
            raise NumericsError(
                f"training loss is {loss} at step {self.step}; earlier checkpoints in {self.run_dir} are intact",
                hint="lower optim.matrix_lr or optim.embed_lr, or raise precision with --set run.precision=fp32",
            )
        self.step += 1
        self._update_averages(at)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = self.train_seconds
        self.train_seconds = self.ranks.main_float(before + time.perf_counter() - started)
        looped = self.model.graph.active_loops > 0
        self.ledger.add("train_looped" if looped else "train_plain", self.train_seconds - before)
        self.clock.tick(self.train_seconds)
        return loss, norm

    def _update_averages(self, at: float) -> None:
        """Fold the weights after this step, which began at progress `at`, into the averages that are kept."""
        if self.ema:
            self.ema.update(self.step)
        start = self.recipe.optim.swa_start
        if self.swa and start is not None and at >= start:
            self.swa.update(self.step)

    def _accumulate_gradients(self) -> Tensor:  # () float64
        """Backward over this rank's micro-batches: its share of the mean loss over batch_tokens."""
        data, ranks = self.recipe.data, self.ranks
        share = self.micro_tokens / data.batch_tokens
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        windows_per_step, windows_per_batch = data.batch_tokens // data.seq_len, self.micro_tokens // data.seq_len
        for inputs, targets in self.sampler.step_batches(
            self.step, windows_per_step, windows_per_batch, ranks.rank, ranks.world_size
        ):
            loss = self._loss(inputs.to(self.device), targets.to(self.device)) * share
            loss.backward()
            total += loss.detach()  # read once, after the optimizer's step: reading waits for the device
        return total

    def _loss(
        self,
        inputs: Tensor,  # (batch, seq_len) int64
        targets: Tensor,  # (batch, seq_len) int64
    ) -> Tensor:  # () mean nats per token
        enabled = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with enabled:
            logits = self.model(inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _log(self, loss: float, norm: float, at: float) -> None:
        """Append a JSON line, and every log_every steps tell the terminal."""
        schedule, multiplier = self.recipe.schedule, lr_multiplier(self.recipe.schedule, at)
        record = {
            "step": self.step,
            "loss": round(loss, 6),
            "grad_norm": round(norm, 6),
            "lr_multiplier": round(multiplier, 6),
            "lr": {group: round(lr, 9) for group, lr in self.optimizer.learning_rates(multiplier).items()},
            "momentum": round(self.recipe.optim.momentum_for(self.step - 1), 6),
            "weight_decay_multiplier": round(weight_decay_multiplier(schedule, at), 6),
            "active_loops": self.model.graph.active_loops,
            "tokens_per_second": round(self.clock.recent_rate(), 1),
            "mean_tokens_per_second": round(self._mean_rate(), 1),
            "train_seconds": round(self.train_seconds, 3),
            "wall_seconds": self.wall_seconds,
        }
        append_line(self.run_dir / LOG_FILE, record)
        if self.step % self.recipe.run.log_every == 0:
            say(step_line(record, at))

    def _mean_rate(self) -> float:
        """Training tokens per second over the whole run, resumed parts included."""
        return self.recipe.data.batch_tokens * self.step / max(self.train_seconds, 1e-9)

    def _say_summary(self, loss: float, final: Checkpoint) -> None:
        """One line: how much, how long, how fast, how good."""
        bpb = ", ".join(f"{name} {view['metric']['bpb']:.4f}" for name, view in final.meta["views"].items())
        say(
            f"done: {self.step:,} steps, {self.step * self.recipe.data.batch_tokens:,} tokens, "
            f"{self.train_seconds:.1f} s of training in {self.wall_seconds:.1f} s, {self._mean_rate():,.0f} tokens/s, "
            f"last loss {loss:.4f}, bpb {bpb}"
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """config.json: what rebuilds the model as it is now, runtime graph state included."""
        return {
            "family": "golf_gpt",
            "model": self.model.config.model_dump(mode="json"),
            "graph": self.model.graph.model_dump(mode="json"),
            "tokenizer": {"sha256": self.data.tokenizer_sha256, "vocab_size": self.data.vocab_size},
            "data": {"manifest_sha256": self.data.manifest_sha256},
        }

    def views(self) -> dict[ViewName, dict[str, Tensor]]:
        """The raw weights and the averages that are kept; an average has the raw weights' buffers, if any."""
        raw = dict(self.model.state_dict())
        views: dict[ViewName, dict[str, Tensor]] = {"raw": raw}
        if self.ema:
            views["ema"] = {**raw, **self.ema.shadow}
        if self.swa and self.swa.count:
            views["swa"] = {**raw, **self.swa.mean}
        return views

    def _metric(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Score one view as `checkpoint verify` will: float32, plain, the first metric_tokens of validation."""
        with self.ledger.phase("scoring"):
            return self._measure(tensors)

    def _measure(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        protocol = PlainProtocol(seq_len=self.recipe.data.seq_len, max_tokens=self.recipe.checkpoint.metric_tokens)
        module = GolfGPT(self.model.config, self.model.graph).to(self.device)
        module.load_state_dict(tensors)
        return measure_module(module.eval(), self.data, protocol)

    def save(self, phase: str) -> Checkpoint:
        """Write this moment as a folder and point `latest` at it; rank 0 does, the others wait for it."""
        path = self.run_dir / f"step_{self.step:06d}-{phase}"
        with self.ledger.phase("final" if phase == "final" else "checkpoint"):
            training = self.optimizer.state() if self.recipe.checkpoint.optimizer_state else None  # shared out
            if self.ranks.is_main:
                self._write(path, phase, training)
            self.ranks.wait()
        return Checkpoint.open(path)

    def _write(self, path: Path, phase: str, training: dict[str, Tensor] | None) -> None:
        views = self.views()
        metrics: dict[str, dict[str, Any]] = {name: self._metric(tensors) for name, tensors in views.items()}
        meta = {
            "kind": "raw",
            "run": self.recipe.run.name,
            "phase": phase,
            "step": self.step,
            "progress": self.progress,
            "tokens_seen": self.step * self.recipe.data.batch_tokens,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "ledger": self.ledger.as_facts(self.recipe.schedule.seconds),
            "reserve": asdict(self.reserve) if self.reserve else None,
            "swa_count": self.swa.count if self.swa else 0,
            "seed": self.recipe.run.seed,
            "data_position": {"next_step": self.step},
            "rng": "none: the data order is a function of seed and step, and training draws no other random numbers",
            "precision": "bf16 autocast" if self.dtype else self.recipe.run.precision.replace("auto", "fp32"),
            "parents": self.parents,
            "data_dir": str(self.recipe.data.dir),
            "recipe": self.recipe.model_dump(mode="json"),
            **self.provenance,
        }
        checkpoint = save_checkpoint(path, self.config(), views, meta, metrics, training)
        self._point_latest(checkpoint)
        bpb = "  ".join(f"{name} {metric['bpb']:.4f}" for name, metric in metrics.items())
        say(f"saved {path}  bpb on {metrics['raw']['tokens']:,} validation tokens: {bpb}")

    def _point_latest(self, checkpoint: Checkpoint) -> None:
        """Point `latest` at a saved checkpoint. Raises PgolfError if the link cannot be made."""
        root = self.recipe.run.checkpoint_root
        try:
            point_latest(root, checkpoint)
        except OSError as error:
            raise PgolfError(
                f"saved {checkpoint.path}, but could not point {root / 'latest'} at it: {error}",
                hint=f"move {root / 'latest'} away if it is not a link, then go on with --resume {checkpoint.path}",
            ) from error

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe: weights, moments, average, data position and clock."""
        checkpoint = Checkpoint.open(path)
        if not (checkpoint.path / TRAINING_FILE).is_file():
            raise NotFoundError(f"{checkpoint.path} has no {TRAINING_FILE}; only folders that keep it can be resumed")
        theirs, ours = complete_config(checkpoint.config), self.config()
        if theirs["model"] != ours["model"] or theirs["data"] != ours["data"]:
            raise MismatchError(
                f"{checkpoint.path}: its model or data is not this recipe's; it cannot be resumed with it"
            )
        self.model.load_state_dict(dict(checkpoint.load("raw").tensors))
        self._resume_averages(checkpoint)
        self.optimizer.load_state(read_tensors(checkpoint.path / TRAINING_FILE), str(checkpoint.path))
        self.model.set_graph(GraphState(**checkpoint.config["graph"]))
        self.step = int(checkpoint.meta["step"])
        self.train_seconds = float(checkpoint.meta["train_seconds"])
        self.earlier_wall_seconds = float(checkpoint.meta.get("wall_seconds", 0.0))
        if "ledger" in checkpoint.meta:
            self.ledger.resume(checkpoint.meta["ledger"])
        self.reserve = resumed_reserve(self.recipe.schedule, checkpoint.meta.get("reserve"))
        self.clock = StepClock(self.recipe.data.batch_tokens, self.train_seconds)
        self.parents = [checkpoint.view_id("raw")]
        self.phases.skip_past(self.step, self.progress)
        say(f"resumed {checkpoint.path} at step {self.step}, {100 * self.progress:.1f} % of the run")

    def _resume_averages(self, checkpoint: Checkpoint) -> None:
        """Take up the averages where the checkpoint left them. Raises NotFoundError if it lacks a kept EMA."""
        if self.ema:
            shadow = checkpoint.load("ema").tensors
            self.ema.shadow = {name: shadow[name].to(self.device, copy=True) for name in self.ema.shadow}
        start, count = self.recipe.optim.swa_start, int(checkpoint.meta.get("swa_count", 0))
        if start is not None and not count and float(checkpoint.meta.get("progress", 0.0)) > start:
            say(f"{checkpoint.path} holds no running mean; one starts at step {checkpoint.meta['step']}")
        if self.swa and count:
            mean = checkpoint.load("swa").tensors
            self.swa.count = count
            self.swa.mean = {name: mean[name].to(self.device, copy=True) for name in self.swa.parameters}
