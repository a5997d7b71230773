"""The training loop: step until the schedule says the run is over, leave a checkpoint at every phase boundary.

The clock that drives the schedule counts optimizer steps only; scoring and writing checkpoints are excluded, and the
ledger in meta.json says what they took (`train_seconds` against `wall_seconds`). A loss that is not finite ends the run
at once, with the last checkpoint intact.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, PgolfError, SettingsError
from pgolf_post.provenance import provenance
from trainer.architecture import GraphState
from trainer.attention_backends import choose_backend
from trainer.averages import EMA, PowerEMA, RunningMean
from trainer.background import BackgroundWriter, Waits
from trainer.batches import WindowSampler, to_device
from trainer.compiled import compiled_loss, compiles, say_late_graphs, training_loss, warm_up
from trainer.config import Precision, Recipe
from trainer.distributed import ALONE, Ranks
from trainer.kernels import fuse_mlps, fused_loss, require_usable
from trainer.log import LOG_FILE, StepClock, append_line, end_torn_line, step_line
from trainer.model import GolfGPT
from trainer.optim import Optimizer
from trainer.phase_times import LEDGER_FILE, PhaseTimes, show_phase_times, write_phase_times
from trainer.phases import PERIODIC, Periodic, PhaseTracker
from trainer.reserve import Reserve, measure_reserve
from trainer.resuming import prepare_power_ema, restore
from trainer.saving import save, save_power_ema, score_saved
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
        self.recipe, self.ranks, self.phase_times = recipe, ranks, PhaseTimes()
        self.micro_tokens = micro_batch_tokens(recipe, ranks.world_size)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        self.device = ranks.device
        require_usable(recipe, self.device.type)
        self.dtype = autocast_dtype(recipe.run.precision, self.device)
        self.data = DataFolder.open(recipe.data.dir)
        self.sampler = WindowSampler(self.data, recipe.data.seq_len, recipe.run.seed)
        self.model = self._new_model()
        self.compiled = compiles(recipe.run.compile, self.device)
        eager_loss = fused_loss if recipe.run.kernels == "triton" else training_loss
        self.loss_function = compiled_loss(eager_loss) if self.compiled else eager_loss
        self.optimizer = Optimizer(self.model, recipe.optim, ranks)
        self.provenance: dict[str, Any] = {
            **provenance(self.device),
            "world_size": ranks.world_size,
            "attention": self.model.attention_backend.name,
            "compile": self.compiled,
            "kernels": recipe.run.kernels,
        }
        optim = recipe.optim
        self.ema = EMA(self.model, optim.ema_decay, optim.ema_every) if optim.ema_decay else None
        self.swa = RunningMean(self.model, optim.swa_every) if optim.swa_start is not None else None
        self.power_ema = PowerEMA(self.model, optim.power_ema_sigmas) if optim.power_ema_sigmas else None
        self.snapshot_step = 0  # at which its averages were last snapshotted
        self.phases = PhaseTracker.from_recipe(recipe)
        self.periodic = Periodic(recipe.checkpoint.every_steps, recipe.checkpoint.every_seconds)
        self.writer, self.waits = BackgroundWriter(recipe.checkpoint.max_in_flight), Waits()
        self.run_dir = recipe.run.checkpoint_root / recipe.run.name
        self.step = 0
        self.train_seconds = 0.0
        self.clock = StepClock(recipe.data.batch_tokens, self.train_seconds)
        self.earlier_wall_seconds = 0.0  # of the processes that this one resumes
        self.parents: list[str] = []
        self.resumed_from: Path | None = None
        self.reserve: Reserve | None = None  # under a cap, settled before the first step
        self.phase_times.add("load", time.perf_counter() - self.phase_times.started)

    def _new_model(self) -> GolfGPT:
        """The recipe's model, initialised by its seed, on the device, with its kernels and its attention."""
        recipe = self.recipe
        torch.manual_seed(recipe.run.seed)
        model = GolfGPT(recipe.model_config_for(self.data.vocab_size), GraphState())
        model.initialise()
        model.to(self.device, torch.float64 if recipe.run.precision == "fp64" else torch.float32)
        if recipe.run.kernels == "triton":
            fuse_mlps(model)
        isolated, compute_dtype = recipe.model.isolate_documents, self.dtype or model.tok_emb.weight.dtype
        model.attention_backend = choose_backend(recipe.run.attention, self.device, compute_dtype, isolated)
        return model

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        reserve_seconds = self.reserve.seconds if self.reserve else 0.0
        return progress(self.recipe.schedule, self.step, self.train_seconds, reserve_seconds)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, those of the processes that this one resumes included."""
        return round(self.earlier_wall_seconds + time.perf_counter() - self.phase_times.started, 3)

    def num_parameters(self) -> int:
        """Of the model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe: weights, moments, averages, data position and clock."""
        restore(self, path)

    # ---- running -----------------------------------------------------------------------------------------------

    def run(self) -> Checkpoint:
        """Train to the end. Returns the final checkpoint. Raises NumericsError if the loss stops being finite."""
        if self.ranks.is_main:
            self._make_run_dir()
        self.ranks.wait()
        with self.phase_times.phase("warm_up"):
            self.provenance["warm_up"] = warmed = warm_up(self)
        self._settle_reserve()
        with self.writer:  # left when all that was handed over is on disk
            loss = self._step_to_the_end()
            self.update_graph(1.0)
            with self.phase_times.phase("final"):
                path = save(self, "final")
                self.writer.drain()
        if self.ranks.is_main and self.recipe.checkpoint.metric == "end":
            with self.phase_times.phase("scoring"):
                score_saved(self)
        self.ranks.wait()
        final = Checkpoint.open(path)
        self._close_phase_times()
        self._say_summary(loss, final)
        say_late_graphs(self, warmed)
        return final

    def _step_to_the_end(self) -> float:
        """Step, save and log until progress is 1. Returns the last loss."""
        loss, shown = math.nan, 0
        with progress_bar(f"training {self.recipe.run.name}", 1000) as advance:
            while (at := self.progress) < 1.0:
                self.update_graph(at)
                with self.phase_times.phase("checkpoint"):
                    if phase := self._phase_due(at):
                        save(self, phase)
                loss, norm = self.timed_step(at)
                with self.phase_times.phase("checkpoint"):
                    save_power_ema(self, at)
                self.writer.check()
                if self.ranks.is_main:
                    self._log(loss, norm, at)
                self.clock.require(self.recipe.run.min_tokens_per_second)
                permille = int(1000 * self.progress)
                advance(permille - shown, note=f"step {self.step} loss {loss:.4f}")
                shown = permille
        return loss

    def _phase_due(self, at: float) -> str | None:
        """The phase of the checkpoint to save before this step, if any; a boundary comes before a period."""
        phase, periodic = self.phases.due(self.step, at), self.periodic.due(self.step, self.train_seconds)
        return phase or (PERIODIC if periodic else None)

    def _settle_reserve(self) -> None:
        """Before the clock starts: what a cap must leave free. A resumed run keeps what it began with."""
        with self.phase_times.phase("warm_up"):
            self.reserve = self.reserve or measure_reserve(self)
        if self.reserve:
            say(f"cap {self.recipe.schedule.seconds:g} s: {self.reserve}")

    def _close_phase_times(self) -> None:
        """Show where the time went and leave it in the run's folder."""
        if self.ranks.is_main:
            facts = self.phase_times.as_facts(self.recipe.schedule.seconds)
            write_phase_times(self.run_dir / LEDGER_FILE, facts)
            show_phase_times(facts)

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
        prepare_power_ema(self)

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
        self.phase_times.add("train_looped" if looped else "train_plain", self.train_seconds - before)
        self.clock.tick(self.train_seconds)
        return loss, norm

    def rehearse(self, inputs: Tensor, targets: Tensor) -> None:
        """An optimizer step on one given micro-batch, each (batch, seq_len) int64: for warming up, off the record."""
        self._accumulate_gradients([(inputs, targets)])
        self.optimizer.step(1.0, self.recipe.optim.momentum_for(self.step))

    def _update_averages(self, at: float) -> None:
        """Fold the weights after this step, which began at progress `at`, into the averages that are kept."""
        if self.ema:
            self.ema.update(self.step)
        start = self.recipe.optim.swa_start
        if self.swa and start is not None and at >= start:
            self.swa.update(self.step)
        if self.power_ema:
            self.power_ema.update(self.step)

    def _accumulate_gradients(self, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> Tensor:  # () float64
        """Backward over this rank's micro-batches (this step's unless given): its share of the mean loss."""
        data, ranks = self.recipe.data, self.ranks
        share = self.micro_tokens / data.batch_tokens
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        windows_per_step, windows_per_batch = data.batch_tokens // data.seq_len, self.micro_tokens // data.seq_len
        if batches is None:
            batches = self.sampler.step_batches(
                self.step, windows_per_step, windows_per_batch, ranks.rank, ranks.world_size
            )
        for inputs, targets in batches:
            loss = self._loss(inputs, targets) * share
            loss.backward()
            total += loss.detach()  # read once, after the optimizer's step: reading waits for the device
        return total

    def _loss(
        self,
        inputs: Tensor,  # (batch, seq_len) int64, on the CPU
        targets: Tensor,  # (batch, seq_len) int64, on the CPU
    ) -> Tensor:  # () mean nats per token
        reach = self.model.reach(inputs)
        inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
        enabled = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with enabled:
            return self.loss_function(self.model, inputs, targets, reach)

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
            **self.waits.record(),
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
            f"{self.waits}, "
            f"last loss {loss:.4f}, bpb {bpb}"
        )
