"""Training as a trial's first stage: the trainer as a process of its own, continued where a killed one stopped.

The run's name ends with an id of what decides its weights, so the same training is found again whichever trial asks for
it; it begins with what the trial that asked first is called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.progress import say
from pgolf_post.base.rank_variables import ADDRESS, PLACE
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.derived import derived_id
from pgolf_post.errors import PgolfError, SettingsError, StoppedEarlyError
from pgolf_post.settings import apply_override, read_toml
from pgolf_post.sweep.settings import TrainStage
from pgolf_post.sweep.trainer_process import Asked, as_toml, folder_name, run_trainer, trainer_command

TRAIN_VERSION = 1  # of ids of trained runs
ID_DIGITS = 12  # of them in a run's name
NAMING = ("name", "checkpoint_root", "base", "why")  # of the table run: what decides no weight
FINAL, STOPPED_EARLY = "final", "stopped_early"  # phases of a run's last checkpoint, as the trainer names them


class TrainingStoppedError(StoppedEarlyError):
    """A training that its own recipe's table `stop` ended: a finding, with the checkpoint that it left."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        super().__init__(f"{checkpoint.path}: {checkpoint.meta['stopped_early']['reason']}")


def recipe_tree(stage: TrainStage) -> dict[str, Any]:
    """Return the recipe as it will be trained, as plain values. Raises SettingsError, NotFoundError."""
    tree = read_toml(Path(stage.recipe))
    for override in stage.set:
        apply_override(tree, override)
    if stage.seconds is not None or stage.steps is not None:
        schedule = {key: value for key, value in tree.get("schedule", {}).items() if key not in ("seconds", "steps")}
        length = {"seconds": stage.seconds} if stage.seconds is not None else {"steps": stage.steps}
        tree["schedule"] = {**schedule, **length}
    return tree


def run_id(stage: TrainStage) -> str:
    """Return the id that a trained run is found by."""
    tree = recipe_tree(stage)
    run = {key: value for key, value in tree.get("run", {}).items() if key not in NAMING}
    shared = {"processes": stage.processes} if stage.processes > 1 else {}
    return derived_id("train", TRAIN_VERSION, [], {**tree, "run": run, **shared})


def run_name(stage: TrainStage, title: str = "sweep") -> str:
    """Return the name of a training's run, where a trial so called is the first to ask for it."""
    return folder_name(title, run_id(stage)[:ID_DIGITS])


def saved_of(stage: TrainStage, root: Path) -> list[Checkpoint]:
    """Return the checkpoints of a training under `root`, whatever its run is called."""
    ending = f"_{run_id(stage)[:ID_DIGITS]}"
    return [c for c in list_checkpoints(root) if c.path.parent.name.endswith(ending)]


def find_trained(stage: TrainStage, root: Path) -> Checkpoint | None:
    """Return the final checkpoint of a training under `root`, None where it is not there."""
    final = [c for c in saved_of(stage, root) if _is_of_phase(c, FINAL)]
    return final[-1] if final else None


def find_stopped(stage: TrainStage, root: Path) -> Checkpoint | None:
    """Return the checkpoint at which a training stopped early, None where it did not or went on since."""
    newest = max(saved_of(stage, root), key=lambda c: int(c.meta["step"]), default=None)
    return newest if newest is not None and _is_of_phase(newest, STOPPED_EARLY) else None


def _is_of_phase(checkpoint: Checkpoint, phase: str) -> bool:
    return phase in str(checkpoint.meta.get("phase", "")).split("+")


def trained(
    stage: TrainStage,
    root: Path,
    scratch: Path,
    asked: Asked | None = None,
    seconds_left: Callable[[], float | None] = lambda: None,
) -> Checkpoint:
    """Return the final checkpoint of a training run under `root`: found, continued, or trained from the start.

    Raises TrainingStoppedError where the recipe's table `stop` ended it, now or earlier; PgolfError with the trainer's
    last lines if it fails; BudgetSpentError when no seconds are left.
    """
    if (final := find_trained(stage, root)) is not None:
        say(f"{final.path}: trained already")
        return final
    if (stopped := find_stopped(stage, root)) is not None:
        raise TrainingStoppedError(stopped)
    saved, asked = saved_of(stage, root), asked or Asked()
    name = saved[-1].path.parent.name if saved else run_name(stage, asked.title)
    recipe = scratch / f"{name}.toml"
    scratch.mkdir(parents=True, exist_ok=True)
    recipe.write_text(as_toml(recipe_tree(stage)), encoding="utf-8")
    base = find_trained(asked.base, root) if asked.base else None
    base_name = base.path.parent.name if base is not None else None
    command = trainer_command(recipe, stage.processes, name, root, asked, base_name)
    resumable = [c for c in saved if (c.path / "training.safetensors").is_file()]
    if resumable:
        newest = max(resumable, key=lambda c: int(c.meta["step"]))
        command += ["--resume", str(newest.path)]
    say(f"training {name}: {' '.join(command[2:])}")
    code, out, err = run_trainer(command, seconds_left, _own_devices(stage.processes))
    if code == StoppedEarlyError.exit_code and (stopped := find_stopped(stage, root)) is not None:
        raise TrainingStoppedError(stopped)
    if code:
        lines = " | ".join(err.strip().splitlines()[-3:])
        raise PgolfError(f"training with {stage.recipe} failed (exit {code}): {lines}")
    return Checkpoint.open(Path(json.loads(out.splitlines()[-1])["checkpoint"]))


def _own_devices(processes: int) -> dict[str, str]:
    """Return the trainer's environment: it is no rank of the sweep's, and sees this worker's GPUs only, one a process.

    Raises SettingsError where this worker has fewer.
    """
    variables = {name: value for name, value in os.environ.items() if name not in (*PLACE, *ADDRESS)}
    if torch.cuda.is_available():
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = (
            [name.strip() for name in listed.split(",")] if listed else list(map(str, range(torch.cuda.device_count())))
        )
        first = torch.cuda.current_device() * processes
        own = every[first : first + processes]
        if len(own) < processes:
            raise SettingsError(f"train.processes = {processes}: this worker has {len(own)} of {len(every)} GPUs")
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return variables
