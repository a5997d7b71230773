"""A moment of a run as a checkpoint folder, and a run taken up again from one.

What is saved is all that a run is: the raw weights and the averages that are kept (views), the optimizer's moments, the
clock and the data position. `restore` puts the same things back, so that a resumed run is bit for bit the run that was
never stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from pgolf_post.errors import MismatchError, NotFoundError, PgolfError
from pgolf_post.progress import say
from pgolf_post.score.metric import measure_module
from pgolf_post.score.plain import PlainProtocol
from trainer.architecture import GraphState
from trainer.log import StepClock
from trainer.model import GolfGPT

if TYPE_CHECKING:
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
    recipe = trainer.recipe
    protocol = PlainProtocol(seq_len=recipe.data.seq_len, max_tokens=recipe.checkpoint.metric_tokens)
    module = GolfGPT(trainer.model.config, trainer.model.graph).to(trainer.device)
    module.load_state_dict(tensors)
    return measure_module(module.eval(), trainer.data, protocol)


def save(trainer: Trainer, phase: str) -> Checkpoint:
    """Write this moment as a folder and point `latest` at it; rank 0 does, the others wait for it."""
    path = trainer.run_dir / f"step_{trainer.step:06d}-{phase}"
    if trainer.ranks.is_main:
        _write(trainer, path, phase)
    trainer.ranks.wait()
    return Checkpoint.open(path)


def _write(trainer: Trainer, path: Path, phase: str) -> None:
    views = views_of(trainer)
    metrics: dict[str, dict[str, Any]] = {name: measure_view(trainer, tensors) for name, tensors in views.items()}
    training = trainer.optimizer.state() if trainer.recipe.checkpoint.optimizer_state else None
    checkpoint = save_checkpoint(path, config_of(trainer), views, meta_of(trainer, phase), metrics, training)
    _point_latest(trainer.recipe.run.checkpoint_root, checkpoint)
    bpb = "  ".join(f"{name} {metric['bpb']:.4f}" for name, metric in metrics.items())
    say(f"saved {path}  bpb on {metrics['raw']['tokens']:,} validation tokens: {bpb}")


def _point_latest(root: Path, checkpoint: Checkpoint) -> None:
    """Point `latest` at a saved checkpoint. Raises PgolfError if the link cannot be made."""
    try:
        point_latest(root, checkpoint)
    except OSError as error:
        raise PgolfError(
            f"saved {checkpoint.path}, but could not point {root / 'latest'} at it: {error}",
            hint=f"move {root / 'latest'} away if it is not a link, then go on with --resume {checkpoint.path}",
        ) from error


# ---- resuming ------------------------------------------------------------------------------------------------------


def restore(trainer: Trainer, path: Path) -> None:
    """Put a trainer where a checkpoint of the same recipe stands: weights, moments, averages, position and clock.

    Raises NotFoundError if the folder has no optimizer state, MismatchError if its model or data is another.
    """
    checkpoint = Checkpoint.open(path)
    if not (checkpoint.path / TRAINING_FILE).is_file():
        raise NotFoundError(f"{checkpoint.path} has no {TRAINING_FILE}; only folders that keep it can be resumed")
    theirs, ours = complete_config(checkpoint.config), config_of(trainer)
    if theirs["model"] != ours["model"] or theirs["data"] != ours["data"]:
        raise MismatchError(f"{checkpoint.path}: its model or data is not this recipe's; it cannot be resumed with it")
    trainer.model.load_state_dict(dict(checkpoint.load("raw").tensors))
    _restore_averages(trainer, checkpoint)
    trainer.optimizer.load_state(read_tensors(checkpoint.path / TRAINING_FILE), str(checkpoint.path))
    trainer.model.set_graph(GraphState(**checkpoint.config["graph"]))
    trainer.step = int(checkpoint.meta["step"])
    trainer.train_seconds = float(checkpoint.meta["train_seconds"])
    trainer.earlier_wall_seconds = float(checkpoint.meta.get("wall_seconds", 0.0))
    trainer.clock = StepClock(trainer.recipe.data.batch_tokens, trainer.train_seconds)
    trainer.parents = [checkpoint.view_id("raw")]
    trainer.phases.skip_past(trainer.step, trainer.progress)
    say(f"resumed {checkpoint.path} at step {trainer.step}, {100 * trainer.progress:.1f} % of the run")


def _restore_averages(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Take up the averages where the checkpoint left them. Raises NotFoundError if it lacks a kept EMA."""
    device = trainer.device
    if trainer.ema:
        shadow = checkpoint.load("ema").tensors
        trainer.ema.shadow = {name: shadow[name].to(device, copy=True) for name in trainer.ema.shadow}
    start, count = trainer.recipe.optim.swa_start, int(checkpoint.meta.get("swa_count", 0))
    if start is not None and not count and float(checkpoint.meta.get("progress", 0.0)) > start:
        say(f"{checkpoint.path} holds no running mean; one starts at step {checkpoint.meta['step']}")
    if trainer.swa and count:
        mean = checkpoint.load("swa").tensors
        trainer.swa.count = count
        trainer.swa.mean = {name: mean[name].to(device, copy=True) for name in trainer.swa.parameters}
