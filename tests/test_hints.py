"""Hints name commands and options that there are: what an error advises can be typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import trainer.__main__
from pgolf_post.cli import cli

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("pgolf_post", "trainer") for path in sorted((ROOT / package).rglob("*.py"))]
OTHERS = {"--nproc_per_node", "--force-reinstall", "--format"}  # of torchrun, pip and xz
CALL = re.compile(r"pgolf-post ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?([^,;:()]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")


def text_of(node: ast.AST) -> str:
    """The constant text in an expression, … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.FormattedValue):
        return "…"
    return " ".join(text_of(part) for part in ast.iter_child_nodes(node))


def hints() -> Iterator[tuple[str, str]]:
    """Every `hint=` of the tree and every constant that one names: (file:line, text)."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
    given = [
        (path, keyword.value)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "hint"
    ]
    names = {name.id for _, value in given for name in ast.walk(value) if isinstance(name, ast.Name)}
    constants = [
        (path, node.value)
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in node.targets)
    ]
    for path, value in [*given, *constants]:
        yield f"{path.relative_to(ROOT)}:{value.lineno}", text_of(value)


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def commands() -> dict[tuple[str, str], click.Command]:
    """(command, subcommand or nothing) → command."""
    context, found = click.Context(cli), dict[tuple[str, str], click.Command]()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found[name, ""] = command
        if isinstance(command, click.Group):
            found.update({(name, sub): inner for sub, inner in command.commands.items()})
    return found


KNOWN = commands()
ANY = set().union(*map(options_of, [*KNOWN.values(), cli, trainer.__main__.command])) | OTHERS


def problems(text: str) -> list[str]:
    """What of a hint could not be typed."""
    wrong = [f"no command has {flag}" for flag in FLAG.findall(text) if flag not in ANY]
    for name, word, rest in CALL.findall(text):
        if (name, "") not in KNOWN:
            wrong.append(f"no command {name}")
            continue
        is_group = isinstance(KNOWN[name, ""], click.Group)
        if is_group and (name, word) not in KNOWN:
            wrong.append(f"no command {name} {word}")
            continue
        options = options_of(KNOWN[name, word if is_group else ""])
        wrong += [f"{name} {word} has no {flag}" for flag in FLAG.findall(rest) if flag not in options]
    return wrong


def test_every_hint_can_be_typed() -> None:
    found = list(hints())
    assert len(found) > 150
    wrong = {place: (text, problems(text)) for place, text in found if problems(text)}
    assert wrong == {}


@pytest.mark.parametrize(
    "text", ["pgolf-post shew it", "pgolf-post checkpoint fetch", "pgolf-post calibrate --bits 3", "raise --no-such"]
)
def test_a_hint_that_cannot_be_typed_is_found(text: str) -> None:
    assert problems(text)
