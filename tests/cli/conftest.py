"""What the command-line tests share: a caller that sees what a shell sees, and a stranger's data folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pgolf_post.cli
import trainer.__main__
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.documents import Document


@dataclass(frozen=True)
class Answer:
    """What a command left behind for its caller."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout, which must be a JSON object."""
        value = json.loads(self.out.splitlines()[-1])
        assert isinstance(value, dict)
        return value


Call = Callable[..., Answer]


def caller(
    main: Callable[[], None], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Call an entry point in this process as a shell would: arguments in, exit code and streams out."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def pgolf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico_run: Path) -> Call:
    """`pgolf-post …` in a folder whose checkpoints/ is a private copy of the pico run."""
    monkeypatch.chdir(tmp_path)
    return caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`python -m trainer …` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return caller(trainer.__main__.main, "trainer", monkeypatch, capsys)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A data folder with another tokenizer than the pico run's."""
    documents = [Document(f"other/{i}", f"Something else entirely, number {i * i}. " * 9) for i in range(20)]
    settings = BuildSettings(name="other", vocab_size=300, val_fraction=0.3)
    return build(documents, tmp_path_factory.mktemp("other") / "data", settings)
