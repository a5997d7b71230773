"""The words and numbers of a run: the line of a step in train.jsonl, and the line at the end."""

from __future__ import annotations

from typing import Any

from pgolf_post.checkpoint import Checkpoint
from trainer.run.state import RunState
from trainer.schedule.functions import lr_multiplier, weight_decay_multiplier


def step_record(
    state: RunState,
    loss: float,  # nats per token
    minimised: float | None,  # the objective, where that is not the nats
    norm: float,  # of the gradient, before clipping
    at: float,  # progress at which the step began
) -> dict[str, Any]:
    """Return the JSON line of the step that is done."""
    schedule, multiplier = state.recipe.schedule, lr_multiplier(state.recipe.schedule, at)
    return {
        "step": state.step,
        "loss": round(loss, 6),
        **({} if minimised is None else {"objective": round(minimised, 6)}),
        "grad_norm": round(norm, 6),
        "lr_multiplier": round(multiplier, 6),
        "lr": {group: round(lr, 9) for group, lr in state.optimizer.learning_rates(multiplier, at).items()},
        "momentum": round(state.recipe.optim.momentum_for(state.step - 1), 6),
        "weight_decay_multiplier": round(weight_decay_multiplier(schedule, at), 6),
        "active_loops": state.model.graph.active_loops,
        "tokens_per_second": round(state.clock.recent_rate(), 1),
        "mean_tokens_per_second": round(mean_rate(state), 1),
        **({"tokens_seen": state.tokens_seen} if state.recipe.schedule.stages else {}),
        "train_seconds": round(state.train_seconds, 3),
        "wall_seconds": state.wall_seconds,
        **state.waits.record(),
    }


def mean_rate(state: RunState) -> float:
    """Return training tokens per second over the whole run, resumed parts included."""
    return state.tokens_seen / max(state.train_seconds, 1e-9)


def summary(state: RunState, loss: float, final: Checkpoint) -> str:
    """Return in one line how much was trained, how long it took, how fast it was and how good the result is."""
    bpb = ", ".join(f"{name} {view['metric']['bpb']:.4f}" for name, view in final.meta["views"].items())
    return (
        f"done: {state.step:,} steps, {state.tokens_seen:,} tokens, "
        f"{state.train_seconds:.1f} s of training in {state.wall_seconds:.1f} s, "
        f"{mean_rate(state):,.0f} tokens/s, {state.waits}, "
        f"last loss {loss:.4f}, bpb {bpb}"
    )
