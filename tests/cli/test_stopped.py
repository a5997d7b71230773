"""A command that is asked to stop, wherever it is, ends with the signal's exit code and costs the next run nothing.

The signal comes just before a command's n-th change of the file system (a file opened to write, a folder made, a
rename): there a stop can do harm, and there it comes at the same place each time.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pgolf_post.data import DataFolder
from tests import processes
from tests.cli.test_at_once import CALIBRATE, FINAL, REQUANT, leftovers, results
from tests.conftest import pico_documents, pico_recipe, write_recipe

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SHORT = ("--max-tokens", "120")
TTT = ("--protocol", "ttt", "--ttt", "sgd-1493", "--set", "chunk_tokens=40", "--set", "epochs=1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": CALIBRATE,
    "requant": REQUANT,
    "eval sliding": ("eval", FINAL, "--protocol", "sliding", "--stride", "8", *SHORT),
    "eval ttt": ("eval", FINAL, *TTT, *SHORT),
    "swa-blend": ("swa-blend", FINAL, "--search", "--search-tokens", "160"),
    "compare": ("compare", FINAL, "checkpoints/pico/step_000009-frac75", *SHORT),
    "audit": ("audit", FINAL, "--tokens", "40", "--samples", "1", "--power", "0.1"),
    "sweep run": ("sweep", "run", "bits.toml", "--checkpoint", FINAL),
    "data build": ("data", "build", "text.jsonl", "--vocab-size", "300", "--out", "checkpoints/built"),
}
SPEC = """question = "bits?"
noise_repeats = 0
grid = {"*.bits" = [5, 6]}
calibration = {tokens = 64}
stages = {screen = {tokens = 64}}
"""
STOPPABLE = """
import os, signal, sys
from pgolf_post.cli import main

number, last, told = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv[1:4] = []
USUAL = (signal.SIG_DFL, signal.default_int_handler)
seen = 0

def changes(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename") or "__pycache__" in str(arguments[0]):
        return False
    return event != "open" or (isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+")))

def count(event, arguments):
    global seen
    if changes(event, arguments) and signal.getsignal(number) not in USUAL:
        seen += 1
        if seen == last:
            os.kill(os.getpid(), number)

sys.addaudithook(count)
try:
    main()
finally:
    with os.fdopen(os.open(told, os.O_WRONLY | os.O_CREAT), "w") as file:
        file.write(str(seen))
"""


@pytest.fixture
def folder(tmp_path: Path, pico_run_original: Path, pico_data: DataFolder) -> Path:
    """A folder with something for every command."""
    place = tmp_path / "place"
    shutil.copytree(pico_run_original, place / "checkpoints", symlinks=True)
    (place / "bits.toml").write_text(SPEC)
    (place / "text.jsonl").write_text("".join(json.dumps({"text": each.text}) + "\n" for each in pico_documents()))
    write_recipe(pico_recipe(pico_data, place / "checkpoints"), place / "recipe.toml")
    (tmp_path / "stoppable.py").write_text(STOPPABLE)
    return place


def run(folder: Path, words: tuple[str, ...], stop: signal.Signals, last: int = 0) -> tuple[int, str, int]:
    """Run a command, stopped at its change number `last` (0: never): exit code, stderr, the number of its changes."""
    told = folder.parent / "changes"
    script = [str(folder.parent / "stoppable.py"), str(int(stop)), str(last), str(told)]
    with processes.Process([*script, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, err = process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in err, err
    return process.returncode, err, int(told.read_text())


def made(folder: Path) -> dict[str, str]:
    """Return what can be compared: results of stages, and token shards."""
    shards = {path.name: str(path.stat().st_size) for path in folder.glob("checkpoints/built/*.bin")}
    return results(folder) | shards


def require_nothing_lost(folder: Path, name: str, stop: signal.Signals, shares: tuple[float, ...]) -> None:
    """Stop a command at shares of its changes, each time in a new copy; then run it again to its end."""
    words = COMMANDS[name]
    for each in ("whole", *map(str, shares)):
        shutil.copytree(folder, folder.parent / each, symlinks=True)
    code, err, number = run(folder.parent / "whole", words, stop)
    assert code == 0, err
    expected = made(folder.parent / "whole")
    assert made(folder).items() <= expected.items()
    for share in shares:
        copy = folder.parent / str(share)
        code, err, _ = run(copy, words, stop, max(1, round(share * number)))
        assert (code, "interrupted; nothing was left half-written" in err) == (CODES[stop], True), (share, err)
        assert [path for path in leftovers(copy) if path.suffix != ".partial"] == []
        assert made(copy).items() <= expected.items()  # what has a real name is whole
        code, err, _ = run(copy, words, stop)
        assert code == 0, (share, err)
        assert (made(copy), leftovers(copy)) == (expected, [])


def test_a_stopped_calibration_is_as_if_it_had_not_been(folder: Path) -> None:
    require_nothing_lost(folder, "calibrate", signal.SIGTERM, (0.6,))


@pytest.mark.long
@pytest.mark.parametrize("stop", CODES, ids=lambda stop: stop.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_command_is_as_if_it_had_not_been(folder: Path, name: str, stop: signal.Signals) -> None:
    require_nothing_lost(folder, name, stop, (0.01, 0.4, 0.7, 1.0))


@pytest.mark.long
@pytest.mark.parametrize("stop", CODES, ids=lambda stop: stop.name)
def test_a_stopped_plan_of_sizes_leaves_no_run_half_written(folder: Path, stop: signal.Signals) -> None:
    words = ("plan-size", "recipe.toml", "--budget", "9000", "--seconds", "1", "--root", "checkpoints")
    code, err, _ = run(folder, words, stop, 3)
    assert (code, "interrupted; nothing was left half-written" in err) == (CODES[stop], True), err
    assert leftovers(folder) == []
