"""A run that is killed and resumed, again and again, ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError
from tests.conftest import pico_recipe, write_recipe
from trainer.config import Recipe
from trainer.loop import Trainer

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 40


def recipe_for(data: DataFolder, root: Path, name: str) -> Recipe:
    """The pico recipe with a checkpoint every second step."""
    return pico_recipe(
        data,
        root,
        run={"name": name},
        schedule={"steps": NUM_STEPS},
        checkpoint={"steps": tuple(range(2, NUM_STEPS, 2)), "fractions": (), "metric_tokens": 400},
        optim={"swa_start": 0.5, "swa_every": 3},
    )


def killed_after_some_progress(command: list[str], root: Path, generator: random.Random) -> bool:
    """Start a trainer, kill -9 it at a random moment after it has saved something new; False if it finished first."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = len(list_checkpoints(root))
    while process.poll() is None and len(list_checkpoints(root)) == before:
        time.sleep(0.01)
    time.sleep(generator.uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def run_through_kills(data: DataFolder, folder: Path, times: int) -> tuple[Checkpoint, int]:
    """Train with up to `times` kills, resuming from the newest complete checkpoint. Returns it and the kills made."""
    root, generator, kills = folder / "checkpoints", random.Random(5), 0
    recipe = write_recipe(recipe_for(data, root, "killed"), folder / "recipe.toml")
    command = [sys.executable, "-m", "trainer", str(recipe)]
    for _ in range(times):
        saved = list_checkpoints(root)
        for checkpoint in saved:
            checkpoint.load("raw")  # whatever is there is whole
        resume = ["--resume", str(max(saved, key=lambda c: int(c.meta["step"])).path)] if saved else []
        if not killed_after_some_progress(command + resume, root, generator):
            break
        kills += 1
    saved = list_checkpoints(root)
    last = max(saved, key=lambda checkpoint: int(checkpoint.meta["step"]))
    if last.meta["phase"] != "final":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--resume", str(last.path)], cwd=REPOSITORY, env=environment, check=True)
    return Checkpoint.open(root / "latest"), kills


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.long)])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_undisturbed_one_does(
    tmp_path: Path, pico_data: DataFolder, times: int
) -> None:
    undisturbed = Trainer(recipe_for(pico_data, tmp_path / "undisturbed", "whole")).run()
    killed, kills = run_through_kills(pico_data, tmp_path, times)
    assert kills >= 1
    assert killed.meta["phase"] == "final"
    for view in ("raw", "ema", "swa"):
        assert killed.view_id(view) == undisturbed.view_id(view)  # type: ignore[arg-type]
    log = (killed.path.parent / "train.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in log if line.endswith("}")} == set(range(1, NUM_STEPS + 1))


def test_resuming_before_later_checkpoints_is_refused_at_once(tmp_path: Path, pico_data: DataFolder) -> None:
    recipe = recipe_for(pico_data, tmp_path, "taken")
    Trainer(recipe).run()
    trainer = Trainer(recipe)
    trainer.resume(tmp_path / "taken" / "step_000004-step4")
    with pytest.raises(PgolfError, match="later than step 4, such as step_000040-final"):
        trainer.run()
