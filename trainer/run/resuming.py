"""A run taken up again from a checkpoint folder: `restore` puts back what `saving.save` took.

A resumed run is bit for bit the run that was never stopped. Snapshots of averages that a killed run took after the
checkpoint are deleted. A resumed run of another name takes over its parent's earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf_post.average.snapshots import adopt_snapshots, drop_snapshots_after
from pgolf_post.base.progress import say
from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, complete_config, read_tensors
from pgolf_post.errors import MismatchError, NotFoundError
from trainer.config import Recipe
from trainer.model.architecture import GraphState
from trainer.optim.averages import Averages
from trainer.run.state import RunState
from trainer.schedule.stages import StageSettings
from trainer.step.future_heads import load_heads


def restore(state: RunState, path: Path) -> None:
    """Put a run where a checkpoint of the same recipe stands: weights, moments, averages, position and clock.

    Raises NotFoundError if the folder has no optimizer state, MismatchError if its model or data is another.
    """
    checkpoint = Checkpoint.open(path)
    require_resumable(checkpoint, state.config())
    require_same_steps(checkpoint, state.recipe)
    require_same_stages(checkpoint, state.recipe)
    require_same_seed(checkpoint, state.recipe)
    # Tensors: weights, averages, moments.
    state.model.load_state_dict(dict(checkpoint.load("raw").tensors))
    _restore_views(state.averages, checkpoint)
    training = read_tensors(checkpoint.path / TRAINING_FILE)
    state.optimizer.load_state(training, str(checkpoint.path))
    if state.averages.power_ema:
        state.averages.power_ema.load_state(training, str(checkpoint.path))
    load_heads(state.heads, training)
    if state.rounding:
        state.rounding.load_state(training)
    # The graph, then position and clock.
    state.model.set_graph(GraphState(**checkpoint.config["graph"]))
    state.take_up(checkpoint)
    say(f"resumed {checkpoint.path} at step {state.step}, {100 * state.progress:.1f} % of the run")


def require_resumable(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raise if a run with this config cannot go on from a checkpoint: NotFoundError or MismatchError."""
    if not (checkpoint.path / TRAINING_FILE).is_file():
        raise NotFoundError(f"{checkpoint.path} has no {TRAINING_FILE}; only folders that keep it can be resumed")
    theirs = complete_config(checkpoint.config)
    if theirs["model"] != config["model"] or theirs["data"] != config["data"]:
        raise MismatchError(
            f"{checkpoint.path} cannot be resumed with this recipe: {_differences(theirs, config)}",
            hint="give the recipe that it was trained with, --set included; other data is a run of its own",
        )


STEP_KEYS = ("seq_len", "batch_tokens")  # of the table data: what a step reads


def require_same_steps(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise MismatchError if a step reads other tokens than the steps behind the checkpoint did.

    The position in the text and the tokens seen are counted in steps of one size; by other steps, both would be wrong.
    """
    there = (checkpoint.meta.get("recipe") or {}).get("data", {})
    ours = {f"data.{key}": getattr(recipe.data, key) for key in STEP_KEYS}
    theirs = {f"data.{key}": there.get(key, ours[f"data.{key}"]) for key in STEP_KEYS}
    step = int(checkpoint.meta["step"])
    if "batch_tokens" not in there and step:
        theirs["data.batch_tokens"] = int(checkpoint.meta.get("tokens_seen", step * recipe.data.batch_tokens)) // step
    wrong = [key for key in ours if ours[key] != theirs[key]]
    if wrong and step:
        values = ", ".join(f"{key} is {theirs[key]:,} there, {ours[key]:,} here" for key in wrong)
        raise MismatchError(
            f"{checkpoint.path} cannot be resumed with this recipe: {values}; its {step:,} steps would stand for "
            "another position in the text and other tokens seen",
            hint=" ".join(["resume it with", *(f"--set {key}={theirs[key]}" for key in wrong)])
            + "; other steps are a run of their own",
        )


def require_same_stages(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise MismatchError if a run would go on with other stages behind it, or windows that nest otherwise."""
    schedule = (checkpoint.meta.get("recipe") or {}).get("schedule", {})
    there = tuple(StageSettings(**stage) for stage in schedule.get("stages", ()))
    ours = recipe.schedule.stages
    if there != ours and int(checkpoint.meta["step"]):
        raise MismatchError(
            f"{checkpoint.path} cannot be resumed with this recipe: schedule.stages are {_listed(there)} there, "
            f"{_listed(ours)} here; its steps would stand for another position in the text",
            hint="resume it with the stages that it was trained with; others are a run of their own",
        )


def _listed(stages: Sequence[StageSettings]) -> str:
    return ", ".join(f"{stage.at:g}: {stage.batch_tokens} × {stage.seq_len}" for stage in stages) or "none"


def require_same_seed(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise MismatchError if a run would go on with another seed; say so if it branches off under another name.

    The seed draws the order of the windows, so that the rest of an epoch by another seed reads some of them twice.
    """
    there, step = checkpoint.meta.get("seed"), int(checkpoint.meta["step"])
    if there is None or there == recipe.run.seed or not step:
        return
    values = f"run.seed is {there} there, {recipe.run.seed} here"
    if recipe.run.name != checkpoint.meta.get("run"):
        say(f"{values}: from step {step:,} on the order of the text is another; windows that were read come again")
        return
    raise MismatchError(
        f"{checkpoint.path} cannot be resumed with this recipe: {values}; the rest of the epoch would read some "
        "windows again and leave others out",
        hint=f"resume it with --set run.seed={there}, or branch off under another name with --set run.name=NAME",
    )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """List the keys in which a checkpoint's config differs from a recipe's, with both values."""
    keys = [(table, key) for table in ("model", "data") for key in sorted({*theirs[table], *ours[table]})]
    values = [(f"{table}.{key}", theirs[table].get(key), ours[table].get(key)) for table, key in keys]
    return ", ".join(f"{key} is {there}, here {here}" for key, there, here in values if there != here)


def _restore_views(averages: Averages, checkpoint: Checkpoint) -> None:
    """Take up EMA and running mean where the checkpoint left them. Raises NotFoundError if it lacks a kept EMA."""
    if averages.ema:
        averages.ema.load(checkpoint.load("ema").tensors)
    start, count = averages.swa_start, int(checkpoint.meta.get("swa_count", 0))
    if start is not None and not count and float(checkpoint.meta.get("progress", 0.0)) > start:
        say(f"{checkpoint.path} holds no running mean; one starts at step {checkpoint.meta['step']}")
    if averages.swa and count:
        averages.swa.load(checkpoint.load("swa").tensors, count)


def prepare_snapshots(state: RunState) -> None:
    """Leave in the run's folder the snapshots of averages until this step, those of a resumed parent included."""
    if not state.averages.power_ema:
        return
    parent = state.parent.path.parent if state.parent else None
    if parent and parent.resolve() != state.run_dir.resolve():
        adopted = adopt_snapshots(parent, state.run_dir, state.step)
        say(f"took over {adopted} snapshots of power-function averages from {parent}")
    if dropped := drop_snapshots_after(state.run_dir, state.step):
        say(f"deleted {len(dropped)} snapshots of averages later than step {state.step}, such as {dropped[0].name}")
