"""A moment of a run as a checkpoint folder, written while training goes on.

What is saved is all that a run is: the raw weights and the averages that are kept (views), the optimizer's moments, the
clock and the data position. Saving has two halves. Training waits for the first: scoring the views (unless
checkpoint.metric puts that off) and copying tensors to host memory. A thread does the second: hashing, writing,
flushing, the rename that makes the folder appear, `latest`, and retention. Folders appear in the order of their steps,
and snapshots of power-function averages keep their place among them: a checkpoint that is there has every snapshot
before it. How long training waited, and for what, is in meta.json and train.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.average.snapshots import write_snapshot
from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file, write_json
from pgolf_post.checkpoint import Checkpoint, ViewName, point_latest, save_checkpoint
from pgolf_post.errors import PgolfError
from pgolf_post.families import load_module
from pgolf_post.score.metric import measure_module
from pgolf_post.score.plain import PlainProtocol
from trainer.config import Recipe
from trainer.model.gpt import GolfGPT
from trainer.optim.averages import snapshots_due
from trainer.run.background import BackgroundWriter
from trainer.run.phases import INTERRUPTED, PERIODIC
from trainer.run.retention import apply_retention, checkpoints_of
from trainer.run.state import RunState
from trainer.step.future_heads import state_of

RANDOM_STATE = "none: data order and noise are functions of seed and step, and training draws no other random numbers"


def meta_of(state: RunState, phase: str) -> dict[str, Any]:
    """Return meta.json: where this moment stands in the run, and where the run comes from."""
    recipe = state.recipe
    return {
        "kind": "raw",
        "run": recipe.run.name,
        "phase": phase,
        **state.facts(),
        "seed": recipe.run.seed,
        "data_position": {"next_step": state.step},
        "rng": RANDOM_STATE,
        "precision": "bf16 autocast" if state.autocast else recipe.run.precision.replace("auto", "fp32"),
        "parents": state.parents,
        "data_dir": str(recipe.data.dir),
        "recipe": recipe.model_dump(mode="json"),
        **state.provenance,
        **_qat_of(state),
    }


def _qat_of(state: RunState) -> dict[str, Any]:
    """Return what is known of rounding on the way, and whether the next step is rounded; nothing where it is off."""
    rounding = state.rounding
    if rounding is None:
        return {}
    return {"qat": {**state.provenance["qat"], **rounding.now(), "acts": rounding.acts(state.progress)}}


def measure_view(state: RunState, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Score one view as `checkpoint verify` will: float32, plain, the first metric_tokens of validation."""
    module = GolfGPT(state.model.config, state.model.graph).to(state.device)
    module.load_state_dict(tensors)
    return measure_module(module.eval(), state.data, metric_protocol(state.recipe))


def metric_protocol(recipe: Recipe) -> PlainProtocol:
    """Return the protocol by which a run's recorded metrics are measured."""
    return PlainProtocol(seq_len=recipe.longest_seq_len, max_tokens=recipe.checkpoint.metric_tokens)


# ---- saving --------------------------------------------------------------------------------------------------------


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in host memory that the next step cannot change; from a GPU, page-locked and at full bus speed.

    They are complete when this returns: waiting some 20 ms here keeps the transfer off the next step's clock.
    """
    copies, on_gpu = {}, False
    for name, tensor in tensors.items():
        page_locked = tensor.device.type == "cuda"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=page_locked)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=page_locked)
        on_gpu = on_gpu or page_locked
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    return copies


@dataclass
class PendingCheckpoint:
    """A checkpoint in host memory, complete but for its folder."""

    path: Path
    config: dict[str, Any]
    views: dict[ViewName, dict[str, Tensor]]
    metrics: dict[str, dict[str, Any]]  # by view; empty where scoring is put off
    training: dict[str, Tensor] | None  # None where optimizer state is not kept
    meta: dict[str, Any]


def save(state: RunState, writer: BackgroundWriter, phase: str) -> Path:
    """Hand this moment to the writer and return where its folder will be. Raises what an earlier write raised.

    Rank 0 writes; optimizer state that ranks share out is gathered by all.
    """
    path = state.run_dir / f"step_{state.step:06d}-{phase}"
    if state.ranks.main_says(phase == INTERRUPTED and (path / "meta.json").is_file()):
        return path  # the same run was stopped here before
    if phase != PERIODIC:
        _save_power_ema(state, writer)  # so that averages of other lengths can end here too
    training = training_state(state)
    if state.ranks.is_main:
        state.waits.waited_seconds += writer.make_room()  # first, so that at most max_in_flight are in memory
        pending = prepare_checkpoint(state, path, phase, training)
        state.waits.waited_seconds += writer.submit(partial(_write, state.recipe, pending))
    state.ranks.wait()
    return path


def training_state(state: RunState) -> dict[str, Tensor] | None:
    """Return the tensors that only training needs, moments, power-function averages and heads, if kept."""
    if not state.recipe.checkpoint.optimizer_state:
        return None
    moments, power_ema = state.optimizer.state(), state.averages.power_ema
    curvature = state.rounding.state() if state.rounding else {}
    return {**moments, **(power_ema.state() if power_ema else {}), **state_of(state.heads), **curvature}


def prepare_checkpoint(
    state: RunState, path: Path, phase: str, training: dict[str, Tensor] | None
) -> PendingCheckpoint:
    """Score the views, where the recipe says so, and copy all tensors to host memory."""
    waits, when, views = state.waits, state.recipe.checkpoint.metric, state.averages.views(state.model.state_dict())
    metrics: dict[str, dict[str, Any]] = {}
    if (when == "each" and phase != INTERRUPTED) or (when == "final" and phase == "final"):
        with waits.scoring(), state.phase_times.phase("scoring"):
            metrics = {name: measure_view(state, tensors) for name, tensors in views.items()}
    with waits.snapshot():
        copies = {name: host_copies(tensors) for name, tensors in views.items()}
        held = None if training is None else host_copies(training)
        config = state.config()
    return PendingCheckpoint(path, config, copies, metrics, held, meta_of(state, phase))  # meta last: it has the waits


def _write(recipe: Recipe, pending: PendingCheckpoint) -> None:
    """Write a folder, point `latest` at it and delete what retention lets go of: the writer's half of saving."""
    root, metrics = recipe.run.checkpoint_root, pending.metrics
    checkpoint = save_checkpoint(pending.path, pending.config, pending.views, pending.meta, metrics, pending.training)
    _point_latest(root, checkpoint)
    say(f"saved {checkpoint.path}" + (f"  bpb {_bpb_line(metrics)}" if metrics else ""))
    apply_retention(root, recipe.run.folder, recipe.checkpoint)


