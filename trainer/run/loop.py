"""The training loop: step until the schedule says the run is over, leave a checkpoint at every phase boundary.

The clock that drives the schedule counts optimizer steps only; scoring and writing checkpoints are excluded, and
meta.json says what they took (`train_seconds` against `wall_seconds`). A loss that is not finite ends the run at once,
with the last checkpoint intact.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.signals import stop_requests
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, StoppedEarlyError
from pgolf_post.provenance import provenance
from trainer.config import Recipe
from trainer.kernels import chosen_kernels, require_usable
from trainer.model.attention_backends import warning_of
from trainer.run.background import BackgroundWriter
from trainer.run.log import LOG_FILE, StepClock, append_line, step_line
from trainer.run.measuring import measure_reserve
from trainer.run.norm_alarm import NormAlarm, hint_of_divergence
from trainer.run.phase_times import PHASE_TIMES_FILE, PhaseTimes, show_phase_times, write_phase_times
from trainer.run.phases import INTERRUPTED, PERIODIC, STOPPED_EARLY
from trainer.run.resuming import restore
from trainer.run.run_folder import make_run_dir
from trainer.run.saving import save, save_power_ema_if_due, score_saved
from trainer.run.state import RunState
from trainer.run.stopping import StopWatch
from trainer.run.telling import step_record, summary
from trainer.run.warm_up import say_late_graphs, warm_up
from trainer.schedule.clock import ScheduleClock, require_countable
from trainer.schedule.functions import lr_multiplier, weight_decay_multiplier
from trainer.start.building import new_model
from trainer.start.init_from import Start, start_from_checkpoint
from trainer.step.batches import AheadSampler, Sampler
from trainer.step.distributed import SINGLE_PROCESS, TrainingRanks
from trainer.step.future_heads import future_heads
from trainer.step.gradients import GradientAccumulator, micro_batch_tokens, training_autocast
from trainer.step.meta_ttt import MetaTTT, require_halves
from trainer.step.objective import Objective
from trainer.step.qat import facts_of, rounding_of
from trainer.step.staged_batches import StagedSampler

STOPPING = "stopping after this step, with a checkpoint; once more to stop at once"
REPEATED_SIGNAL_SECONDS = 2.0


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Have torch take deterministic kernels inside, where that is wanted.

    cuBLAS reads the size of its workspace when it is first used: it must be one of two for the same sums each time.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class StoppedRun(KeyboardInterrupt):
    """A run that was asked to stop, and what it saved."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class WorseRun(StoppedEarlyError):
    """A run that its recipe ended early, and what it saved."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(f"stopped early: {reason}; saved {path}", hint=f"go on all the same: --resume {path}")
        self.path = path


class Trainer:
    """One run of a recipe: its state, and what moves it from step to step."""

    def __init__(
        self,
        recipe: Recipe,
        ranks: TrainingRanks = SINGLE_PROCESS,
        resumed: bool = False,
        clock: ScheduleClock | None = None,
    ) -> None:
        """Build a run. `clock` began with the command, by default it begins here; the recipe says what it counts."""
        # Settings that cannot be met end the run before anything is built.
        phase_times = PhaseTimes()
        micro_tokens, *_ = (micro_batch_tokens(recipe, ranks.world_size, stage) for stage in recipe.stages)
        require_halves(recipe, ranks.world_size)
        if recipe.run.threads:
            torch.set_num_threads(recipe.run.threads)
        require_usable(recipe, ranks.device.type)
        require_countable(recipe.schedule.clock, ranks.device, ranks.world_size)
        self.stop_watch = StopWatch(recipe.stop, progress=0.0)

        # Data, model, and how its loss is computed.
        self.recipe, self.ranks = recipe, ranks
        self.asked: Sequence[int] = []  # signals that asked this rank to stop
        self.stopping = False  # whether any rank was asked to, as of the last step
        autocast = training_autocast(recipe.run.precision, ranks.device)
        data = DataFolder.open(recipe.data.dir)
        self.model = new_model(recipe, data, ranks.device, autocast)
        self.start: Start | None = None  # from another model's weights
        if recipe.init.is_on and not resumed:
            self.start = start_from_checkpoint(self.model, recipe.init, data, compare=ranks.is_main)
        heads, objective = future_heads(recipe, self.model), None
        if recipe.loss.is_on:
            objective = Objective(recipe.loss, recipe.model.num_heads, data, ranks.device, heads)
        self.gradients = GradientAccumulator(recipe, self.model, ranks, autocast, micro_tokens, objective)
        self.meta_ttt = MetaTTT(recipe.meta_ttt, self.gradients) if recipe.meta_ttt else None
        self.rounding = rounding_of(recipe, self.model, ranks)
        self.norm_alarm = NormAlarm(recipe.run, autocast)
        self.too_steep: dict[str, Any] | None = None  # facts of a gradient norm that ends the run
        self.minimised = math.nan  # the objective of the last step, where that is not its nats
        shape, isolated = (micro_tokens // recipe.data.seq_len, recipe.data.seq_len), recipe.model.isolate_documents
        if warning := warning_of(recipe.run.attention, self.model.attention_backend, ranks.device, isolated, *shape):
            say(warning)

        # What changes as the run goes on, and where it is written.
        facts = {
            **provenance(ranks.device),
            "world_size": ranks.world_size,
            "attention": self.model.attention_backend.name,
            "compile": self.gradients.compiled,
            "kernels": chosen_kernels(recipe, ranks.device, autocast),
            **facts_of(self.rounding),
            "stream": "bf16"
            if self.gradients.twin
            else str(self.model.tok_emb.weight.dtype).replace("torch.float", "fp"),
            **({"init": self.start.facts()} if self.start else {}),
        }
        self.state = RunState.begin(recipe, ranks, data, self.model, autocast, phase_times, facts, heads, self.rounding)
        self.state.schedule_clock = replace(clock or ScheduleClock(), name=recipe.schedule.clock)
        self.begin_stage()
        self.writer = BackgroundWriter(recipe.checkpoint.max_in_flight)
        phase_times.add("load", time.perf_counter() - phase_times.started)

    def num_parameters(self) -> int:
        """Return the number of the model's parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe: weights, moments, averages, data position and clock."""
        restore(self.state, path)
        self.stop_watch = StopWatch(self.recipe.stop, self.state.progress)
        self.state.update_stage(self.state.progress)  # a run that was stopped may stand where its next stage begins
        self.begin_stage()

    # ---- running -----------------------------------------------------------------------------------------------

    def run(self) -> Checkpoint:
        """Train to the end. Return the final checkpoint. Raises NumericsError if the loss stops being finite."""
        with deterministic_kernels(self.recipe.run.deterministic):
            return self._run()

    def _run(self) -> Checkpoint:
        state, phase_times = self.state, self.state.phase_times
        # Before the clock starts: the folder, the warm-up, and what a cap must leave free.
        if self.ranks.is_main:
            make_run_dir(self.state)
        self.ranks.wait()
        with phase_times.phase("warm_up"):
            state.provenance["warm_up"] = warmed = warm_up(state, self.gradients)
        self._settle_reserve()

        # Every step, then the final checkpoint. All that was handed over is on disk when the writer is left.
        repeated = REPEATED_SIGNAL_SECONDS if self.ranks.world_size > 1 else 0.0
        with self.writer, stop_requests(STOPPING, repeated) as self.asked:
            loss = self._step_to_the_end()
            if self.stopping:
                self._stop()
            state.update_graph(1.0)
            with phase_times.phase("final"):
                path = save(state, self.writer, "final")
                self.writer.drain()

        # After training: scores that were put off, and the summary.
        if self.asked and self.recipe.checkpoint.metric == "end":
            raise StoppedRun(path)
        if self.ranks.is_main and self.recipe.checkpoint.metric == "end":
            with phase_times.phase("scoring"):
                score_saved(state)
        self.ranks.wait()
        final = Checkpoint.open(path)
        self._close_phase_times()
        say(summary(self.state, loss, final))
        say_late_graphs(self.gradients.compiled, warmed)
        return final

    def _step_to_the_end(self) -> float:
        """Step, save and log until progress is 1. Return the last loss, in nats per token."""
        state, phase_times = self.state, self.state.phase_times
        loss, shown = math.nan, 0
        with progress_bar(f"training {self.recipe.run.name}", 1000, "‰ of the run") as advance:
            while (at := state.progress) < 1.0:
                # A boundary met by this step is saved before it, with the graph that it will use.
                state.update_graph(at)
                if state.update_stage(at):
                    self.begin_stage()
                with phase_times.phase("checkpoint"):
                    if phase := self._phase_due(at):
                        save(state, self.writer, phase)
                loss, norm = self.timed_step(at)
                with phase_times.phase("checkpoint"):
                    save_power_ema_if_due(state, self.writer, at)

                # What may end the run: a write that failed, a speed below the minimum.
                self.writer.check()
                if self.ranks.is_main:
                    self._log(loss, norm, at)
                state.clock.require(self.recipe.run.min_tokens_per_second)

                # Progress is a real number; the bar counts thousandths.
                permille = int(1000 * state.progress)
                advance(permille - shown, note=f"step {state.step} loss {loss:.4f}")
                shown = permille
                if self.stopping:
                    break
                if self.too_steep:
                    self._end_early(self.too_steep)
                if self.stop_watch.due(state.progress):
                    self._stop_if_worse()
        return loss

    def _stop(self) -> None:
        """Save this moment, on all ranks, and raise StoppedRun; a run that just came to its end goes on to finish."""
        if self.state.progress >= 1.0:
            return
        self.state.update_graph(self.state.progress)
        path = save(self.state, self.writer, INTERRUPTED)
        self.writer.drain()
        self.ranks.wait()
        raise StoppedRun(path)

    def _stop_if_worse(self) -> None:
        """Save this moment, on all ranks, and raise WorseRun if the run is worse than the one it is compared with."""
        state, watch, facts = self.state, self.stop_watch, None
        if self.ranks.is_main and (difference := watch.compare(state.run_dir / LOG_FILE)):
            reason = watch.verdict(difference)
            facts = watch.facts(difference, reason) if reason else None
        if facts := self.ranks.main_says(facts):
            self._end_early(facts)

    def _end_early(self, facts: dict[str, Any]) -> NoReturn:
        """Save this moment, on all ranks, with the facts, and raise WorseRun."""
        state = self.state
        state.provenance["stopped_early"] = facts
        state.update_graph(state.progress)
        path = save(state, self.writer, STOPPED_EARLY)
        self.writer.drain()
        if self.ranks.is_main and self.recipe.checkpoint.metric == "end":
            score_saved(state)
        self.ranks.wait()
        self._close_phase_times()
        raise WorseRun(facts["reason"], path)

    def _phase_due(self, at: float) -> str | None:
        """Return the phase of the checkpoint to save before this step, if any; a boundary comes before a period."""
        state = self.state
        phase, periodic = state.phases.due(state.step, at), state.periodic.due(state.step, state.train_seconds)
        return phase or (PERIODIC if periodic else None)

    def _settle_reserve(self) -> None:
        """Settle, before the clock starts, what a cap must leave free. A resumed run keeps what it began with."""
        state = self.state
        with state.phase_times.phase("warm_up"):
            state.reserve = state.reserve or measure_reserve(state, self.gradients)
        if state.reserve:
            say(f"cap {self.recipe.schedule.seconds:g} s: {state.reserve}")

    def timed_step(self, at: float) -> tuple[float, float]:
        """Take one optimizer step on the clock. Return the mean training loss in nats per token, and gradient norm."""
        state, started = self.state, time.perf_counter()
        # Forward, backward and the update.
        schedule, momentum = self.recipe.schedule, self.recipe.optim.momentum_for(state.step)
        if self.gradients.objective is not None:
            self.gradients.objective.move_to(at)
        loss_share, rate_share = self._backward(at)
        if self.recipe.optim.groups:
            state.optimizer.freeze(at)
        norm = state.optimizer.step(lr_multiplier(schedule, at), momentum, weight_decay_multiplier(schedule, at))
        state.averages.update(state.step + 1, at)

        # All of the step is queued: reading its numbers is the one wait for the device.
        minimised = self.gradients.objective_share
        if rate_share is not None:
            minimised = rate_share + (loss_share if minimised is None else minimised)
        shares = () if minimised is None else (minimised,)
        above = self.norm_alarm.above(norm)
        loss, num_asked, *sums = self.ranks.sum_floats(loss_share, float(bool(self.asked)), *shares, *above)
        self.minimised = sums[0] if shares else loss
        self.stopping = num_asked > 0
        if not (math.isfinite(loss) and math.isfinite(self.minimised)):
            raise NumericsError(
                f"training loss is {self.minimised if math.isfinite(loss) else loss} at step {state.step}; "
                f"earlier checkpoints in {state.run_dir} are intact",
                hint=hint_of_divergence(state.autocast),
            )
        state.step += 1
        if above:
            self.too_steep = self.norm_alarm.hear(sums[-1], float(norm), state.step)

        # Rank 0's clock is the run's.
        before, step_seconds = state.train_seconds, time.perf_counter() - started
        state.train_seconds = self.ranks.main_float(state.schedule_clock.after_step(before, step_seconds))
        looped = self.model.graph.active_loops > 0
        step_seconds = step_seconds if state.schedule_clock.name == "processor" else state.train_seconds - before
        state.phase_times.add("train_looped" if looped else "train_plain", step_seconds)
        state.clock.tick(state.train_seconds)
        return loss, float(norm)

    def _backward(self, at: float) -> tuple[Tensor, Tensor | None]:
        """Make the gradients of a step. Return this rank's shares of its mean nats, and of its rate where bits cost."""
        step, (windows, windows_per_batch, *_) = self.state.step, self._batch_shape()
        batches: Iterable[tuple[Tensor, Tensor]] = self.sampler.step_batches(step, *self._batch_shape())
        if self.rounding is None:
            return self._gradients_for(step)(batches), None
        changed = self.gradients.twin.take_weights if self.gradients.twin else None
        with self.rounding.during(step, at):
            seen = self.rounding.batches(batches, step, windows // windows_per_batch, changed)
            loss_share = self._gradients_for(step)(seen)
        return loss_share, self.rounding.after_backward(step, at, self.state.place.stage.batch_tokens)

    def _gradients_for(self, step: int) -> Callable[[Iterable[tuple[Tensor, Tensor]]], Tensor]:
        """Return what makes the gradients of a step of its micro-batches."""
        return self.meta_ttt.accumulate if self.meta_ttt and self.meta_ttt.is_due(step) else self.gradients.accumulate

    def begin_stage(self) -> None:
        """Take the sizes of steps and windows of the state's stage, and read the text from where it began."""
        state, recipe, stage = self.state, self.recipe, self.state.place.stage
        micro_tokens = micro_batch_tokens(recipe, self.ranks.world_size, stage)
        self.gradients.take_sizes(micro_tokens, stage.batch_tokens)
        sampler = StagedSampler(state.data, state.place, recipe.longest_seq_len, recipe.run.seed)
        self.sampler: Sampler = AheadSampler(sampler) if self.ranks.device.type == "cuda" else sampler
        state.clock = StepClock(stage.batch_tokens, state.train_seconds)

    def _batch_shape(self) -> tuple[int, int, int, int]:
        """Return windows of a step, windows of a micro-batch, this rank, and the number of ranks."""
        stage = self.state.place.stage
        windows = stage.batch_tokens // stage.seq_len, self.gradients.micro_tokens // stage.seq_len
        return *windows, self.ranks.rank, self.ranks.world_size

    # ---- what is said ------------------------------------------------------------------------------------------

    def _log(self, loss: float, norm: float, at: float) -> None:
        """Append a JSON line for this step, and every log_every steps tell the terminal."""
        record = step_record(self.state, loss, self.minimised if self._minimises_more else None, norm, at)
        append_line(self.state.run_dir / LOG_FILE, record)
        if self.state.step % self.recipe.run.log_every == 0:
            say(step_line(record, at))

    @property
    def _minimises_more(self) -> bool:
        """Whether steps minimise anything but plain nats."""
        return self.gradients.objective is not None or bool(self.recipe.qat and self.recipe.qat.rate)

    def _close_phase_times(self) -> None:
        """Show where the time went and leave it in the run's folder."""
        if self.ranks.is_main:
            facts = self.state.phase_times.as_facts(self.recipe.schedule.wall_seconds)
            write_phase_times(self.state.run_dir / PHASE_TIMES_FILE, facts)
            show_phase_times(facts)
