"""The data folders that the pages of results name, from folders of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.corpus import command, make_corpus, prose_documents
from pgolf_post.data.check import check
from pgolf_post.errors import NotFoundError, PgolfError
from tests.conftest import pico_documents

VOCAB_SIZE = 320
PARAGRAPH = "The byte budget is what an artifact and the code that reads it may take together. " * 10


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a cloned repository: sixty long documents."""
    folder = tmp_path / "proposals"
    for number, document in enumerate(pico_documents()):
        write(folder / "text" / f"{number:04d}.md", f"{PARAGRAPH}\n\n{document.text} {number}\n")
    return folder


def test_documents_are_the_long_prose_files_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "eips"
    for name in ("EIPS/one.md", "two.RST", "copy/of-one.md"):
        write(clone / name, PARAGRAPH + ("two" if "two" in name else ""))
    write(clone / "template.md", "too short")
    write(clone / "code.py", PARAGRAPH + "code")
    write(clone / ".git" / "notes.txt", PARAGRAPH + "git")
    write(clone / "latin.txt", PARAGRAPH.encode() + b"\xff")
    assert [document.key for document in prose_documents([clone])] == ["eips/EIPS/one.md", "eips/two.RST"]
    assert "left out, not UTF-8" in capsys.readouterr().err


def test_both_folders_hold_one_validation_text_and_pass_their_checks(clone: Path, tmp_path: Path) -> None:
    whole, shared = make_corpus([clone], tmp_path / "data", VOCAB_SIZE)
    assert [folder.path.name for folder in (whole, shared)] == ["corpus_sp1024", "shared_val"]
    assert np.array_equal(whole.tokens("val"), shared.tokens("val"))
    assert whole.tokenizer_sha256 == shared.tokenizer_sha256
    assert whole.manifest["splits"]["val"]["num_bytes"] == shared.manifest["splits"]["val"]["num_bytes"]
    assert [folder.manifest["splits"]["train"]["num_tokens"] > 0 for folder in (whole, shared)] == [True, False]
    assert [row for folder in (whole, shared) for row in check(folder) if not row.passed] == []
    with pytest.raises(PgolfError, match="already there"):
        make_corpus([clone], tmp_path / "data")


def test_a_folder_without_prose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no"):
        list(prose_documents([tmp_path / "missing"]))


def test_the_command_says_what_it_wrote(clone: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command, [str(clone), "--root", str(tmp_path / "data"), "--vocab-size", str(VOCAB_SIZE)]
    )
    assert result.exit_code == 0, result.output
    assert "shared_val" in result.output
    assert "python -m trainer trainer/recipes/small_cpu.toml" in result.output
