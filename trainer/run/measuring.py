"""Measuring the reserve under a cap, before the clock starts: each of its parts is done once on synthetic tokens.

`trainer.run.reserve` says what the parts are for. The state of the run stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf_post.base.autocast import autocast_dtype, autocast_to
from pgolf_post.calibrate.collect import FORWARD_TOKENS
from pgolf_post.calibrate.forward import forward_batch
from pgolf_post.calibrate.sums import Sums
from pgolf_post.families import on_no_device
from trainer.family import GolfGPTFamily
from trainer.model.gpt import GolfGPT
from trainer.run.reserve import Reserve, make_reserve
from trainer.run.state import RunState
from trainer.schedule.clock import TIMERS
from trainer.step.gradients import GradientAccumulator, micro_batch_tokens


def measure_reserve(state: RunState, gradients: GradientAccumulator) -> Reserve | None:
    """Return the reserve measured on every rank, rank 0's seconds; None without a cap.

    Raises SettingsError if the cap leaves no time to train in.
    """
    schedule, main = state.recipe.schedule, state.ranks.main_float
    if schedule.seconds is None:
        return None
    hessians = _hessian_seconds(state) if schedule.hessian_seconds == "auto" else 0.0
    parts = main(_last_step_seconds(state, gradients)), main(_snapshot_seconds(state)), main(hessians)
    return make_reserve(schedule, *parts, "measured")


def _last_step_seconds(state: RunState, gradients: GradientAccumulator) -> float:
    """Return the seconds of forward and backward of a whole step on this rank, all loops on."""
    stage, world_size = state.recipe.stages[-1], state.ranks.world_size
    micro_tokens = micro_batch_tokens(state.recipe, world_size, stage)
    before, tokens = state.model.graph, _synthetic_tokens(state, micro_tokens)
    state.update_graph(1.0)
    seconds = _seconds_of(state, lambda: gradients.accumulate([(tokens, tokens)]))
    state.model.set_graph(before)
    state.clear_gradients()
    return seconds * stage.batch_tokens / (micro_tokens * world_size)


def _snapshot_seconds(state: RunState) -> float:
    """Return the seconds of copying every view and moment to the host, reckoned from one copy of the weights."""
    weights, optim = list(state.model.parameters()), state.recipe.optim
    copies = 1 + bool(optim.ema_decay) + (optim.swa_start is not None) + len(optim.power_ema_sigmas)
    moments = 2 if state.recipe.checkpoint.optimizer_state else 0  # AdamW's; Muon has one
    seconds = _seconds_of(state, lambda: [weight.detach().to("cpu", copy=True) for weight in weights])
    return seconds * (copies + moments)


@torch.no_grad()
def _hessian_seconds(state: RunState) -> float:
    """Return the seconds of collecting Hessians as `pgolf_post.calibrate` does, reckoned from one batch."""
    trained, tokens = state.model, _synthetic_tokens(state, FORWARD_TOKENS[state.device.type]).to(state.device)
    # A float32 model on the same weights, all loops on: nothing is drawn, and nothing copied that is float32 already.
    graph = trained.graph.model_copy(update={"active_loops": trained.config.max_active_loops})
    with on_no_device():
        module = GolfGPT(trained.config, graph)
    module.load_state_dict({name: tensor.float() for name, tensor in trained.state_dict().items()}, assign=True)
    sites = GolfGPTFamily().sites(module)
    dtype = autocast_dtype("auto", state.device)
    with autocast_to(state.device, dtype):
        seconds = _seconds_of(
            state, lambda: forward_batch(module, sites, tokens, Sums(products_in=dtype or torch.float32))
        )
    return seconds * max(1, state.recipe.schedule.hessian_tokens // tokens.numel())


def _seconds_of(state: RunState, work: Callable[[], object]) -> float:
    """Return the faster of two runs, in seconds of the schedule's clock: the first also pays for warming up."""
    seconds, device, now = list[float](), state.device, TIMERS[state.schedule_clock.name]
    for _ in range(2):
        _synchronize(device)
        started = now()
        work()
        _synchronize(device)
        seconds.append(now() - started)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _synthetic_tokens(state: RunState, num_tokens: int) -> Tensor:  # (windows, seq_len) int64
    """Draw random tokens from a generator of their own: no text, and no other random number changes."""
    seq_len = state.recipe.stages[-1].seq_len
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, num_tokens // seq_len), seq_len)
    return torch.randint(state.data.vocab_size, shape, generator=generator)
