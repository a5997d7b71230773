"""Output where there is no terminal: few lines of progress, plain tables, and with --quiet no remarks."""

from __future__ import annotations

import re

import pytest

from pgolf_post.base import progress
from pgolf_post.base.progress import print_table, progress_bar, say, tables_alone


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, in seconds, that progress goes by; a test moves it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", [])
    return now


def test_the_closing_line_names_its_unit(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress_bar("quantizing", 851_968, "weights") as advance:
        advance(851_967)
        clock[0] = 11.0
    assert re.fullmatch(r"quantizing: 851,968 weights in \d+\.\d s\n", capsys.readouterr().err)


def test_progress_is_at_most_one_line_in_ten_seconds(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress_bar("scoring", 100, "windows") as advance:
        for second in range(100):
            clock[0] = float(second)
            advance(1, "≈ 100 s in all")
        with progress_bar("inner", 3, "steps") as step:
            step(3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert re.fullmatch(
        r"scoring: 11 of 100 windows in \d+ s, about \d+ s to go ≈ 100 s in all",
        lines[0],
    )


def test_short_work_prints_no_progress(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    for _ in range(5):
        with progress_bar("packing", 2, "units") as advance:
            clock[0] += 1.9
            advance(2)
    assert capsys.readouterr().err == ""


def test_quiet_leaves_tables_alone(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with tables_alone():
        say("a remark")
        with progress_bar("scoring", 1, "windows") as advance:
            clock[0] = 20.0
            advance(1)
        print_table("Title", ("name", "bytes"), [("a", "1")])
    say("a later remark")
    assert capsys.readouterr().err.splitlines() == ["Title", "name  bytes", "a         1", "a later remark"]
