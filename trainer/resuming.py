"""A run taken up again from a checkpoint folder: `restore` puts back what `saving.save` took.

A resumed run is bit for bit the run that was never stopped. Snapshots of averages that a killed run took after the
checkpoint go; where the resumed run has another name, those that its past is made of come along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_post.average.snapshots import adopt_snapshots, drop_snapshots_after
from pgolf_post.base.progress import say
from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, complete_config, read_tensors
from pgolf_post.errors import MismatchError, NotFoundError
from trainer.architecture import GraphState
from trainer.background import Waits
from trainer.log import StepClock
from trainer.reserve import resumed_reserve
from trainer.saving import config_of

if TYPE_CHECKING:
    from trainer.loop import Trainer


def restore(trainer: Trainer, path: Path) -> None:
    """Put a trainer where a checkpoint of the same recipe stands: weights, moments, averages, position and clock.

    Raises NotFoundError if the folder has no optimizer state, MismatchError if its model or data is another.
    """
    checkpoint = Checkpoint.open(path)
    if not (checkpoint.path / TRAINING_FILE).is_file():
        raise NotFoundError(f"{checkpoint.path} has no {TRAINING_FILE}; only folders that keep it can be resumed")
    theirs, ours = complete_config(checkpoint.config), config_of(trainer)
    if theirs["model"] != ours["model"] or theirs["data"] != ours["data"]:
        raise MismatchError(
            f"{checkpoint.path} cannot be resumed with this recipe: {_differences(theirs, ours)}",
            hint="give the recipe that it was trained with, --set included; other data is a run of its own",
        )
    trainer.model.load_state_dict(dict(checkpoint.load("raw").tensors))
    _restore_averages(trainer, checkpoint)
    training = read_tensors(checkpoint.path / TRAINING_FILE)
    trainer.optimizer.load_state(training, str(checkpoint.path))
    if trainer.power_ema:
        trainer.power_ema.load_state(training, str(checkpoint.path))
    trainer.model.set_graph(GraphState(**checkpoint.config["graph"]))
    trainer.step = trainer.snapshot_step = int(checkpoint.meta["step"])
    trainer.train_seconds = float(checkpoint.meta["train_seconds"])
    trainer.earlier_wall_seconds = float(checkpoint.meta.get("wall_seconds", 0.0))
    trainer.clock = StepClock(trainer.recipe.data.batch_tokens, trainer.train_seconds)
    trainer.waits = Waits(**checkpoint.meta.get("checkpoint_waits", {}))
    if "ledger" in checkpoint.meta:
        trainer.phase_times.resume(checkpoint.meta["ledger"])
    trainer.reserve = resumed_reserve(trainer.recipe.schedule, checkpoint.meta.get("reserve"))
    trainer.parents, trainer.resumed_from = [checkpoint.view_id("raw")], checkpoint.path
    trainer.phases.skip_past(trainer.step, trainer.progress)
    trainer.periodic.skip_past(trainer.step, trainer.train_seconds)
    say(f"resumed {checkpoint.path} at step {trainer.step}, {100 * trainer.progress:.1f} % of the run")


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What a checkpoint's config has otherwise than a recipe's, key by key."""
    keys = [(table, key) for table in ("model", "data") for key in sorted({*theirs[table], *ours[table]})]
    values = [(f"{table}.{key}", theirs[table].get(key), ours[table].get(key)) for table, key in keys]
    return ", ".join(f"{key} is {there}, here {here}" for key, there, here in values if there != here)


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


def prepare_power_ema(trainer: Trainer) -> None:
    """Leave the run the snapshots until this step: a branch takes over its parent's, a killed run's later ones go."""
    if not trainer.power_ema:
        return
    parent = trainer.resumed_from.parent if trainer.resumed_from else None
    if parent and parent.resolve() != trainer.run_dir.resolve():
        adopted = adopt_snapshots(parent, trainer.run_dir, trainer.step)
        say(f"took over {adopted} snapshots of power-function averages from {parent}")
    if dropped := drop_snapshots_after(trainer.run_dir, trainer.step):
        say(f"deleted {len(dropped)} snapshots of averages later than step {trainer.step}, such as {dropped[0].name}")
