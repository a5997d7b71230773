"""`--derived FOLDER`: results of a checkpoint that nobody may write beside are kept elsewhere and found again there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.derived import derived_folders
from pgolf_post.elsewhere import results_in
from pgolf_post.errors import MismatchError
from pgolf_post.ledger import Ledger
from tests.cli.conftest import Call

FEW = ("--calibration-tokens", 512)
COMMANDS: dict[str, tuple[object, ...]] = {
    "calibrate": ("--tokens", 512),
    "requant": (*FEW, "--eval", "--eval-tokens", 300),
    "fit": (*FEW, "--budget", 20_000, "--kappa", "off"),
    "attribute": (*FEW, "--tokens", 300),
    "eval": ("--max-tokens", 300),
    "prune": FEW,
}


def everything_in(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def read_only(pico_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pico run's final checkpoint, on a file system where no folder can be made (root may write everywhere)."""
    root, usual = pico_checkpoint.path.parents[1], Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if root in self.absolute().parents and not self.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        usual(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return pico_checkpoint.path


def test_what_cannot_be_written_is_said_at_once_and_offers_another_place(pgolf: Call, read_only: Path) -> None:
    before = everything_in(read_only)
    for name, options in COMMANDS.items():
        answer = pgolf(name, read_only, *options)
        assert answer.code == 1
        assert "Read-only file system" in answer.err
        assert "next: keep results in a folder of your own: --derived FOLDER" in answer.err
        assert "windows in" not in answer.err  # nothing was computed
    assert everything_in(read_only) == before


def test_results_are_kept_there_and_found_again(pgolf: Call, read_only: Path, tmp_path: Path) -> None:
    before, mine = everything_in(read_only), tmp_path / "mine"
    home = mine / read_only.parent.name / read_only.name
    for name in ("calibrate", "requant", "eval"):
        answer = pgolf(name, read_only, *COMMANDS[name], "--derived", mine, "--json")
        assert answer.code == 0, answer.err
    assert everything_in(read_only) == before
    made = {folder.parent.name for folder in derived_folders(home)}
    assert made == {"stats", "artifact", "score"}
    again = pgolf("eval", read_only, *COMMANDS["eval"], "--derived", mine, "--json")
    assert again.json["cached"]
    # the folder is the checkpoint to every command: named itself, listed, its artifacts scored, in its ledger
    direct = pgolf("eval", home, *COMMANDS["eval"], "--json").json
    assert (direct["nats"], direct["cached"]) == (again.json["nats"], True)
    entries = pgolf("cache", "list", "--root", mine, "--json").json["entries"]
    assert {entry["state"] for entry in entries} == {"complete"}
    artifact = next(folder for folder in derived_folders(home) if folder.parent.name == "artifact")
    assert pgolf("eval", artifact, "--max-tokens", 300, "--json").code == 0
    with Ledger.open(mine, read_only=True) as ledger:
        assert {row.kind for row in ledger.rows()} >= {"stats", "artifact", "score", "checkpoint"}


def test_a_sweep_keeps_its_trials_there(pgolf: Call, read_only: Path, tmp_path: Path) -> None:
    spec = 'question = "?"\nnoise_repeats = 0\n[grid]\n"*.hessian_lambda" = [0, 0.2]\n[calibration]\ntokens = 320\n'
    (tmp_path / "spec.toml").write_text(f"{spec}[stages.screen]\ntokens = 320\n")
    before, mine = everything_in(read_only), tmp_path / "mine"
    call = ("spec.toml", "--checkpoint", read_only, "--root", "own", "--derived", mine, "--json")
    answer = pgolf("sweep", "run", *call)
    assert answer.code == 0, answer.err
    assert everything_in(read_only) == before
    made = [folder.parent.name for folder in derived_folders(mine / read_only.parent.name / read_only.name)]
    assert set(made) == {"stats", "artifact", "screen"}
    assert made.count("artifact") == 2


def test_results_that_lie_beside_the_checkpoint_are_found_too(
    pgolf: Call, pico_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = pgolf("calibrate", pico_checkpoint.path, *COMMANDS["calibrate"], "--json").json
    again = pgolf("calibrate", pico_checkpoint.path, *COMMANDS["calibrate"], "--derived", tmp_path / "mine", "--json")
    assert (again.json["stats_id"], again.json["cached"]) == (first["stats_id"], True)
    artifact = Path(pgolf("requant", pico_checkpoint.path, *FEW, "--json").json["artifact"])
    before = everything_in(pico_checkpoint.path)
    scored = pgolf("eval", artifact, "--max-tokens", 300, "--derived", tmp_path / "mine", "--json")
    assert scored.code == 0, scored.err
    assert everything_in(pico_checkpoint.path) == before
    loose = tmp_path / "loose.pgolf"
    loose.write_bytes((artifact / "artifact.pgolf" if artifact.is_dir() else artifact).read_bytes())
    refused = pgolf("eval", loose, "--derived", tmp_path / "mine")
    assert refused.code == 2
    assert "this artifact lies in none" in refused.err


def test_the_folder_belongs_to_one_checkpoint_and_follows_it_when_it_moves(
    pico_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    home = results_in(pico_checkpoint, mine)
    assert results_in(home, mine) == home
    assert results_in(pico_checkpoint, pico_checkpoint.path.parents[1]) == pico_checkpoint  # its own root
    moved = tmp_path / "elsewhere" / pico_checkpoint.path.parent.name / pico_checkpoint.path.name
    moved.parent.mkdir(parents=True)
    pico_checkpoint.path.rename(moved)
    assert results_in(Checkpoint.open(moved), mine).load().id == home.view_id()
    other = tmp_path / "other" / moved.parent.name / moved.name
    earlier = next(path for path in pico_checkpoint.path.parent.glob("step_000000-*"))
    other.parent.mkdir(parents=True)
    earlier.rename(other)
    with pytest.raises(MismatchError, match="has results of checkpoint") as caught:
        results_in(Checkpoint.open(other), mine)
    assert caught.value.hint == "--derived names another folder"
