"""The command line as a whole: help at once, usage errors exit 2, foreseen failures are one line and the next step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from pgolf_post.base.command_line import run_command
from pgolf_post.cli import COMMANDS, cli
from pgolf_post.errors import (
    DamagedFileError,
    MismatchError,
    NotFoundError,
    NumericsError,
    OverBudgetError,
    PgolfError,
    SettingsError,
    VerificationError,
)
from pgolf_post.ledger import Ledger, Row
from tests import processes

HEAVY = {"torch", "numpy", "scipy", "safetensors", "sentencepiece", "pydantic", "rich"}


def shell(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python …` as a real process."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += all_commands(command, (*path, name))
    return found


def test_help_imports_nothing_heavy_and_lists_every_command(tmp_path: Path) -> None:
    script = (
        "import sys, pgolf_post.cli as c\nsys.argv = ['pgolf-post', '--help']\nc.main()\n"
        "print(' '.join(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    done = shell("-c", script, cwd=tmp_path)
    assert done.returncode == 0
    assert HEAVY & set(done.stderr.split()) == set()
    assert "click" in done.stderr.split()
    listed = [line.split()[0] for line in done.stdout.partition("Start:")[2].splitlines() if line.strip()]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_is_a_sentence_that_begins_with_its_verb(name: str) -> None:
    line = COMMANDS[name][1]
    assert line.split()[0] not in ("A", "The", "What", "Which", "Is", "How", "Runs,", "Bits", "Weights,", "Training")
    assert line[0].isupper()
    assert line.endswith(".")
    assert "→" not in line


HELP_SCRIPT = """
import sys
import pgolf_post.cli
HEAVY = {"torch", "scipy", "safetensors"}
for path in sys.stdin.read().splitlines():
    before = set(sys.modules)
    try:
        pgolf_post.cli.cli([*path.split(), "--help"])
    except SystemExit as done:
        print(path, done.code, *sorted(HEAVY & (set(sys.modules) - before)), sep="\\t", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Command → exit code of its --help, and what heavy it was the first to import: in one process, without a home."""
    paths = "\n".join(" ".join(path) for path in all_commands(cli))
    command = [sys.executable, "-c", HELP_SCRIPT]
    folder = tmp_path_factory.mktemp("help")
    environment = {**os.environ, "HOME": str(folder / "none")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input=paths)
    return {path: rest for path, *rest in (line.split("\t") for line in done.stderr.splitlines())}


@pytest.mark.parametrize("path", all_commands(cli), ids=" ".join)
def test_help_of_a_command_imports_no_torch(path: tuple[str, ...], loaded: dict[str, list[str]]) -> None:
    assert loaded[" ".join(path)] == ["0"]


@pytest.mark.parametrize("path", [(), *all_commands(cli)], ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], pgolf: Any) -> None:
    answer = pgolf(*path, "--help")
    assert answer.code == 0
    assert answer.out.startswith("Usage: ")
    described = answer.out.partition("\n\n")[2].partition("\n\n")[0].strip()
    assert len(described) > 10


@pytest.mark.parametrize("path", all_commands(cli), ids=" ".join)
def test_every_option_has_help(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert [option.opts[0] for option in options if not option.help] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_the_command_of_that_name(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help


@pytest.mark.parametrize(
    "arguments",
    [["requnt"], ["--bogus"], ["requant", "--bogus"], ["data"], ["size"], ["eval", "--tail", "odd"], ["data", "build"]],
    ids=" ".join,
)
def test_usage_errors_exit_2_with_nothing_on_stdout(pgolf: Any, arguments: list[str]) -> None:
    answer = pgolf(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "Usage: " in answer.err


def test_an_unknown_command_exits_2_as_a_process(tmp_path: Path) -> None:
    done = shell("-m", "pgolf_post", "requnt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'requnt'" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PgolfError, 1),
        (NotFoundError, 1),
        (DamagedFileError, 1),
        (MismatchError, 1),
        (NumericsError, 1),
        (SettingsError, 2),
        (OverBudgetError, 3),
        (VerificationError, 4),
    ],
)
def test_a_foreseen_failure_is_its_message_the_next_command_and_its_exit_code(
    error: type[PgolfError], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command
    @click.option("--hint")
    def failing(hint: str | None) -> None:
        raise error("what went wrong", hint=hint)

    for arguments, expected in (([], ""), (["--hint", "do this"], "next: do this\n")):
        monkeypatch.setattr(sys, "argv", ["pgolf-post", *arguments])
        with pytest.raises(SystemExit) as done:
            run_command(failing)
        assert done.value.code == code
        assert capsys.readouterr() == ("", f"error: what went wrong\n{expected}")


def test_an_unforeseen_failure_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["pgolf-post"])
    with pytest.raises(ZeroDivisionError):
        run_command(failing)


def test_an_interrupt_exits_130_and_says_that_nothing_is_half_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["pgolf-post"])
    with pytest.raises(SystemExit) as done:
        run_command(interrupted)
    assert done.value.code == 130
    assert "nothing was left half-written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "calibrate", "requant", "eval", "swa-blend", "checkpoint verify"])
def test_without_a_checkpoint_the_next_command_is_the_one_that_makes_one(
    pgolf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    answer = pgolf(*command.split())
    assert (answer.code, answer.out) == (1, "")
    assert "error: no final checkpoint of a training run under checkpoints/" in answer.err
    assert "next: pgolf-post demo   (or: python -m trainer trainer/recipes/tiny_cpu.toml)" in answer.err
    assert list((tmp_path / "empty").iterdir()) == []


def test_without_a_checkpoint_a_process_exits_1(tmp_path: Path) -> None:
    done = shell("-m", "pgolf_post", "requant", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "next: pgolf-post demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("home", ["none", "file", "/proc"])
def test_a_home_that_is_not_there_or_cannot_be_written_is_not_needed(tmp_path: Path, pico_run: Path, home: str) -> None:
    """As in containers that run under a bare user id. The numba cache's own places are in tests/base/test_numba.py."""
    (tmp_path / "file").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NUMBA_"))}
    words = ["-m", "pgolf_post", "requant", str(pico_run / "latest"), "--calibration-tokens", "64", "--eval", "--json"]
    done = processes.run(words, {**environment, "HOME": str(tmp_path / home)}, tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file", pico_run.name}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_from_the_start_is_one_that_nobody_reads(tmp_path: Path, closed: str) -> None:
    """Some schedulers start programs so; a file of results must not get a closed stream's descriptor either."""
    out = tmp_path / "out.jsonl"
    command = (
        f"exec '{sys.executable}' -m pgolf_post ledger export --root {tmp_path} --format jsonl --out {out} {closed}"
    )
    with Ledger.open(tmp_path) as ledger:
        ledger.add(Row("trial", "a1", name="control"))
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert json.loads(out.read_text())["name"] == "control"
