"""Provenance: the commit is found out once, and a failure to ask is not remembered."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from pgolf_post import provenance


def test_a_failure_to_ask_git_is_of_the_moment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process whose first question went unanswered (no git on the path, a slow disk) still learns the commit."""
    before = provenance.git_state()
    provenance._git.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state() == {"commit": None, "dirty": None}
    assert provenance.code_commit() is None
    monkeypatch.undo()
    assert provenance.git_state() == before


def test_triton_is_found_under_whatever_name_it_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "pytorch-triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.6.0"

    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"triton": ["pytorch-triton"]})
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert provenance.triton_version() == "3.6.0"
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert provenance.triton_version() == "unknown"


def test_the_answer_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = provenance.git_state()
    monkeypatch.setenv("PATH", str(tmp_path))
    if before["commit"] is not None:  # outside a checkout there is no answer to keep
        assert provenance.git_state() == before


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/usr/bin/pgolf-post", "eval", "a b"], "pgolf-post eval 'a b'"),
        (["/x/pgolf_post/__main__.py", "fit"], "pgolf-post fit"),
        (["/x/trainer/__main__.py", "--set", "a=[1]"], "python -m trainer --set 'a=[1]'"),
        (["mine.py"], "python mine.py"),
    ],
    ids=["command", "module", "trainer", "script"],
)
def test_a_command_is_shown_as_a_person_types_it(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], shown: str
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    assert provenance.command_line() == shown
