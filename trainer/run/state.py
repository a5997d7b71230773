"""A run at one moment: everything that training changes and that a checkpoint must hold.

`saving` takes it to disk, `resuming` puts it back, and a resumed run is bit for bit the run that was never stopped. So
whatever a step changes is a field here, and the plain numbers among them leave by `facts` and come back by `take_up`,
which stand side by side. Warming up and measuring take this state too, and leave it as they found it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from trainer.config import Recipe
from trainer.model.gpt import GolfGPT
from trainer.optim.averages import Averages
from trainer.optim.compiled_updates import updates_for
from trainer.optim.optimizer import Optimizer
from trainer.run.background import Waits
from trainer.run.log import StepClock
from trainer.run.phase_times import PhaseTimes
from trainer.run.phases import Periodic, PhaseTracker
from trainer.run.reserve import Reserve, resumed_reserve
from trainer.schedule.clock import ScheduleClock
from trainer.schedule.functions import active_loops_at, progress
from trainer.schedule.stages import StagePlace, stage_at
from trainer.step.distributed import TrainingRanks
from trainer.step.future_heads import FutureHeads, WithHeads
from trainer.step.qat import Rounding


@dataclass
class RunState:
    """The state of a run. Fields of the first group stay what they are; all others change as the run goes on."""

    recipe: Recipe
    ranks: TrainingRanks
    data: DataFolder
    autocast: torch.dtype | None  # None = no autocast

    model: GolfGPT  # its weights and its graph
    optimizer: Optimizer  # its moments
    averages: Averages
    phases: PhaseTracker  # boundaries that are still ahead
    periodic: Periodic  # periods that are behind
    clock: StepClock
    phase_times: PhaseTimes
    provenance: dict[str, Any]  # facts for meta.json; the warm-up adds its own
    place: StagePlace  # the stage, and where it began
    heads: FutureHeads | None = None  # of later tokens, which the model does not have
    rounding: Rounding | None = None  # that steps see, and its moments
    waits: Waits = field(default_factory=Waits)
    step: int = 0  # optimizer steps done
    train_seconds: float = 0.0  # spent of schedule.seconds, as its clock counts them
    schedule_clock: ScheduleClock = field(default_factory=ScheduleClock)
    earlier_wall_seconds: float = 0.0  # of the processes that this one resumes
    snapshot_step: int = 0  # at which power-function averages were last snapshotted
    reserve: Reserve | None = None  # under a cap, settled before the first step
    parent: Checkpoint | None = None  # that this process resumed

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        ranks: TrainingRanks,
        data: DataFolder,
        model: GolfGPT,
        autocast: torch.dtype | None,
        phase_times: PhaseTimes,
        provenance: dict[str, Any],
        heads: FutureHeads | None = None,
        rounding: Rounding | None = None,
    ) -> RunState:
        """Return the state before the first step of a new run."""
        trained = WithHeads(model, heads) if heads else model
        return cls(
            recipe=recipe,
            ranks=ranks,
            data=data,
            autocast=autocast,
            model=model,
            optimizer=Optimizer(trained, recipe.optim, ranks, updates_for(recipe.run.compile, ranks.device)),
            averages=Averages.begin(model, recipe.optim),
            phases=PhaseTracker.from_recipe(recipe),
            periodic=Periodic(recipe.checkpoint.every_steps, recipe.checkpoint.every_seconds),
            clock=StepClock(recipe.data.batch_tokens, 0.0),
            phase_times=phase_times,
            provenance=provenance,
            place=StagePlace(recipe.stages[0]),
            heads=heads,
            rounding=rounding,
        )

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.ranks.device

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.recipe.run.folder

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        reserve_seconds = self.reserve.seconds if self.reserve else 0.0
        return progress(self.recipe.schedule, self.step, self.train_seconds, reserve_seconds)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, those of the processes that this one resumes included."""
        return round(self.earlier_wall_seconds + time.perf_counter() - self.phase_times.started, 3)

    @property
    def parents(self) -> list[str]:
        """Id of the checkpoint that this process resumed, or that its weights started from, as meta.json lists it."""
        if self.parent:
            return [self.parent.view_id("raw")]
        return [self.provenance["init"]["id"]] if "init" in self.provenance else []

    def clear_gradients(self) -> None:
        """Drop the gradients of everything that is trained."""
        for parameter in self.optimizer.parameters.values():
            parameter.grad = None

    @property
    def tokens_seen(self) -> int:
        """Training tokens of the steps done."""
        return self.place.tokens_seen(self.step)

    def update_stage(self, at: float) -> bool:
        """Enter the stage that the schedule has at progress `at`. Return whether it is another one."""
        stage = stage_at(self.recipe.stages, at)
        if stage == self.place.stage:
            return False
        self.place = self.place.enter(stage, self.step, self.recipe.longest_seq_len)
        return True

    def update_graph(self, at: float) -> None:
        """Activate as many loops as the schedule has at progress `at`."""
        self.set_active_loops(active_loops_at(self.recipe.schedule, self.model.config.max_active_loops, at))

    def set_active_loops(self, active_loops: int) -> None:
        """Change the model's graph to this many active loops, where it has another number."""
        if active_loops != self.model.graph.active_loops:
            self.model.set_graph(self.model.graph.model_copy(update={"active_loops": active_loops}))

    def config(self) -> dict[str, Any]:
        """Return config.json: what rebuilds the model as it is now, runtime graph state included."""
        return {
            "family": "golf_gpt",
            "model": self.model.config.model_dump(mode="json"),
            "graph": self.model.graph.model_dump(mode="json"),
            "tokenizer": {"sha256": self.data.tokenizer_sha256, "vocab_size": self.data.vocab_size},
            "data": {"manifest_sha256": self.data.manifest_sha256},
        }

    def facts(self) -> dict[str, Any]:
        """Return the plain numbers of meta.json: how far the run is, and what it spent its time on."""
        return {
            "step": self.step,
            "progress": self.progress,
            "tokens_seen": self.tokens_seen,
            **({"stage": self.place.facts()} if self.recipe.schedule.stages else {}),
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "ledger": self.phase_times.as_facts(self.recipe.schedule.wall_seconds),
            "reserve": asdict(self.reserve) if self.reserve else None,
            "checkpoint_waits": self.waits.record(),
            "swa_count": self.averages.swa.count if self.averages.swa else 0,
        }

    def count_spent(self, seconds: float) -> None:
        """Start from so many seconds of the schedule's clock, where earlier processes spent more than is known."""
        self.train_seconds = self.schedule_clock.earlier = max(self.train_seconds, seconds)
        self.clock = StepClock(self.place.stage.batch_tokens, self.train_seconds)

    def take_up(self, checkpoint: Checkpoint) -> None:
        """Go on from the plain numbers that `facts` gave a checkpoint; the averages take `swa_count` for themselves."""
        facts = checkpoint.meta
        self.parent = checkpoint
        self.step = self.snapshot_step = int(facts["step"])
        if "stage" in facts:
            self.place = StagePlace.from_facts(facts["stage"])
        self.count_spent(float(facts["train_seconds"]))
        self.earlier_wall_seconds = float(facts.get("wall_seconds", 0.0))
        self.waits = Waits(**facts.get("checkpoint_waits", {}))
        if "init" in facts:
            self.provenance["init"] = facts["init"]
        if "ledger" in facts:
            self.phase_times.resume(facts["ledger"])
        self.reserve = resumed_reserve(self.recipe.schedule, facts.get("reserve"))
        # Boundaries and periods that the checkpoint has behind it do not fire again.
        self.phases.skip_past(self.step, self.progress)
        self.periodic.skip_past(self.step, self.train_seconds)
