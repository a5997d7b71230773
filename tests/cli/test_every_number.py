"""Every numeric option of every command refuses or accepts whatever is typed for it, and never ends in a traceback.

The options are click's own list, so that a new one is tried without a word here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import trainer.__main__
from pgolf_post.cli import cli
from pgolf_post.cli.plan_options import Values
from tests.cli.conftest import Call

CODES = range(6)  # of the command line; anything else, or an exception, is unforeseen
NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "", "1,5;", "½", "5 6", "0x10", "--")
NUMBERS = (
    "0",
    "-1",
    "1",
    "7",
    "1e-3",
    "1_000",
    "+5",
    " 5",
    "-0.0",
    "1e-320",
    "2147483648",
    "9223372036854775808",
    "1" * 40,
)
FINITE = ("FiniteFloat", "Numbers")
SLOW = {
    ("demo",),
    ("doctor",),
    ("sweep", "run"),
    ("data", "download"),
}  # which compute or reach out before they read on
COMPUTING = {("fit",), ("requant",), ("attribute",), ("prune",), ("submit", "make")}
WORK = {"--tune-tokens", "--samples"}  # what is asked for is done, however much
CHECKPOINT = "checkpoints/pico/step_000012-final"
GIVEN: dict[tuple[str, ...], tuple[str, ...]] = {  # what a command needs beside the option, small
    ("import",): ("model.pt",),
    ("export",): (CHECKPOINT, "--out", "out.pt"),
    ("curves",): ("checkpoints/pico",),
    ("swa-blend",): (CHECKPOINT, "--last", "2"),
    ("ema-blend",): (CHECKPOINT, "--sigma", "0.1"),
    ("prune",): (CHECKPOINT, "--share", "0.1", "--calibration-tokens", "64"),
    ("requant",): (CHECKPOINT, "--calibration-tokens", "64"),
    ("calibrate",): (CHECKPOINT, "--tokens", "64"),
    ("diagnose",): (CHECKPOINT, "--tokens", "64"),
    ("fit",): (CHECKPOINT, "--calibration-tokens", "64", "--kappa", "off", "--budget", "9000"),
    ("attribute",): (CHECKPOINT, "--tokens", "64", "--calibration-tokens", "64"),
    ("eval",): (CHECKPOINT, "--max-tokens", "64"),
    ("compare",): (CHECKPOINT, "checkpoints/pico/step_000009-frac75", "--max-tokens", "64"),
    ("size",): ("model.pt",),
}


def leaves(group: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command below a group with the words that call it."""
    if not isinstance(group, click.Group):
        yield words, group
        return
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield from leaves(command, (*words, name))


def is_numeric(option: click.Parameter) -> bool:
    kinds = (type(click.INT), type(click.FLOAT), click.IntRange, Values)
    return isinstance(option.type, kinds) or type(option.type).__name__ in FINITE


def numeric_options() -> list[tuple[tuple[str, ...], str, str]]:  # words, flag, type
    """Return every numeric option of every command."""
    return [
        (words, option.opts[0], type(option.type).__name__)
        for words, command in leaves(cli)
        for option in command.params
        if isinstance(option, click.Option) and is_numeric(option)
    ]


def require_foreseen(call: Call, words: tuple[str, ...], flag: str, value: str, given: tuple[str, ...]) -> int:
    """Return a call's exit code. Raises AssertionError for a traceback, a warning, or an error without words."""
    command = (*words, *given, f"{flag}={value}")
    try:
        answer = call(*command)
    except Exception as error:
        raise AssertionError(f"{' '.join(command)}: {type(error).__name__}: {error}") from error
    assert answer.code in CODES, f"{' '.join(command)}: exit code {answer.code}: {answer.err[-300:]}"
    assert "Traceback" not in answer.err, f"{' '.join(command)}: {answer.err[-300:]}"
    assert "Warning" not in answer.err, f"{' '.join(command)}: {answer.err[-300:]}"
    assert answer.code == 0 or "rror: " in answer.err or answer.code > 2, f"{' '.join(command)}: {answer.err[-300:]}"
    return answer.code


def test_there_are_numeric_options_and_all_are_found() -> None:
    found = numeric_options()
    assert {("fit",), ("eval",), ("ledger", "scan"), ("cache", "prune")} <= {words for words, _, _ in found}
    plain = [
        (words, option.opts[0])
        for words, command in [*leaves(cli), (("trainer",), trainer.__main__.command)]
        for option in command.params
        if type(option.type) is click.FloatRange or (type(option.type) is type(click.FLOAT) and not is_setting(option))
    ]
    assert not plain, f"these take NaN and infinity: {plain}; use pgolf_post.base.numbers.FiniteFloat"


def numbers_for(words: tuple[str, ...], flag: str) -> list[str]:
    """Return the numbers to try: all where a call is fast, a share where it computes, none that ask for days."""
    numbers = [value for value in NUMBERS if flag not in WORK or float(value) < 100]
    return numbers[len(flag) % 3 :: 3] if words in COMPUTING else numbers


def is_setting(option: click.Parameter) -> bool:
    """Whether a settings class checks what is given, and refuses NaN and infinity."""
    return hasattr(option, "settings_field")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("calibrate", CHECKPOINT, "--tokens", "64", "--seed", "1" * 40), 2, "seed = .*less than or equal to 9223"),
        (("diagnose", CHECKPOINT, "--tokens", "1"), 2, "tokens = 1: Input should be greater than or equal to 2"),
        (("requant", CHECKPOINT, "--calibration-tokens", "64", "--clip", "1e-320"), 1, "the step of .* is "),
    ],
)
def test_numbers_that_were_tracebacks_are_refused_by_name(
    pgolf: Call, command: tuple[str, ...], code: int, said: str
) -> None:
    answer = pgolf(*command)
    assert (answer.code, bool(re.search(said, answer.err))) == (code, True), answer.err


def test_what_is_no_number_is_refused_where_there_is_nothing_yet(
    pgolf: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for number, (words, flag, kind) in enumerate(numeric_options()):
        value = NO_NUMBERS[number % len(NO_NUMBERS)]
        assert require_foreseen(pgolf, words, flag, value, ()), f"{words} {flag}={value} was accepted"
        if kind in FINITE:
            assert require_foreseen(pgolf, words, flag, "nan", ()) == 2
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.long
@pytest.mark.parametrize("command", sorted({words for words, _, _ in numeric_options()} - SLOW), ids=" ".join)
def test_every_value_of_every_numeric_option_is_refused_or_accepted(
    pgolf: Call, pico_data: Any, command: tuple[str, ...]
) -> None:
    if command == ("import",):
        pgolf("export", CHECKPOINT, "--out", "model.pt")
    Path("model.pt").touch()
    with contextlib.suppress(FileNotFoundError):
        Path("checkpoints/latest").unlink()
    for words, flag, _ in numeric_options():
        if words == command:
            given = GIVEN.get(words, ())
            for value in NO_NUMBERS:
                assert require_foreseen(pgolf, words, flag, value, given), f"{words} {flag}={value!r} was accepted"
            for value in numbers_for(words, flag):
                require_foreseen(pgolf, words, flag, value, given)
