"""Training as a trial's first stage: the trainer as a process of its own, continued where a killed one stopped.

The run's name is made of what decides its weights, so the same training is found again whichever trial asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pgolf_post.base.progress import say
from pgolf_post.base.rank_variables import ADDRESS, PLACE
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.derived import derived_id
from pgolf_post.errors import PgolfError, StoppedEarlyError
from pgolf_post.settings import apply_override, read_toml
from pgolf_post.sweep.settings import TrainStage

TRAIN_VERSION = 1  # of ids of trained runs
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
    run = {key: value for key, value in tree.get("run", {}).items() if key not in ("name", "checkpoint_root")}
    return derived_id("train", TRAIN_VERSION, [], {**tree, "run": run})


def run_name(stage: TrainStage) -> str:
    """Return the name of a training's run."""
    return f"sweep_{run_id(stage)[:12]}"


def find_trained(stage: TrainStage, root: Path) -> Checkpoint | None:
    """Return the final checkpoint of a training under `root`, None where it is not there."""
    final = [c for c in _saved(stage, root) if _is_of_phase(c, FINAL)]
    return final[-1] if final else None


def find_stopped(stage: TrainStage, root: Path) -> Checkpoint | None:
    """Return the checkpoint at which a training stopped early, None where it did not or went on since."""
    saved = _saved(stage, root)
    newest = max(saved, key=lambda c: int(c.meta["step"]), default=None)
    return newest if newest is not None and _is_of_phase(newest, STOPPED_EARLY) else None


def _saved(stage: TrainStage, root: Path) -> list[Checkpoint]:
    return [c for c in list_checkpoints(root) if c.path.parent.name == run_name(stage)]


def _is_of_phase(checkpoint: Checkpoint, phase: str) -> bool:
    return phase in str(checkpoint.meta.get("phase", "")).split("+")


def trained(stage: TrainStage, root: Path, scratch: Path) -> Checkpoint:
    """Return the final checkpoint of a training run under `root`: found, continued, or trained from the start.

    Raises TrainingStoppedError where the recipe's table `stop` ended it, now or earlier; PgolfError with the trainer's
    last lines if it fails.
    """
    name = run_name(stage)
    if (final := find_trained(stage, root)) is not None:
        say(f"{final.path}: trained already")
        return final
    if (stopped := find_stopped(stage, root)) is not None:
        raise TrainingStoppedError(stopped)
    recipe = scratch / f"{name}.toml"
    scratch.mkdir(parents=True, exist_ok=True)
    recipe.write_text(_as_toml(recipe_tree(stage)), encoding="utf-8")
    command = [sys.executable, "-m", "trainer", str(recipe), "--json"]
    command += ["--set", f"run.name={name}", "--set", f"run.checkpoint_root={json.dumps(str(root))}"]
    resumable = [c for c in _saved(stage, root) if (c.path / "training.safetensors").is_file()]
    if resumable:
        newest = max(resumable, key=lambda c: int(c.meta["step"]))
        command += ["--resume", str(newest.path)]
    say(f"training {name}: {' '.join(command[2:])}")
    # The claim goes along: should this process be killed, the next waits for its trainer instead of starting another.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, close_fds=False, env=_own_device_alone()
    )
    if done.returncode == StoppedEarlyError.exit_code and (stopped := find_stopped(stage, root)) is not None:
        raise TrainingStoppedError(stopped)
    if done.returncode:
        lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise PgolfError(f"training with {stage.recipe} failed (exit {done.returncode}): {lines}")
    return Checkpoint.open(Path(json.loads(done.stdout.splitlines()[-1])["checkpoint"]))


def _own_device_alone() -> dict[str, str]:
    """Return the trainer's environment: it is alone, not a rank of the sweep's, and sees this worker's GPU only."""
    variables = {name: value for name, value in os.environ.items() if name not in (*PLACE, *ADDRESS)}
    if torch.cuda.is_available():
        index, visible = torch.cuda.current_device(), os.environ.get("CUDA_VISIBLE_DEVICES")
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index].strip() if visible else str(index)
    return variables


def _as_toml(tree: dict[str, Any]) -> str:
    """Return a recipe's tables as TOML; every value is one that JSON and TOML write alike."""
    lines = []
    for table, values in tree.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
