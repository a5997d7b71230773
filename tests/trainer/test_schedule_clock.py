"""A cap in processor seconds: it counts all that a run computes, ends within a step, and keeps what a kill lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe, write_recipe
from trainer.__main__ import command
from trainer.config import Recipe
from trainer.run.log import LOG_FILE
from trainer.run.loop import Trainer
from trainer.schedule.clock import ScheduleClock, processor_seconds, require_countable

CAP = 0.4
CAPPED: dict[str, Any] = {"steps": 10**6, "seconds": CAP, "clock": "processor", "reserve_seconds": 0.0}
AT_THE_END: dict[str, Any] = {"metric": "final", "every_steps": 5}


def capped(data: DataFolder, root: Path, **schedule: Any) -> Recipe:
    """The pico recipe under a cap of processor seconds."""
    return pico_recipe(data, root, schedule={**CAPPED, **schedule}, checkpoint=AT_THE_END)


def logged(final: Checkpoint) -> list[dict[str, Any]]:
    """The run's lines, one a step."""
    return [json.loads(line) for line in (final.path.parent / LOG_FILE).read_text().splitlines()]


def test_sleeping_is_free_and_computing_is_not() -> None:
    clock = ScheduleClock("processor")
    time.sleep(0.05)
    assert clock.after_step(0.0, 0.05) < 0.05
    began = processor_seconds()
    while processor_seconds() - began < 0.05:
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert clock.after_step(0.0, 0.0) >= 0.05


def test_a_run_ends_within_a_step_of_its_cap_and_its_warm_down_is_complete(
    tmp_path: Path, pico_data: DataFolder
) -> None:
    final = Trainer(capped(pico_data, tmp_path)).run()
    *before, last = logged(final)
    assert before[-1]["train_seconds"] <= CAP <= last["train_seconds"]  # to the millisecond
    assert final.meta["phase"] == "final"
    assert final.meta["progress"] == 1.0
    step = last["train_seconds"] - before[-1]["train_seconds"]
    assert last["lr_multiplier"] <= 2 * step / CAP + 0.05  # linear to 0 over the last part of the run


def test_loading_is_counted_from_the_start_of_the_command(tmp_path: Path, pico_data: DataFolder) -> None:
    clock = ScheduleClock(began=processor_seconds() - 100.0)
    final = Trainer(capped(pico_data, tmp_path), clock=clock).run()
    assert final.meta["step"] == 1  # the cap had passed when the first step ended
    assert final.meta["train_seconds"] > 100


def test_what_a_kill_lost_is_counted(tmp_path: Path, pico_data: DataFolder) -> None:
    first = Trainer(capped(pico_data, tmp_path)).run()
    saved = sorted(first.path.parent.glob("step_000005-*"))[0]
    recipe = capped(pico_data, tmp_path / "again", seconds=50.0)
    resumed = Trainer(recipe)
    resumed.resume(saved)
    known = resumed.state.train_seconds
    assert known == Checkpoint.open(saved).meta["train_seconds"]
    resumed.state.count_spent(known / 2)
    assert resumed.state.train_seconds == known  # no less than the checkpoint knows
    resumed.state.count_spent(50.0 - 1e-3)
    final = resumed.run()
    assert final.meta["step"] == 6
    assert final.meta["train_seconds"] >= 50.0


def test_clocks_that_would_leave_out_what_computes_are_refused(tmp_path: Path, pico_data: DataFolder) -> None:
    for device, world_size in (("cuda", 1), ("cpu", 2)):
        with pytest.raises(SettingsError, match="counts one process on a CPU"):
            require_countable("processor", torch.device(device), world_size)
    require_countable("wall", torch.device("cuda"), 8)
    with pytest.raises(ValueError, match=r"clock processor is that of schedule\.seconds, which is not set"):
        pico_recipe(pico_data, tmp_path, schedule={"clock": "processor"})


def test_a_recipe_that_sets_no_clock_is_written_as_before(tmp_path: Path, pico_data: DataFolder) -> None:
    assert "clock" not in pico_recipe(pico_data, tmp_path).model_dump()["schedule"]
    assert capped(pico_data, tmp_path).model_dump()["schedule"]["clock"] == "processor"


def test_spent_seconds_of_a_run_without_a_cap_are_refused(tmp_path: Path, pico_data: DataFolder) -> None:
    recipe = write_recipe(pico_recipe(pico_data, tmp_path / "checkpoints"), tmp_path / "recipe.toml")
    with pytest.raises(SettingsError, match=r"--spent-seconds 5 counts seconds of schedule\.seconds, .* not set"):
        command.main([str(recipe), "--spent-seconds", "5"], standalone_mode=False)
    assert not (tmp_path / "checkpoints").exists()
