"""Two commands at once on the same checkpoints: each ends as it does alone, and leaves what it leaves alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pgolf_post.base.storage import PARTIAL_SUFFIX, sha256_file
from pgolf_post.cache import list_entries
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.ledger import Ledger
from tests import processes
from tests.cli.conftest import Call
from tests.cli.test_cli_import import write_model

FINAL = "checkpoints/pico/step_000012-final"
CALIBRATE = ("calibrate", FINAL, "--tokens", "160", "--fisher")
EVAL = ("eval", FINAL, "--max-tokens", "300")


def start(folder: Path, words: tuple[str, ...]) -> processes.Process:
    return processes.Process(
        ["-m", "pgolf_post", *words, "--json"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_at_once(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:  # exit code, stdout, stderr
    """Start the commands in this order, without waiting, and return how each ended."""
    answers = []
    started = [start(folder, words) for words in commands]
    for process in started:
        with process:
            out, err = process.communicate()
            assert process.returncode is not None
            assert "Traceback" not in err, err
            answers.append((process.returncode, out, err))
    return answers


def results(folder: Path) -> dict[str, str]:
    """Return the sha256 of what stages made; meta.json has seconds."""
    paths = (*folder.glob("checkpoints/*/*/derived/*/*/*"), *folder.glob("checkpoints/*/*/*.safetensors"))
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths if path.name != "meta.json"}


def leftovers(folder: Path) -> list[Path]:
    paths = (folder / "checkpoints").rglob("*")
    return [path for path in paths if path.name.startswith((".tmp-", ".old-")) or PARTIAL_SUFFIX in path.suffixes]


def alone(folder: Path, elsewhere: Path, *commands: tuple[str, ...]) -> dict[str, str]:
    """Return the results of the commands one after the other, in a copy of the folder."""
    shutil.copytree(folder, elsewhere, symlinks=True)
    for words in commands:
        ((code, _, err),) = run_at_once(elsewhere, words)
        assert code == 0, err
    return results(elsewhere)


def require_as_alone(folder: Path, elsewhere: Path, *commands: tuple[str, ...]) -> None:
    expected = alone(folder, elsewhere, *dict.fromkeys(commands))
    before = results(folder)
    for code, _, err in run_at_once(folder, *commands):
        assert code == 0, err
    assert before.items() < expected.items()
    assert results(folder) == expected
    assert leftovers(folder) == []


@pytest.fixture
def folder(tmp_path: Path, pico_run_original: Path) -> Path:
    place = tmp_path / "place"
    shutil.copytree(pico_run_original, place / "checkpoints", symlinks=True)
    return place


def test_two_calibrations_at_once_leave_one_result_as_of_one(folder: Path, tmp_path: Path) -> None:
    require_as_alone(folder, tmp_path / "alone", CALIBRATE, CALIBRATE)
    assert [(entry.stage, entry.state) for entry in list_entries(folder / "checkpoints")] == [("stats", "complete")]


def prune_beside(folder: Path, pgolf: Call, words: tuple[str, ...], *choice: str) -> tuple[int, str]:
    """Delete results without pause while a command runs; return how that ended, and what it said."""
    with start(folder, words) as process:
        while process.poll() is None:
            answer = pgolf("cache", "prune", *choice, "--yes", "--root", folder / "checkpoints", "--json")
            assert answer.code == 0, answer.err
        _, err = process.communicate()
    assert "Traceback" not in err, err
    assert process.returncode is not None
    return process.returncode, err


def test_leftovers_are_deleted_beside_a_running_command_and_its_work_is_not(
    folder: Path, tmp_path: Path, pgolf: Call
) -> None:
    expected = alone(folder, tmp_path / "alone", CALIBRATE)
    code, err = prune_beside(folder, pgolf, CALIBRATE)
    assert code == 0, err
    assert (results(folder), leftovers(folder)) == (expected, [])


@pytest.mark.long
def test_results_deleted_beside_a_running_command_cost_it_at_most_this_run(
    folder: Path, tmp_path: Path, pgolf: Call
) -> None:
    words = CALIBRATE
    expected = alone(folder, tmp_path / "alone", words)
    code, err = prune_beside(folder, pgolf, words, "--older-than", "0")
    assert code == 0 or (code == 1 and "error: " in err), err
    ((code, _, err),) = run_at_once(folder, words)
    assert code == 0, err
    assert (results(folder), leftovers(folder)) == (expected, [])


@pytest.mark.long
def test_two_notes_at_once_are_both_kept(folder: Path) -> None:
    run_at_once(folder, EVAL)
    with Ledger.open(folder / "checkpoints") as ledger:
        row_id = ledger.rows("score")[0].id
    notes = [("ledger", "note", row_id, f"conclusion {number}") for number in range(2)]
    for code, _, err in run_at_once(folder, *notes):
        assert code == 0, err
    with Ledger.open(folder / "checkpoints") as ledger:
        assert {row.conclusion for row in ledger.rows("note")} == {"conclusion 0", "conclusion 1"}
        assert ledger.find(row_id).conclusion in {"conclusion 0", "conclusion 1"}


@pytest.mark.long
def test_of_two_imports_under_one_name_one_is_kept_whole_and_the_other_refused(
    folder: Path, pico_data: DataFolder
) -> None:
    source = Checkpoint.open(folder / FINAL)
    flags = write_model(source, folder / "model.pt")
    words = ("import", "model.pt", "--data", str(pico_data.path), "--metric-tokens", "64", "--name", "one", *flags)
    answers = run_at_once(folder, words, words)
    assert sorted(code for code, _, _ in answers) == [0, 1], answers
    (refused,) = [err for code, _, err in answers if code]
    assert "already exists" in refused or "written by another process meanwhile" in refused
    (path,) = [json.loads(out.splitlines()[-1])["checkpoint"] for code, out, _ in answers if code == 0]
    kept = Checkpoint.open(folder / path).load("raw")
    assert kept.id == source.view_id("raw")
    assert all(torch.equal(tensor, source.load("raw").tensors[name]) for name, tensor in kept.tensors.items())
    assert leftovers(folder) == []
