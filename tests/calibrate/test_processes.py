"""Real processes: any number of them gives the same sums under the same key, and a killed one is taken up again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.partial_sums import PartialSums
from pgolf_post.calibrate.sums import Sums
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from tests import processes

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

# The command line with batches of two windows, each saved; killed before its batch of the number given, if one is.
SMALL_BATCHES = """
import os, signal, sys
import pgolf_post.calibrate.collect as collect, pgolf_post.calibrate.partial_sums as partial
from pgolf_post.cli import main

last = int(sys.argv.pop(1))
added = []
collect.FORWARD_TOKENS, collect.FISHER_TOKENS = {"cpu": 32}, {"cpu": 32}
partial.SAVE_SECONDS, partial.SAVE_SHARE = 0.0, 1e9
add_batch = collect.Observed.add_batch

def mortal(*arguments):
    if len(added) + 1 == last:
        os.kill(os.getpid(), signal.SIGKILL)
    add_batch(*arguments)
    added.append(None)

collect.Observed.add_batch = mortal
main()
"""


@pytest.fixture
def small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script above, and the same batches in this process."""
    monkeypatch.setattr("pgolf_post.calibrate.collect.FORWARD_TOKENS", {"cpu": 32})
    monkeypatch.setattr("pgolf_post.calibrate.collect.FISHER_TOKENS", {"cpu": 32})
    script = tmp_path / "small_batches.py"
    script.write_text(SMALL_BATCHES)
    return script


def copy_of(checkpoint: Checkpoint, name: str) -> Checkpoint:
    path = checkpoint.path.parent / name
    shutil.copytree(checkpoint.path, path)
    return Checkpoint.open(path)


def all_sums(stats: Stats) -> dict[str, torch.Tensor]:
    found = {}
    kinds = {"hessian": stats.hessians, "abs": stats.abs_sums, "max": stats.abs_maxima, "trace": stats.pass_traces}
    if stats.fisher is not None:
        fisher = stats.fisher
        kinds |= {
            "rows": fisher.rows,
            "weighted": fisher.weighted,
            "outputs": fisher.outputs,
            "counts": fisher.lookup_counts,
        }
        kinds |= {"lookup": fisher.lookup_hessians, "lookup rows": fisher.lookup_rows}
    for kind, tensors in kinds.items():
        found |= {f"{kind} {name}": tensor for name, tensor in tensors.items()}
    return found


def require_same(ours: Stats, theirs: Stats) -> None:
    assert ours.id == theirs.id
    mine, other = all_sums(ours), all_sums(theirs)
    assert set(mine) == set(other)
    for name, tensor in mine.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6 * float(tensor.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("number", "arguments", "settings"),
    [
        pytest.param(2, ("--tokens", "160"), CalibrationSettings(tokens=160), marks=pytest.mark.long),
        (3, ("--tokens", "64", "--fisher"), CalibrationSettings(tokens=64, fisher=True)),
        pytest.param(
            3,
            ("--tokens", "64", "--source", "self"),
            CalibrationSettings(tokens=64, source="self"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_any_number_of_processes_gives_the_same_sums_and_key(
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    small_batches: Path,
    number: int,
    arguments: tuple[str, ...],
    settings: CalibrationSettings,
) -> None:
    """One rank writes; with two batches the third has nothing to do."""
    shared = copy_of(pico_checkpoint, "shared")
    words = ["calibrate", str(shared.path), "--data", str(pico_data.path), *arguments, "--json"]
    done = processes.run_ranks(number, str(small_batches), "0", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('{"checkpoint_id"') == 1
    theirs = calibrate(shared.load(), pico_data, settings)
    assert theirs.cached
    require_same(calibrate(pico_checkpoint.load(), pico_data, settings), theirs)
    assert not list(shared.path.glob("derived/stats/*.partial"))


def test_the_module_is_an_entry_point_under_torchrun(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    """torchrun itself, and new interpreters, in every run of the tests: other ranks are forked (tests/processes.py)."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "pgolf_post", "calibrate"]
    words += [str(pico_checkpoint.path), "--data", str(pico_data.path), "--tokens", "64"]
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert calibrate(pico_checkpoint.load(), pico_data, CalibrationSettings(tokens=64)).cached


def test_a_killed_calibration_is_taken_up_where_it_was(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, small_batches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CalibrationSettings(tokens=640, fisher=True)
    killed = copy_of(pico_checkpoint, "killed")
    command = [str(small_batches), "8", "calibrate", str(killed.path), "--data", str(pico_data.path)]
    command += ["--tokens", "640", "--fisher"]
    done = processes.run(command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    capsys.readouterr()
    resumed = calibrate(killed.load(), pico_data, settings)
    said = capsys.readouterr().err
    assert "resuming: " in said
    assert int(said.split("resuming: ")[1].split()[0]) == 7
    require_same(calibrate(pico_checkpoint.load(), pico_data, settings), resumed)
    assert not list(killed.path.glob("derived/stats/*.partial"))


# ---- partial sums -----------------------------------------------------------------------------------------------


def saved(folder: Path, value: float, batches: set[int], name: str) -> Path:
    """A partial file that another process left."""
    partial = PartialSums(folder, 2, ALONE)
    partial.path = folder / f"{name}.safetensors"
    sums = Sums()
    sums.add("hessian.site", torch.full((3, 3), value))
    sums.add("max.site", torch.full((3,), value))
    partial.save(sums, batches)
    return partial.path


def test_what_several_processes_left_is_added_up(tmp_path: Path) -> None:
    saved(tmp_path, 1.0, {0, 2}, "a")
    saved(tmp_path, 5.0, {1}, "b")
    partial = PartialSums(tmp_path, 2, ALONE)
    sums, done = partial.resume()
    assert done == {0, 1, 2}
    assert torch.equal(sums["hessian.site"].triu(), torch.full((3, 3), 6.0, dtype=torch.float64).triu())
    assert torch.equal(sums["max.site"], torch.full((3,), 5.0, dtype=torch.float64))
    partial.save(sums, done)
    assert [path.name for path in tmp_path.iterdir()] == [partial.path.name]


def test_overlapping_damaged_and_differently_cut_files_are_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 1.0, {0, 1, 2}, "merged")
    saved(tmp_path, 1.0, {2}, "contained")
    damaged = saved(tmp_path, 3.0, {3}, "damaged")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    sums, done = PartialSums(tmp_path, 2, ALONE).resume()
    assert done == {0, 1, 2}
    assert float(sums["hessian.site"][0, 0]) == 1.0
    assert "damaged.safetensors: the tensors do not have the recorded sha256; its batches" in capsys.readouterr().err
    assert PartialSums(tmp_path, 3, ALONE).resume()[1] == set()
    assert capsys.readouterr().err.count("its batches have another size; its batches are done again") == 2
