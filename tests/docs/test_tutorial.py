"""The tutorial cannot rot: every shell command of docs/tutorial.md runs, in order, on the pico run.

The page's numbers are for the demo's model. BUDGET, TOKENS and STRIDE, which it sets at its top, get values for a model
of 10,758 parameters and windows of 16. `pgolf-post …` runs in this process, everything else in a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

import pgolf_post.cli
from tests.cli.conftest import caller

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICO_VALUES = {"BUDGET": "12000", "TOKENS": "512", "STRIDE": "4"}
IN_PLACE = {"make demo", ". .venv/bin/activate"}  # the pico run stands for the demo's


def commands(page: str) -> list[str]:
    """Return the commands of a page's shell blocks, continued lines joined."""
    text = "".join(BLOCK.findall(page)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def in_shell(command: str, variables: dict[str, str]) -> str:
    """Run a command in a shell that knows the page's variables and this Python; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env={**os.environ, **variables, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout.strip()


def test_every_command_of_the_tutorial_runs_as_it_is_written(
    pico_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pico_run.parent)
    pgolf = caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)
    for folder in ("examples", "sweeps"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    variables: dict[str, str] = {}
    run = set()
    for command in commands(TUTORIAL.read_text("utf-8")):
        if command in IN_PLACE:
            continue
        assignment = re.fullmatch(r"([A-Z]+)=(.*)", command)
        if assignment:
            name, value = assignment.groups()
            variables[name] = PICO_VALUES.get(name) or in_shell(f"echo {value}", variables)
        elif command.startswith("pgolf-post "):
            arguments = shlex.split(string.Template(command).substitute(variables))[1:]
            answer = pgolf(*arguments)
            assert answer.code == 0, f"{command}\n{answer.out}{answer.err}"
            run.add(arguments[0])
        else:
            assert in_shell(command, variables), command
    assert variables["RECORD"] != variables["FIT"]
    path = {"show", "calibrate", "requant", "fit", "size", "pack-code", "export-decoder", "eval", "compare", "sweep"}
    assert run >= path


@pytest.mark.parametrize("variable", sorted(PICO_VALUES))
def test_the_page_sets_what_the_test_replaces(variable: str) -> None:
    assert any(command.startswith(f"{variable}=") for command in commands(TUTORIAL.read_text("utf-8")))
