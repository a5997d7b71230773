"""Every numeric option of every command refuses or accepts whatever is typed for it, and never ends in a traceback.

The options are click's own list, so that a new one is tried without a word here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

import pgolf_post.cli
import trainer.__main__
from pgolf_post.base.threads import THREAD_VARIABLES
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli import cli
from pgolf_post.cli.plan_options import Values
from pgolf_post.data import DataFolder
from tests.cli.conftest import Call, caller
from tests.cli.test_cli_import import write_model
from tests.conftest import pico_documents, pico_recipe, write_recipe
from trainer.run.loop import Trainer

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
LEFT_OUT = {  # of the campaign with a given place; what is no number is refused by these too, where there is nothing
    ("demo",): "trains whatever the number of threads",
    ("doctor",): "measures the machine for seconds",
    ("data", "download"): "reaches out before it reads on",
}
SHARES = {
    ("attribute",): 6,
    ("prune",): 5,
    ("fit",): 4,
    ("requant",): 3,
    ("report",): 3,
}  # which compute: one in so many
MOST = {  # of options for which all that is asked for is done, however much
    "--tune-tokens": 100,  # read again as often as it takes
    "--samples": 100,  # each is a run of its own
    "--workers": 3,  # each is a process
}
LEAST = {"--shard-tokens": 1000}  # each shard is a file
MANY_THREADS = ("7", "1_000", "+5", " 5")  # that many are made; the largest are refused
REFUSED = {("submit", "make"), ("submit", "check"), ("plan-size",), ("repack",)}  # once all options are read
CHECKPOINT = "checkpoints/pico/step_000012-final"
SPEC = """question = "bits?"
noise_repeats = 0
grid = {"*.bits" = [6]}
calibration = {tokens = 64}
stages = {screen = {tokens = 64}}
"""
LOG = "| # | name | val_bpb |\n|---|---|---|\n| 1 | control | 1.25 |\n"
GIVEN: dict[tuple[str, ...], tuple[str, ...]] = {  # what a command needs beside the option, small
    ("data", "build"): ("text.jsonl", "--vocab-size", "300", "--out", "built", "--force"),
    ("data", "check"): ("DATA",),
    ("import",): ("model.pt", "--data", "DATA", "--metric-tokens", "64", "--log", "train.log", "SETTINGS"),
    ("export",): (CHECKPOINT, "--format", "flat", "--out", "out.pt"),
    ("checkpoint", "verify"): (CHECKPOINT,),
    ("curves",): ("checkpoints/pico",),
    ("swa-blend",): (CHECKPOINT, "--last", "2"),
    ("ema-blend",): ("checkpoints/averaged/step_000012-final", "--sigma", "0.1"),
    ("prune",): (CHECKPOINT, "--share", "0.1", "--calibration-tokens", "64"),
    ("requant",): (CHECKPOINT, "--calibration-tokens", "64"),
    ("calibrate",): (CHECKPOINT, "--tokens", "64"),
    ("diagnose",): (CHECKPOINT, "--tokens", "64"),
    ("fit",): (CHECKPOINT, "--calibration-tokens", "64", "--kappa", "off", "--budget", "9000"),
    ("attribute",): (CHECKPOINT, "--tokens", "64", "--calibration-tokens", "64"),
    ("eval",): (CHECKPOINT, "--max-tokens", "64"),
    ("compare",): (CHECKPOINT, "checkpoints/pico/step_000009-frac75", "--max-tokens", "64"),
    ("audit",): ("ARTIFACT", "--tokens", "40", "--samples", "1", "--power", "0.1"),
    ("repack",): ("ARTIFACT",),
    ("compress",): ("ARTIFACT", "--codecs", "brotli"),
    ("size",): ("ARTIFACT",),
    ("submit", "check"): ("record",),
    ("submit", "make"): ("ARTIFACT", "--name", "taken", "--draft", "--out", "record"),  # refused once all is read
    ("plan-size",): ("recipe.toml", "--budget", "9000", "--seconds", "1", "--size", "model.num_layers=2"),  # too few
    ("sweep", "plan"): ("done.toml", "--checkpoint", CHECKPOINT),
    ("sweep", "run"): ("done.toml", "--checkpoint", CHECKPOINT),
    ("sweep", "watch"): ("done.toml", "--checkpoint", CHECKPOINT),
    ("ledger", "import"): ("log.md", "--run", "log", "--replace"),
    ("report",): (CHECKPOINT,),
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
    least, most = LEAST.get(flag, 1), MOST.get(flag, float("inf"))
    numbers = [value for value in NUMBERS if float(value) < 1 or least <= float(value) <= most]
    if flag == "--threads":
        numbers = [value for value in numbers if value not in MANY_THREADS]
    share = SHARES.get(words, 1)
    return numbers[len(flag) % share :: share]


def is_setting(option: click.Parameter) -> bool:
    """Whether a settings class checks what is given, and refuses NaN and infinity."""
    return hasattr(option, "settings_field")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("calibrate", CHECKPOINT, "--tokens", "64", "--seed", "1" * 40), 2, "seed = .*less than or equal to 9223"),
        (("data", "build", "text", "--threads", "2147483648"), 2, "threads = .*less than or equal to 1024"),
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder, pico_run_original: Path) -> Path:
    """A folder with something for every command, which all of them work in, so that little is computed twice."""
    folder = tmp_path_factory.mktemp("numbers")
    shutil.copytree(pico_run_original, folder / "checkpoints", symlinks=True)
    (folder / "train.log").write_text("Hyperparameters:\n  matrix_lr: 0.02\n")
    (folder / "record").mkdir()
    (folder / "record" / "README.md").write_text("a record")
    (folder / "done.toml").write_text(SPEC)
    (folder / "log.md").write_text(LOG)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": each.text}) + "\n" for each in pico_documents()))
    write_recipe(pico_recipe(pico_data, folder / "checkpoints"), folder / "recipe.toml")
    averages = {"run": {"name": "averaged"}, "optim": {"momentum_warmup_steps": 3, "power_ema_sigmas": [0.05, 0.1]}}
    Trainer(pico_recipe(pico_data, folder / "checkpoints", **averages)).run()
    return folder


@pytest.fixture
def command_in_place(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    for variable in THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")
    monkeypatch.chdir(place)
    return caller(pgolf_post.cli.main, "pgolf-post", monkeypatch, capsys)


def given_for(call: Call, words: tuple[str, ...], data: Path) -> tuple[str, ...]:
    """Return the arguments of a command, with this run's paths; make what they name."""
    named = {"DATA": [str(data)]}
    if "SETTINGS" in GIVEN.get(words, ()):
        named["SETTINGS"] = write_model(Checkpoint.open(Path(CHECKPOINT)), Path("model.pt"))
    if "ARTIFACT" in GIVEN.get(words, ()):
        named["ARTIFACT"] = [call("requant", *GIVEN[("requant",)], "--json").json["artifact"]]
    if words[0] == "sweep":
        assert call("sweep", "run", *GIVEN[("sweep", "run")]).code == 0
    return tuple(each for word in GIVEN.get(words, ()) for each in named.get(word, [word]))


def forget(place: Path) -> None:
    """Remove results under names that a command writes to once."""
    for path in (place / "checkpoints" / "model", *place.glob("checkpoints/averaged/*ema_*")):
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.long
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    "command", sorted({words for words, _, _ in numeric_options()} - LEFT_OUT.keys()), ids=" ".join
)
def test_every_value_of_every_numeric_option_is_refused_or_accepted(
    command_in_place: Call, pico_data: DataFolder, place: Path, command: tuple[str, ...]
) -> None:
    given, codes = given_for(command_in_place, command, pico_data.path), set()
    for words, flag, _ in numeric_options():
        if words == command:
            for value in NO_NUMBERS:
                code = require_foreseen(command_in_place, words, flag, value, given)
                assert code, f"{words} {flag}={value!r} was accepted"
            for value in numbers_for(words, flag):
                forget(place)
                codes.add(require_foreseen(command_in_place, words, flag, value, given))
    torch.set_num_threads(1)
    assert (0 in codes) is (command not in REFUSED), f"{command} is never accepted, or no longer refused: {codes}"
