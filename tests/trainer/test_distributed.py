"""Several real processes under torchrun are one process, only faster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe, write_recipe
from trainer.batches import WindowSampler
from trainer.loop import Trainer, micro_batch_tokens

REPOSITORY = Path(__file__).parents[2]


def torchrun(num_processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module or script under the real torchrun, on this machine's loopback."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )


def recipe_file(folder: Path, data: DataFolder, name: str, precision: str) -> Path:
    """The pico recipe with 20 steps, as TOML."""
    recipe = pico_recipe(
        data,
        folder / "checkpoints",
        run={"name": name, "precision": precision, "warmup_steps": 1},  # which changes nothing
        schedule={"steps": 20},
        checkpoint={"phases": ("final",), "fractions": (), "metric_tokens": 400},
        optim={"swa_start": 0.5, "swa_every": 2},
    )
    return write_recipe(recipe, folder / f"{name}.toml")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-3)])
def test_two_processes_are_one_process_after_20_steps(
    tmp_path: Path, pico_data: DataFolder, precision: str, tolerance: float
) -> None:
    done = torchrun(2, "-m", "trainer", str(recipe_file(tmp_path, pico_data, "two", precision)))
    assert done.returncode == 0, done.stderr
    two = Checkpoint.open(tmp_path / "checkpoints" / "two" / "step_000020-final")
    alone = pico_recipe(
        pico_data,
        tmp_path / "alone",
        run={"precision": precision},
        schedule={"steps": 20},
        checkpoint={"phases": ("final",), "fractions": (), "metric_tokens": 400},
        optim={"swa_start": 0.5, "swa_every": 2},
    )
    one = Trainer(alone).run()
    assert (one.meta["world_size"], two.meta["world_size"]) == (1, 2)
    assert set(two.meta["views"]) == {"raw", "ema", "swa"}
    if precision == "fp64":
        for view in ("raw", "ema", "swa"):
            ours, theirs = one.load(view).tensors, two.load(view).tensors  # type: ignore[arg-type]
            worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
            assert worst < tolerance, view
    logs = [(root / "train.jsonl").read_text().splitlines() for root in (one.path.parent, two.path.parent)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert len(losses[0]) == len(losses[1]) == 20  # one rank writes the log
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < max(tolerance, 2e-6)  # logged to six digits
    assert done.stderr.count("saved ") == 1


RANKS_SCRIPT = """
import torch
from trainer.distributed import Ranks

ranks = Ranks.join()
rows = torch.arange(35.0, dtype=torch.float64).view(7, 5)
assert torch.equal(ranks.map_rows(lambda some: some.square() + 1, rows), rows.square() + 1)
assert torch.equal(ranks.map_rows(lambda some: 2 * some, rows[:1]), 2 * rows[:1])
mixed = [torch.full((2, 3), float(ranks.rank)), torch.ones(4, dtype=torch.float64), torch.ones(())]
ranks.sum_(mixed)
total = sum(range(ranks.world_size))
assert torch.equal(mixed[0], torch.full((2, 3), float(total)))
assert torch.equal(mixed[1], torch.full((4,), float(ranks.world_size), dtype=torch.float64))
assert float(mixed[2]) == ranks.world_size
assert ranks.sum_float(0.5) == 0.5 * ranks.world_size
assert ranks.main_float(100.0 + ranks.rank) == 100.0
ranks.wait()
print("ok", flush=True)
ranks.leave()
"""


@pytest.mark.parametrize("num_processes", [1, 3])
def test_what_ranks_share_does_not_depend_on_how_many_they_are(tmp_path: Path, num_processes: int) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{RANKS_SCRIPT}")
    done = torchrun(num_processes, str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == num_processes


def test_a_dry_run_under_torchrun_is_refused(tmp_path: Path, pico_data: DataFolder) -> None:
    done = torchrun(2, "-m", "trainer", str(recipe_file(tmp_path, pico_data, "dry", "fp32")), "--dry-run")
    assert done.returncode != 0
    assert "start it without torchrun" in done.stderr


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_a_steps_windows_without_overlap(pico_data: DataFolder, world_size: int) -> None:
    sampler = WindowSampler(pico_data, 16, seed=1)
    whole = torch.cat([inputs for inputs, _ in sampler.step_batches(3, 8, 1)])
    shared = [list(sampler.step_batches(3, 8, 1, rank, world_size)) for rank in range(world_size)]
    gathered = torch.cat([inputs for batches in zip(*shared, strict=True) for inputs, _ in batches])
    assert torch.equal(gathered, whole)


def test_batches_that_ranks_cannot_share_equally_are_refused(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path)  # 64 tokens a step, sequences of 16
    assert [micro_batch_tokens(recipe, world_size) for world_size in (1, 2, 4)] == [64, 32, 16]
    with pytest.raises(SettingsError, match="64 cannot be shared by 3 ranks"):
        micro_batch_tokens(recipe, 3)
    with pytest.raises(SettingsError, match="8 ranks"):
        micro_batch_tokens(recipe, 8)
