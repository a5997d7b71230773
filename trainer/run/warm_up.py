"""The warm-up before the clock starts: whole steps on synthetic tokens with every graph that the run will use.

Depth recurrence changes the graph in the middle of a run, and a graph that is compiled when it first appears costs
minutes of a ten-minute run. So before the clock starts, every graph that the schedule will reach takes some whole steps
on synthetic tokens; then weights, moments, gradients, random state and graph are put back bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.data.tokenizer import BOS_ID
from trainer.run.state import RunState
from trainer.schedule.functions import active_loops_at
from trainer.schedule.stages import stage_at
from trainer.step.compiled import num_compiled_graphs
from trainer.step.future_heads import load_heads, state_of
from trainer.step.gradients import GradientAccumulator, micro_batch_tokens

DEFAULT_WARMUP_STEPS = 2  # of each graph, where the loss is compiled
SYNTHETIC_DOCUMENT = 64  # mean length of synthetic documents, in tokens


def warm_up(state: RunState, gradients: GradientAccumulator) -> dict[str, Any]:
    """Take `run.warmup_steps` optimizer steps on synthetic tokens with every graph ahead; the state stays as it was.

    Return what meta.json says of it: steps of each graph, the graphs by their active loops, seconds, and how many
    graphs torch had compiled by then.
    """
    started, recipe = time.perf_counter(), state.recipe
    steps, loops = num_warmup_steps(state, gradients.compiled), graphs_ahead(state)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    if steps:
        say(f"warming up: {steps} steps of synthetic tokens with {loops} active loops, not on the training clock")
        with state_restored(state):
            for active_loops, shape in product(loops, shapes_ahead(state)):
                state.set_active_loops(active_loops)
                for _ in range(steps):
                    rehearse(state, gradients, *synthetic_batch(state.data.vocab_size, *shape, generator))
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
    return {
        "steps_per_graph": steps,
        "active_loops": loops if steps else [],
        "seconds": round(time.perf_counter() - started, 3),
        "compiled_graphs": num_compiled_graphs() if gradients.compiled else 0,
    }


def num_warmup_steps(state: RunState, compiled: bool) -> int:
    """Return the warm-up steps of each graph: as the recipe says, else what compiling needs."""
    steps = state.recipe.run.warmup_steps
    if steps is None:
        return DEFAULT_WARMUP_STEPS if compiled else 0
    return steps


def graphs_ahead(state: RunState) -> list[int]:
    """Return the numbers of active loops that a run reaches from where it is on, ascending."""
    schedule, at = state.recipe.schedule, state.progress
    switches = [share for share in (schedule.loops_at, schedule.all_loops_at) if share is not None and share > at]
    max_loops = state.model.config.max_active_loops
    return sorted({active_loops_at(schedule, max_loops, share) for share in (at, *switches, 1.0)})


def shapes_ahead(state: RunState) -> list[tuple[int, int]]:
    """Return windows and tokens of a window of every micro-batch on this rank that is ahead, the next first."""
    now = stage_at(state.recipe.stages, state.progress)  # which the next step enters, if it is not the place's
    stages = [stage for stage in state.recipe.stages if stage.at >= now.at]
    shapes, halved = [], state.recipe.meta_ttt is not None
    for stage in stages:
        windows = micro_batch_tokens(state.recipe, state.ranks.world_size, stage) // stage.seq_len
        shapes += [(windows, stage.seq_len), *([(windows // 2, stage.seq_len)] if halved else [])]
    return list(dict.fromkeys(shapes))


def synthetic_batch(
    vocab_size: int, batch: int, seq_len: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # inputs, targets, each (batch, seq_len) int64
    """Draw uniform tokens with a BOS here and there: no text, not even as a shape."""
    tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / SYNTHETIC_DOCUMENT] = BOS_ID
    return tokens[:, :-1], tokens[:, 1:]


def rehearse(state: RunState, gradients: GradientAccumulator, inputs: Tensor, targets: Tensor) -> None:
    """Take an optimizer step on one given micro-batch, each tensor (batch, seq_len) int64, off the record."""
    gradients.accumulate([(inputs, targets)])
    state.optimizer.step(1.0, state.recipe.optim.momentum_for(state.step))


@contextmanager
def state_restored(state: RunState) -> Iterator[None]:
    """Put weights, moments, random state and graph back, bit for bit, and drop gradients, when the block is left."""
    model, optimizer = state.model, state.optimizer
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = {name: tensor.clone() for name, tensor in state_of(state.heads).items()}
    moments = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    graph, devices = model.graph, [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    model.load_state_dict(weights)
    optimizer.adam.state.clear()  # moments that had not begun do not begin
    optimizer.load_state(moments, "the state before warm-up")
    load_heads(state.heads, heads)
    state.clear_gradients()
    model.set_graph(graph)


def say_late_graphs(compiled: bool, warmed: dict[str, Any]) -> None:
    """Say so if torch compiled during training a graph that the warm-up should have covered."""
    late = num_compiled_graphs() - warmed["compiled_graphs"] if compiled else 0
    if late:
        say(
            f"{late} graphs were compiled on the training clock; raise run.warmup_steps if it is 0, else see TORCH_LOGS"
        )
