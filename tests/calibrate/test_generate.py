"""Batches of a text under way, which two processes may write at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf_post.base import partial
from pgolf_post.calibrate import generate
from pgolf_post.calibrate.generate import WrittenBatches

TOKENS = np.arange(6).reshape(2, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(generate, "SAVE_SECONDS", 0.0)
    return tmp_path / "text"


def test_what_was_saved_is_resumed_and_then_removed(folder: Path) -> None:
    writer = WrittenBatches(folder)
    writer.add(3, TOKENS)
    assert {batch: tokens.tolist() for batch, tokens in writer.resume().items()} == {3: TOKENS.tolist()}
    writer.remove()
    assert not folder.exists()
    writer.remove()


def test_a_process_that_is_done_leaves_another_one_its_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done, other = WrittenBatches(folder), WrittenBatches(folder)
    done.add(0, TOKENS)
    save = partial.save_file

    def meanwhile(*given: Any) -> None:
        assert list(done.resume()) == [0]
        done.remove()
        save(*given)

    monkeypatch.setattr(partial, "save_file", meanwhile)
    other.add(1, TOKENS)
    assert list(other.resume()) == [1]
    assert capsys.readouterr().err == ""