def _bpb_line(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    bpb = "  ".join(f"{name} {metric['bpb']:.4f}" for name, metric in metrics.items())
    return f"on {metrics['raw']['tokens']:,} validation tokens: {bpb}"


def save_power_ema_if_due(state: RunState, writer: BackgroundWriter, before: float) -> None:
    """Hand snapshots of the power-function averages to the writer, if the step from progress `before` made them due."""
    if snapshots_due(before, state.progress, state.recipe.optim.power_ema_snapshots):
        _save_power_ema(state, writer)


def _save_power_ema(state: RunState, writer: BackgroundWriter) -> None:
    """Hand over snapshots of this step, unless they were taken already."""
    power_ema = state.averages.power_ema
    if not power_ema or not state.ranks.is_main or state.snapshot_step == state.step:
        return
    waits, state.snapshot_step = state.waits, state.step
    waits.waited_seconds += writer.make_room()
    with waits.snapshot():
        copies = {sigma: host_copies(track) for sigma, track in power_ema.tracks.items()}
    moment = (state.step, state.progress, state.model.graph.model_dump(mode="json"))
    waits.waited_seconds += writer.submit(partial(_write_power_ema, state.run_dir, *moment, copies))


def _write_power_ema(
    run: Path, step: int, at: float, graph: dict[str, Any], tracks: dict[float, dict[str, Tensor]]
) -> None:
    for sigma, track in tracks.items():
        write_snapshot(run, step, sigma, at, graph, track)


def score_saved(state: RunState) -> None:
    """Score what was saved unscored, as re-read from disk, and complete each meta.json: checkpoint.metric = "end"."""
    with state.waits.scoring():
        for checkpoint in checkpoints_of(state.recipe.run.checkpoint_root, state.run_dir):
            path, views = checkpoint.path, checkpoint.meta["views"]
            if all(view.get("metric") for view in views.values()):
                continue
            measured = {name: _measure_saved(state, checkpoint, name) for name in views}
            completed = {name: {**view, "metric": measured[name]} for name, view in views.items()}
            with atomic_file(path / "meta.json") as building:
                write_json(building, {**checkpoint.meta, "views": completed})
            say(f"scored {path}  bpb {_bpb_line(measured)}")


def _measure_saved(state: RunState, checkpoint: Checkpoint, name: ViewName) -> dict[str, Any]:
    view = checkpoint.load(name)
    module = load_module(view.config, view.tensors, str(view)).to(state.device)
    return measure_module(module, state.data, metric_protocol(state.recipe))


def _point_latest(root: Path, checkpoint: Checkpoint) -> None:
    """Point `latest` at a saved checkpoint. Raises PgolfError if the link cannot be made."""
    try:
        point_latest(root, checkpoint)
    except PgolfError as error:
        raise PgolfError(
            f"saved {checkpoint.path}, but could not point {root / 'latest'} at it: {error}",
            hint=f"move {root / 'latest'} away if it is not a link, then go on with --resume {checkpoint.path}",
        ) from error
