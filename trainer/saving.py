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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from trainer.averages import snapshots_due
from trainer.model import GolfGPT
from trainer.phases import PERIODIC
from trainer.retention import apply_retention, checkpoints_of

if TYPE_CHECKING:
    from trainer.config import Recipe
    from trainer.loop import Trainer


def config_of(trainer: Trainer) -> dict[str, Any]:
    """config.json: what rebuilds the model as it is now, runtime graph state included."""
    return {
        "family": "golf_gpt",
        "model": trainer.model.config.model_dump(mode="json"),
        "graph": trainer.model.graph.model_dump(mode="json"),
        "tokenizer": {"sha256": trainer.data.tokenizer_sha256, "vocab_size": trainer.data.vocab_size},
        "data": {"manifest_sha256": trainer.data.manifest_sha256},
    }


def views_of(trainer: Trainer) -> dict[ViewName, dict[str, Tensor]]:
    """The raw weights and the averages that are kept; an average has the raw weights' buffers, if any."""
    raw = dict(trainer.model.state_dict())
    views: dict[ViewName, dict[str, Tensor]] = {"raw": raw}
    if trainer.ema:
        views["ema"] = {**raw, **trainer.ema.shadow}
    if trainer.swa and trainer.swa.count:
        views["swa"] = {**raw, **trainer.swa.mean}
    return views


def meta_of(trainer: Trainer, phase: str) -> dict[str, Any]:
    """meta.json: where this moment stands in the run, and where the run comes from."""
    recipe = trainer.recipe
    return {
        "kind": "raw",
        "run": recipe.run.name,
        "phase": phase,
        "step": trainer.step,
        "progress": trainer.progress,
        "tokens_seen": trainer.step * recipe.data.batch_tokens,
        "train_seconds": trainer.train_seconds,
        "wall_seconds": trainer.wall_seconds,
        "ledger": trainer.phase_times.as_facts(recipe.schedule.seconds),
        "reserve": asdict(trainer.reserve) if trainer.reserve else None,
        "checkpoint_waits": trainer.waits.record(),
        "swa_count": trainer.swa.count if trainer.swa else 0,
        "seed": recipe.run.seed,
        "data_position": {"next_step": trainer.step},
        "rng": "none: the data order is a function of seed and step, and training draws no other random numbers",
        "precision": "bf16 autocast" if trainer.dtype else recipe.run.precision.replace("auto", "fp32"),
        "parents": trainer.parents,
        "data_dir": str(recipe.data.dir),
        "recipe": recipe.model_dump(mode="json"),
        **trainer.provenance,
    }


