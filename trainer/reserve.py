"""Room under the cap: what must still happen inside `schedule.seconds` once the schedule has stopped the run.

The challenge gives training 600 s and counts everything that reads training data, Hessians too. A run that trains until
the cap has therefore lost: its last step ends after it, and so does all that follows. Three things follow:

    last step   time may be up just after a step began, so one whole step, with all loops on
    snapshot    the final copy of weights, averages and moments to the host; writing it goes on outside the cap
    Hessians    where the recipe collects them inside the cap: `schedule.hessian_seconds`, given or "auto"

`schedule.reserve_seconds` is their sum ("auto") or a number, which `--dry-run` holds against the sum. It is settled
once, before the clock starts, on synthetic tokens, and kept for the whole run, resumed parts included: progress stays
a pure function of step and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from pgolf_post.calibrate.collect import FORWARD_TOKENS
from pgolf_post.calibrate.forward import forward_batch
from pgolf_post.calibrate.sums import Sums
from pgolf_post.errors import SettingsError
from trainer.family import GolfGPTFamily
from trainer.model import GolfGPT
from trainer.schedule import ScheduleSettings

if TYPE_CHECKING:
    from trainer.config import Recipe
    from trainer.loop import Trainer
    from trainer.timeline import StepTimes

HESSIAN_STEP_SHARE = 2 / 3  # of a training step's time for as many tokens: a forward pass and as much again for Σxxᵀ


@dataclass(frozen=True)
class Reserve:
    """Seconds that a run keeps free under its cap, and what they are for."""

    seconds: float  # kept free: the recipe's number, or the sum of the three below
    last_step: float
    snapshot: float
    hessians: float | None  # None: not collected inside the cap
    origin: Literal["measured", "estimated"]  # of the three

    @property
    def needed(self) -> float:
        """What should be kept free."""
        return self.last_step + self.after_last_step

    @property
    def after_last_step(self) -> float:
        """What follows the run's last step."""
        return self.snapshot + (self.hessians or 0.0)

    def __str__(self) -> str:
        hessians = "no Hessians" if self.hessians is None else f"Hessians {self.hessians:.3g} s"
        parts = f"last step {self.last_step:.3g} s, snapshot {self.snapshot:.3g} s, {hessians}; {self.origin}"
        short = self.needed - self.seconds
        return f"{self.seconds:.3g} s reserved ({parts})" + (f", {short:.3g} s short" if short > 1e-6 else "")


def make_reserve(
    schedule: ScheduleSettings,
    last_step: float,
    snapshot: float,
    auto_hessians: float,
    origin: Literal["measured", "estimated"],
) -> Reserve:
    """A reserve from its parts; numbers in the recipe come first. Raises SettingsError if no time to train is left."""
    asked = schedule.hessian_seconds
    hessians = auto_hessians if asked == "auto" else asked
    reserve = Reserve(0.0, last_step, snapshot, hessians, origin)
    seconds = reserve.needed if schedule.reserve_seconds == "auto" else schedule.reserve_seconds
    reserve = replace(reserve, seconds=seconds)
    if schedule.seconds is not None and seconds >= schedule.seconds:
        raise SettingsError(
            f"schedule.seconds {schedule.seconds:g} leaves no time to train in: {reserve}",
            hint="raise schedule.seconds, or set schedule.reserve_seconds to what may be kept free",
        )
    return reserve


def estimate_reserve(recipe: Recipe, times: StepTimes) -> Reserve | None:
    """From step times alone, the snapshot taken as nothing. None without a cap."""
    if recipe.schedule.seconds is None:
        return None
    per_token = times.looped / recipe.data.batch_tokens
    hessians = HESSIAN_STEP_SHARE * per_token * recipe.schedule.hessian_tokens
    return make_reserve(recipe.schedule, times.looped, 0.0, hessians, "estimated")


def measure_reserve(trainer: Trainer) -> Reserve | None:
    """By doing it once: on every rank, rank 0's seconds count. None without a cap. The trainer stays as it was."""
    schedule, main = trainer.recipe.schedule, trainer.ranks.main_float
    if schedule.seconds is None:
        return None
    hessians = _hessian_seconds(trainer) if schedule.hessian_seconds == "auto" else 0.0
    parts = main(_last_step_seconds(trainer)), main(_snapshot_seconds(trainer)), main(hessians)
    return make_reserve(schedule, *parts, "measured")


def resumed_reserve(schedule: ScheduleSettings, facts: Mapping[str, Any] | None) -> Reserve | None:
    """The reserve that a checkpoint's run began with, so that progress goes on; a number in the recipe acts anew."""
    if schedule.seconds is None or facts is None:
        return None
    seconds = float(facts["seconds"]) if schedule.reserve_seconds == "auto" else schedule.reserve_seconds
    return replace(Reserve(**facts), seconds=seconds)


def _seconds_of(trainer: Trainer, work: Callable[[], object]) -> float:
    """The faster of two runs: the first also pays for warming up."""
    found = []
    for _ in range(2):
        _synchronize(trainer.device)
        started = time.perf_counter()
        work()
        _synchronize(trainer.device)
        found.append(time.perf_counter() - started)
    return min(found)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _synthetic_tokens(trainer: Trainer, num_tokens: int) -> torch.Tensor:  # (windows, seq_len) int64
    """Random tokens; they come from no text, and no other random number is changed."""
    seq_len = trainer.recipe.data.seq_len
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, num_tokens // seq_len), seq_len)
    return torch.randint(trainer.data.vocab_size, shape, generator=generator)


def _last_step_seconds(trainer: Trainer) -> float:
    """Forward and backward of a whole step on this rank, all loops on."""
    before, tokens = trainer.model.graph, _synthetic_tokens(trainer, trainer.micro_tokens)
    trainer.update_graph(1.0)
    seconds = _seconds_of(trainer, lambda: trainer._loss(tokens, tokens).backward())
    trainer.model.set_graph(before)
    trainer.model.zero_grad(set_to_none=True)
    return seconds * trainer.recipe.data.batch_tokens / (trainer.micro_tokens * trainer.ranks.world_size)


def _snapshot_seconds(trainer: Trainer) -> float:
    """Copying every view and moment to the host, reckoned from one copy of the weights."""
    weights, optim = list(trainer.model.parameters()), trainer.recipe.optim
    copies = 1 + bool(optim.ema_decay) + (optim.swa_start is not None) + len(optim.power_ema_sigmas)
    moments = 2 if trainer.recipe.checkpoint.optimizer_state else 0  # AdamW's; Muon has one
    seconds = _seconds_of(trainer, lambda: [weight.detach().to("cpu", copy=True) for weight in weights])
    return seconds * (copies + moments)


@torch.no_grad()
def _hessian_seconds(trainer: Trainer) -> float:
    """Collecting Hessians as `pgolf_post.calibrate` does, on the training device, reckoned from one batch."""
    trained, tokens = trainer.model, _synthetic_tokens(trainer, FORWARD_TOKENS).to(trainer.device)
    graph = trained.graph.model_copy(update={"active_loops": trained.config.max_active_loops})
    with torch.device("meta"):  # nothing is drawn, nothing is copied
        module = GolfGPT(trained.config, graph)
    module.load_state_dict({name: tensor.float() for name, tensor in trained.state_dict().items()}, assign=True)
    sites = GolfGPTFamily().sites(module)
    seconds = _seconds_of(trainer, lambda: forward_batch(module, sites, tokens, Sums()))
    return seconds * max(1, trainer.recipe.schedule.hessian_tokens // tokens.numel())
