"""Completion in real shells, the nearest name for a mistyped one, and the stages of --help."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_post.cli import COMMANDS, SECTIONS
from tests.cli.conftest import Call

COMPLETE = """
source <(pgolf-post completion bash)
COMP_WORDS=({words}); COMP_CWORD={index}
_pgolf_post_completion pgolf-post
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(tmp_path: Path, *words: str) -> set[str]:
    """Return what a real bash completes the last word to."""
    program = tmp_path / "pgolf-post"
    program.write_text(f"#!{sys.executable}\nfrom pgolf_post.cli import main\nmain()\n")
    program.chmod(0o755)
    script = COMPLETE.format(words=" ".join(f"'{word}'" for word in ("pgolf-post", *words)), index=len(words))
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    assert completed(tmp_path, "re") == {"requant", "repack", "report"}
    assert "--lambda" in completed(tmp_path, "requant", "--la")
    assert completed(tmp_path, "eval", "--protocol", "pl") == {"plain"}
    assert "table" in completed(tmp_path, "ledger", "ta")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_of_their_own(pgolf: Call, shell: str) -> None:
    answer = pgolf("completion", shell)
    assert answer.code == 0
    assert "pgolf-post" in answer.out
    assert f"_PGOLF_POST_COMPLETE={shell}_complete" in answer.out


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(("requnt",), "requant"), (("ledger", "tabel"), "table"), (("requant", "--lamda", "1"), "--lambda")],
)
def test_a_mistyped_name_is_answered_with_the_nearest(pgolf: Call, arguments: tuple[str, ...], near: str) -> None:
    answer = pgolf(*arguments)
    assert answer.code == 2
    assert "Did you mean" in answer.err
    assert near in answer.err.split("Did you mean")[1]


def test_help_groups_every_command_by_its_stage(pgolf: Call) -> None:
    printed = pgolf("--help").out
    places = [printed.index(f"\n{stage}:") for stage in SECTIONS]
    assert places == sorted(places)
    assert sum(map(len, SECTIONS.values())) == len(COMMANDS)


def test_quiet_prints_no_remark(pgolf: Call, pico_run: Path) -> None:
    loud = pgolf("calibrate", str(pico_run / "latest"), "--tokens", "512")
    quiet = pgolf("calibrate", str(pico_run / "latest"), "--tokens", "512", "--quiet", "--json")
    assert "weights: " in loud.err
    assert "weights: " not in quiet.err
    assert quiet.out.startswith("{")