def measure_view(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Score one view as `checkpoint verify` will: float32, plain, the first metric_tokens of validation."""
    module = GolfGPT(trainer.model.config, trainer.model.graph).to(trainer.device)
    module.load_state_dict(tensors)
    return measure_module(module.eval(), trainer.data, metric_protocol(trainer.recipe))


def metric_protocol(recipe: Recipe) -> PlainProtocol:
    """How a run's recorded metrics are measured."""
    return PlainProtocol(seq_len=recipe.data.seq_len, max_tokens=recipe.checkpoint.metric_tokens)


# ---- saving --------------------------------------------------------------------------------------------------------


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory that the next step cannot change; from a GPU, page-locked and at the bus's full speed.

    They are there when this returns: waiting some 20 ms for them here keeps them off the next step's clock.
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
class Snapshot:
    """A moment of a run in host memory, complete but for its folder."""

    path: Path
    config: dict[str, Any]
    views: dict[ViewName, dict[str, Tensor]]
    metrics: dict[str, dict[str, Any]]  # empty where scoring is put off
    training: dict[str, Tensor] | None
    meta: dict[str, Any] = field(default_factory=dict)


def save(trainer: Trainer, phase: str) -> Path:
    """Hand this moment to the writer; returns where its folder will be. Raises what an earlier write raised.

    Rank 0 writes; optimizer state that ranks share out is gathered by all.
    """
    path = trainer.run_dir / f"step_{trainer.step:06d}-{phase}"
    if phase != PERIODIC:
        _save_tracks(trainer)  # so that averages of other lengths can end here too
    training = training_state(trainer)
    if trainer.ranks.is_main:
        snapshot = take_snapshot(trainer, path, phase, training)
        trainer.waits.waited_seconds += trainer.writer.submit(partial(_write, trainer, snapshot))
    trainer.ranks.wait()
    return path


def training_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """What only training needs: the optimizer's moments and the power-function averages. None where it is not kept."""
    if not trainer.recipe.checkpoint.optimizer_state:
        return None
    state = trainer.optimizer.state()
    return {**state, **trainer.power_ema.state()} if trainer.power_ema else state


def take_snapshot(trainer: Trainer, path: Path, phase: str, training: dict[str, Tensor] | None) -> Snapshot:
    """Score and copy; the writer's room is waited for first, so that at most max_in_flight snapshots are in memory."""
    waits, settings, views = trainer.waits, trainer.recipe.checkpoint, views_of(trainer)
    waits.waited_seconds += trainer.writer.make_room()
    metrics: dict[str, dict[str, Any]] = {}
    if settings.metric == "each" or (settings.metric == "final" and phase == "final"):
        with waits.scoring(), trainer.phase_times.phase("scoring"):
            metrics = {name: measure_view(trainer, tensors) for name, tensors in views.items()}
    with waits.snapshot():
        copies = {name: host_copies(tensors) for name, tensors in views.items()}
        held = None if training is None else host_copies(training)
        snapshot = Snapshot(path, config_of(trainer), copies, metrics, held)
    snapshot.meta = meta_of(trainer, phase)
    return snapshot


def _write(trainer: Trainer, snapshot: Snapshot) -> None:
    """The writer's half."""
    root, metrics = trainer.recipe.run.checkpoint_root, snapshot.metrics
    checkpoint = save_checkpoint(
        snapshot.path, snapshot.config, snapshot.views, snapshot.meta, metrics, snapshot.training
    )
    _point_latest(root, checkpoint)
    say(f"saved {checkpoint.path}" + (f"  bpb {_bpb_line(metrics)}" if metrics else ""))
    apply_retention(root, trainer.run_dir, trainer.recipe.checkpoint)


def _bpb_line(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    bpb = "  ".join(f"{name} {metric['bpb']:.4f}" for name, metric in metrics.items())
    return f"on {metrics['raw']['tokens']:,} validation tokens: {bpb}"


def save_power_ema(trainer: Trainer, before: float) -> None:
    """Hand snapshots of the power-function averages to the writer, if the step from progress `before` made them due."""
    if snapshots_due(before, trainer.progress, trainer.recipe.optim.power_ema_snapshots):
        _save_tracks(trainer)


def _save_tracks(trainer: Trainer) -> None:
    """Snapshots of this step, unless they were taken already."""
    if not trainer.power_ema or not trainer.ranks.is_main or trainer.snapshot_step == trainer.step:
        return
    waits, trainer.snapshot_step = trainer.waits, trainer.step
    waits.waited_seconds += trainer.writer.make_room()
    with waits.snapshot():
        copies = {sigma: host_copies(track) for sigma, track in trainer.power_ema.tracks.items()}
    moment = (trainer.step, trainer.progress, trainer.model.graph.model_dump(mode="json"))
    waits.waited_seconds += trainer.writer.submit(partial(_write_power_ema, trainer.run_dir, *moment, copies))


def _write_power_ema(
    run: Path, step: int, at: float, graph: dict[str, Any], tracks: dict[float, dict[str, Tensor]]
) -> None:
    for sigma, track in tracks.items():
        write_snapshot(run, step, sigma, at, graph, track)


def score_saved(trainer: Trainer) -> None:
    """Score what was saved unscored, as re-read from disk, and complete each meta.json: checkpoint.metric = "end"."""
    with trainer.waits.scoring():
        for checkpoint in checkpoints_of(trainer.recipe.run.checkpoint_root, trainer.run_dir):
            path, views = checkpoint.path, checkpoint.meta["views"]
            if all(view.get("metric") for view in views.values()):
                continue
            measured = {name: _measure_saved(trainer, checkpoint, name) for name in views}
            completed = {name: {**view, "metric": measured[name]} for name, view in views.items()}
            with atomic_file(path / "meta.json") as building:
                write_json(building, {**checkpoint.meta, "views": completed})
            say(f"scored {path}  bpb {_bpb_line(measured)}")


def _measure_saved(trainer: Trainer, checkpoint: Checkpoint, name: ViewName) -> dict[str, Any]:
    view = checkpoint.load(name)
    module = load_module(view.config, view.tensors, str(view)).to(trainer.device)
    return measure_module(module, trainer.data, metric_protocol(trainer.recipe))


def _point_latest(root: Path, checkpoint: Checkpoint) -> None:
    """Point `latest` at a saved checkpoint. Raises PgolfError if the link cannot be made."""
    try:
        point_latest(root, checkpoint)
    except OSError as error:
        raise PgolfError(
            f"saved {checkpoint.path}, but could not point {root / 'latest'} at it: {error}",
            hint=f"move {root / 'latest'} away if it is not a link, then go on with --resume {checkpoint.path}",
        ) from error
