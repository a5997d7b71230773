"""Progress without a terminal: one closing line that says how much of what was done."""

from __future__ import annotations

import re

import pytest

from pgolf_post.base.progress import progress_bar


def test_the_closing_line_names_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("quantizing", 851_968, "weights") as advance:
        advance(851_968)
    assert re.fullmatch(r"quantizing: 851,968 weights in \d+\.\d s\n", capsys.readouterr().err)
