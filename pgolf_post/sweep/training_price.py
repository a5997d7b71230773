"""The price of a training in seconds, before it is run: what is known of it, or that nothing is.

A training that is there costs nothing; one with a cap in seconds costs that at most. One of a number of steps costs
what steps of the same model and size took before, on this device: runs of the ledger and checkpoints tell.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.checkpoint import list_checkpoints
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Row
from pgolf_post.settings import canonical_json
from pgolf_post.sweep.settings import TrainStage
from pgolf_post.sweep.trainer_process import as_toml
from pgolf_post.sweep.training import find_stopped, find_trained, recipe_tree, run_id

STEP_KEYS = ("seq_len", "batch_tokens")  # of the table data: what a step reads


@dataclass(frozen=True)
class TrainingPrice:
    """Seconds of a training, None where nothing tells them, and what they are told by."""

    seconds: float | None
    told_by: str


def training_price(stage: TrainStage, root: Path, runs: Iterable[Row], device: str | None) -> TrainingPrice:
    """Return what a training will cost. Raises SettingsError or NotFoundError for its recipe."""
    if find_trained(stage, root) is not None:
        return TrainingPrice(0.0, "trained already")
    if find_stopped(stage, root) is not None:
        return TrainingPrice(0.0, "stopped early already")
    tree = recipe_tree(stage)
    schedule = tree.get("schedule", {})
    cap, steps = schedule.get("seconds"), schedule.get("steps")
    times = list(step_seconds(tree, root, runs, device)) if steps is not None else []
    if times:
        spent = steps * statistics.median(times)
        if cap is None or spent < cap:
            return TrainingPrice(spent, f"{steps:,} steps as {len(times)} earlier runs took them")
    if cap is not None:
        return TrainingPrice(float(cap), "the recipe's cap")
    return TrainingPrice(None, "no earlier run of this model and step size tells a step's time")


def step_seconds(tree: Mapping[str, Any], root: Path, runs: Iterable[Row], device: str | None) -> Iterator[float]:
    """Yield the mean seconds of a step, for each earlier run of the same model and step size on the same device."""
    told = {row.name: (row.settings, row.result, row.device) for row in runs}
    for checkpoint in list_checkpoints(root):  # oldest first: a run's last one stays
        meta = checkpoint.meta
        told[checkpoint.path.parent.name] = (meta.get("recipe") or {}, meta, meta.get("device"))
    for recipe, facts, where in told.values():
        steps, seconds = facts.get("step"), facts.get("train_seconds")
        if steps and seconds and where == device and _is_alike(tree, recipe):
            yield seconds / steps


def _is_alike(tree: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether a run's full recipe has the model and the steps that a tree of given values asks for."""
    model, data = recipe.get("model"), recipe.get("data")
    if not isinstance(model, Mapping) or not isinstance(data, Mapping):
        return False
    same_model = all(model.get(key) == value for key, value in tree.get("model", {}).items())
    return same_model and all(data.get(key) == tree.get("data", {}).get(key) for key in STEP_KEYS)


class Measured:
    """Prices by steps that are timed here, once for each model and step size: the trainer's own `--dry-run`."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._times: dict[bytes, tuple[float, float]] = {}  # seconds of a step without loops, with all of them

    def price(self, stage: TrainStage) -> TrainingPrice:
        """Return what a training costs. Raises PgolfError with the trainer's last line if its recipe is refused."""
        tree = recipe_tree(stage)
        key = canonical_json(
            [tree.get("model"), tree.get("data"), tree.get("optim"), tree.get("run", {}).get("precision")]
        )
        recipe = self.scratch / f"price_{run_id(stage)[:12]}.toml"
        self.scratch.mkdir(parents=True, exist_ok=True)
        recipe.write_text(as_toml(tree), encoding="utf-8")
        command = [sys.executable, "-m", "trainer", str(recipe), "--dry-run", "--json"]
        if key in self._times:
            plain, looped = self._times[key]
            command += ["--step-seconds", f"{plain}", "--looped-step-seconds", f"{looped}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PgolfError(f"{stage.recipe}: no price: {' | '.join(done.stderr.strip().splitlines()[-2:])}")
        told = json.loads(done.stdout.splitlines()[-1])
        self._times[key] = told["step_seconds"]["plain"], told["step_seconds"]["looped"]
        return TrainingPrice(float(told["seconds"]), f"{told['steps']:,} steps, four timed here")
