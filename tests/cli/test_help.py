"""The words of `--help`, for every command of the tool: sentences with capitals and full stops, choices as choices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

import click
import pytest

from pgolf_post.cli import COMMANDS, cli
from pgolf_post.cli.common import SettingsChoice, SettingsOption

# Begins with a capital, a symbol or a quoted literal; ends with a full stop (or … after examples) before any brackets.
SENTENCE = re.compile(r"""^[A-ZΣ"'`].*[.…](\s+\[(default|required).*\])?$""", re.DOTALL)


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Yield every command and group below `group` with its path."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield " ".join((*path, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = list(commands(cli))
OPTIONS = [
    pytest.param(option, id=f"{path} {option.opts[0]}")
    for path, command in ALL
    for option in command.params
    if isinstance(option, click.Option)
]


def problems(text: str | None) -> list[str]:
    """Return what is wrong with an option's or command's help."""
    if not text:
        return ["there is no help"]
    wrong = [] if SENTENCE.match(text.strip()) else ["not a sentence: a capital letter first, a full stop last"]
    return wrong + (["a default of None is printed"] if "default: None" in text else [])


@pytest.mark.parametrize("option", OPTIONS)
def test_the_help_of_an_option_is_a_sentence(option: click.Option) -> None:
    assert problems(option.help) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_for_a_literal_is_a_choice_among_its_names(option: click.Option) -> None:
    if isinstance(option, SettingsOption):
        annotation = option.settings_field.annotation
        literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
        names = [str(name) for part in literals for name in get_args(part)]
        assert isinstance(option.type, SettingsChoice) == bool(names)
        assert [*getattr(option.type, "choices", [])] == names


def test_options_of_settings_are_among_them() -> None:
    assert sum(isinstance(param.values[0], SettingsOption) for param in OPTIONS) > 20


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_the_first_paragraph_of_a_command_is_made_of_sentences(path: str, command: click.Command) -> None:
    first = (command.help or "").partition("\n\n")[0].replace("\b", "")
    assert problems(first) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_of_a_command_in_the_list_is_a_sentence(name: str) -> None:
    assert problems(COMMANDS[name][1]) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Tokens per shard.  [default: 100000000]", 0),
        ("'sgd' or 'lora'.", 0),
        (None, 1),
        ("tokens per shard.", 1),
        ("Tokens per shard", 1),
        ("Tokens per shard  [default: 1]", 1),
        ("Tokens.  [default: None]", 1),
        ("of the text  [default: None]", 2),
    ],
)
def test_the_check_itself_sees_what_is_wrong(text: str | None, number: int) -> None:
    assert len(problems(text)) == number
