"""A run that is killed and resumed, again and again, ends where an undisturbed one does."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pgolf_post.average.snapshots import list_snapshots, stream_tensors
from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError
from tests import processes
from tests.conftest import pico_recipe, write_recipe
from trainer.config import Recipe
from trainer.run.loop import Trainer

NUM_STEPS = 40


def recipe_for(data: DataFolder, root: Path, name: str) -> Recipe:
    """The pico recipe with a checkpoint every second step."""
    return pico_recipe(
        data,
        root,
        run={"name": name},
        schedule={"steps": NUM_STEPS},
        checkpoint={"steps": tuple(range(2, NUM_STEPS, 2)), "fractions": (), "metric_tokens": 400},
        optim={"swa_start": 0.5, "swa_every": 3, "power_ema_sigmas": (0.05, 0.1), "power_ema_snapshots": 10},
    )


def killed_after_some_progress(command: list[str], root: Path, generator: random.Random, amid_write: bool) -> bool:
    """Start a trainer, kill -9 it once it has saved something new; False if it finished first.

    It is killed at a random moment, or, with `amid_write`, while a folder or file that is not complete is there.
    """
    process = processes.Process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = len(list_checkpoints(root))
    while process.poll() is None and len(list_checkpoints(root)) == before:
        time.sleep(0.01)
    time.sleep(generator.uniform(0.0, 0.3))
    while amid_write and process.poll() is None and not list(root.glob("*/.tmp-*")):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def require_all_whole(root: Path) -> None:
    """Whatever is there under its own name is complete and loads: folders, and snapshots of averages."""
    folders = set(root.glob("killed/step_*"))
    assert folders == {checkpoint.path for checkpoint in list_checkpoints(root)}
    for checkpoint in list_checkpoints(root):
        for view in checkpoint.meta["views"]:
            checkpoint.load(view)
    for snapshot in list_snapshots(root / "killed"):
        for _ in stream_tensors([snapshot]):
            pass


def run_through_kills(data: DataFolder, folder: Path, times: int) -> tuple[Checkpoint, int]:
    """Train with up to `times` kills, resuming from the newest complete checkpoint. Returns it and the kills made.

    Every second kill comes while something is being written.
    """
    root, generator, kills = folder / "checkpoints", random.Random(5), 0
    recipe = write_recipe(recipe_for(data, root, "killed"), folder / "recipe.toml")
    command = ["-m", "trainer", str(recipe)]
    for turn in range(times):
        saved = list_checkpoints(root)
        require_all_whole(root)
        resume = ["--resume", str(max(saved, key=lambda c: int(c.meta["step"])).path)] if saved else []
        if not killed_after_some_progress(command + resume, root, generator, amid_write=turn % 2 == 0):
            break
        kills += 1
    saved = list_checkpoints(root)
    last = max(saved, key=lambda checkpoint: int(checkpoint.meta["step"]))
    if last.meta["phase"] != "final":
        processes.run([*command, "--resume", str(last.path)]).check_returncode()
    return Checkpoint.open(root / "latest"), kills


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.long)])
def test_a_run_killed_and_resumed_ends_bit_for_bit_where_an_undisturbed_one_does(
    tmp_path: Path, pico_data: DataFolder, times: int
) -> None:
    undisturbed = Trainer(recipe_for(pico_data, tmp_path / "undisturbed", "whole")).run()
    killed, kills = run_through_kills(pico_data, tmp_path, times)
    assert kills >= 1
    assert killed.meta["phase"] == "final"
    for view in ("raw", "ema", "swa"):
        assert killed.view_id(view) == undisturbed.view_id(view)  # type: ignore[arg-type]
    require_all_whole(killed.path.parents[1])
    kept = [[(s.step, s.tensors_sha256) for s in list_snapshots(c.path.parent)] for c in (killed, undisturbed)]
    assert kept[0] == kept[1]
    assert not list(killed.path.parents[1].rglob(".tmp-*"))  # of killed processes, removed by those after them
    log = (killed.path.parent / "train.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in log if line.endswith("}")} == set(range(1, NUM_STEPS + 1))


def test_resuming_before_later_checkpoints_is_refused_at_once(tmp_path: Path, pico_data: DataFolder) -> None:
    recipe = recipe_for(pico_data, tmp_path, "taken")
    Trainer(recipe).run()
    trainer = Trainer(recipe)
    trainer.resume(tmp_path / "taken" / "step_000004-step4")
    with pytest.raises(PgolfError, match="later than step 4, such as step_000040-final"):
        trainer.run()
