"""The settings in a training log: the "  name: value" lines that a public script prints under "Hyperparameters:".

Real logs are less tidy. torchrun and loggers put a prefix before each line (`[rank0]:`, a time), a terminal colours
them, a shell writes UTF-16, two handlers write each line twice, a warning comes in between, and a run that was
restarted appends a second block. A block is read through all of that; what is skipped is named, and blocks that
disagree are not chosen from in silence.

    [rank0]:Hyperparameters:       a prefix is whatever stands before the word; digits in it may change
    [rank0]:  num_layers: 11       a setting: indented, or a known name
    W0413 04:52:40 torch/…         skipped, and said
    [rank0]:step:1/20000 …         the block ends: at a step, at the next block, after MAX_GAP other lines
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.base.file_kinds import UNKNOWN, file_kind
from pgolf_post.base.paths import absent
from pgolf_post.base.progress import say
from pgolf_post.base.text import decode_text
from pgolf_post.errors import MismatchError, NotFoundError, SettingsError
from pgolf_post.importers.script_source import smear_across_bos
from pgolf_post.importers.script_words import known_keys

COLOUR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")
HEADER = re.compile(r"hyperparameters[ \t]*:[ \t]*(?P<rest>\{.*|)$", re.IGNORECASE)  # scripts print their source too
PREFIX_END = ("|", "]:")  # of docker compose; of syslog: a date, a host, a program and its number
PREFIX_WORD = re.compile(r".*\d.*|\W+|.+[:|\]]|(?i:debug|info|warning|error|root)")  # numbers, marks, levels
LONGEST_PREFIX = 120  # characters
SETTING = re.compile(r"""^(?P<indent>\s*)["']?(?P<name>[A-Za-z][A-Za-z0-9_]*)["']?\s*[:=]\s*(?P<value>.*?),?\s*$""")
TRAINING = re.compile(r"^\s*(?:(?:warmup_)?step|epoch|iter)\b[\s:=]*\d", re.IGNORECASE)
MAX_GAP = 20  # other lines in a row within a block: a warning of torchrun has four
NOTHING_ELSE = "give the settings with --set or --config"
WORDS: dict[str, Any] = {"True": True, "TRUE": True, "False": False, "FALSE": False, "None": None, "null": None}


@dataclass
class Block:
    """The settings under one "Hyperparameters:" line."""

    line: int  # of the header, counted from 1
    prefix: str
    settings: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # of each setting
    conflicts: list[str] = field(default_factory=list)
    repeated: int = 0  # settings that stand there twice, the same
    skipped: list[str] = field(default_factory=list)
    is_indented: bool = False  # its settings stand further right than its header
    is_cut: bool = False  # the file ends inside it

    def add(self, name: str, value: Any, line: int) -> None:
        """Take one setting; a second one of the same name must have the same value."""
        if name in self.settings:
            self.repeated += 1
            if repr(self.settings[name]) != repr(value):  # NaN is not equal to itself
                was = f"{name} = {self.settings[name]!r} in line {self.lines[name]}"
                self.conflicts.append(f"{was}, {value!r} in line {line}")
            return
        self.settings[name], self.lines[name] = value, line


def read_log(path: Path, block: int | None = None) -> dict[str, Any]:
    """Return the settings in a log, and say what was skipped; `block` chooses among several, counted from 1.

    Raises NotFoundError, MismatchError if the log has no settings, SettingsError if blocks disagree about the model.
    """
    if not path.is_file():
        raise NotFoundError(absent(path, "log"))
    lines = _lines(path)
    blocks = read_blocks(lines)
    if not blocks:
        raise MismatchError(f"{path} has no 'Hyperparameters:' line", hint=NOTHING_ELSE)
    empty = [str(found.line) for found in blocks if not found.settings]
    blocks = [found for found in blocks if found.settings]
    if not blocks:
        raise MismatchError(
            f"{path}: no '  name: value' line stands under 'Hyperparameters:' in line {', '.join(empty)}",
            hint=NOTHING_ELSE,
        )
    chosen = _choose(blocks, block, path)
    if chosen.conflicts:
        raise SettingsError(
            f"{path}: one block gives settings two values: {'; '.join(chosen.conflicts)}",
            hint="keep the line that holds in a copy of the log, and import with that",
        )
    for note in notes_on(chosen):
        say(f"{path}: {note}")
    return chosen.settings | _from_source(lines, chosen, path)


def _from_source(lines: Sequence[str], block: Block, path: Path) -> dict[str, Any]:
    """Return what only the script's source says, if the log begins with it."""
    across = smear_across_bos(lines)
    if across is None or "smear_across_bos" in block.settings or not block.settings.get("smear_gate_enabled"):
        return {}
    say(f"{path} holds the script's source: its smear gate {'mixes across' if across else 'stops at'} BOS")
    return {"smear_across_bos": across}


def _lines(path: Path) -> list[str]:
    """Return a log's lines without colours. Raises MismatchError for a file that is no text."""
    content = path.read_bytes()
    text = decode_text(content, errors="replace")
    kind = file_kind(content)
    if kind.name not in ("text", UNKNOWN.name) and "Hyperparameters" not in text:
        raise MismatchError(f"{path} is {kind.words}, not a log", hint=kind.hint.format(path=path))
    return [COLOUR.sub("", line) for line in text.replace("\0", "").split("\n")]  # a crash leaves nulls behind


def read_blocks(lines: Sequence[str]) -> list[Block]:
    """Return every block of settings in a log's lines."""
    blocks: list[Block] = []
    current: Block | None = None
    gap: list[str] = []  # lines that are no settings since the last one
    for number, line in enumerate(lines, 1):
        header = _header(line)
        if header:
            if current and not current.settings:  # written twice, or by every rank
                blocks.remove(current)
            current, gap = Block(number, header[0]), []
            blocks.append(current)
            _read_inline(current, header[1], number)
        elif current:
            setting = _setting(line, current)
            if setting:
                current.skipped += [text for text in gap if text.strip()]
                current.add(*setting, number)
                gap = []
            elif TRAINING.match(_without(line, current.prefix) or line) or len(gap) == MAX_GAP:
                current = None
            else:
                gap.append(line)
    if current:
        current.is_cut = not any(text.strip() for text in gap)
    return blocks


def _header(line: str) -> tuple[str, str] | None:
    """Return what stands before and after a block's first word; None if the line is none, or a sentence with it."""
    match = HEADER.search(line)
    prefix = line[: match.start()] if match else ""
    if not match or len(prefix) > LONGEST_PREFIX:
        return None
    if not prefix.rstrip().endswith(PREFIX_END) and not all(map(PREFIX_WORD.fullmatch, prefix.split())):
        return None
    return prefix.lstrip(), match["rest"].strip()


def _read_inline(block: Block, rest: str, line: int) -> None:
    """Take the settings of a dictionary that stands on the header's own line."""
    if not rest.startswith("{") or not rest.rstrip().endswith("}"):
        return
    for read in (ast.literal_eval, json.loads):
        try:
            found = read(rest.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, Mapping):
            for name, value in found.items():
                block.add(str(name).lower(), value, line)
            return


def _without(line: str, prefix: str) -> str | None:
    """Return a line without its block's prefix, in which digits may differ; None if it has another one."""
    if not prefix:
        return line
    parts = re.split(r"\d+", prefix.rstrip())
    match = re.match(r"\s*" + r"\d+".join(map(re.escape, parts)), line)
    return line[match.end() :] if match else None


def _setting(line: str, block: Block) -> tuple[str, Any] | None:
    """Return the name and value on a line; None if it is no setting.

    Where a logger took the indentation off, only single values of known names count.
    """
    rest = _without(line, block.prefix)
    match = SETTING.match(rest) if rest is not None else None
    if not match:
        return None
    name, column = match["name"].lower(), len(match["indent"].expandtabs(2))
    if column > len(block.prefix) - len(block.prefix.rstrip()):
        block.is_indented = True
    elif block.is_indented or name not in known_keys() or " " in match["value"]:
        return None
    return name, _value(match["value"])


def _value(text: str) -> Any:
    """Read a log's value: Python's and JSON's words, else as TOML, else the bare text."""
    if text in WORDS:
        return WORDS[text]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _choose(blocks: Sequence[Block], block: int | None, path: Path) -> Block:
    """Return the block asked for, or the last of several that agree about the model. Raises SettingsError."""
    if block is not None:
        if block > len(blocks):
            raise SettingsError(f"{path} has {len(blocks)} blocks of Hyperparameters, --log-block asks for {block}")
        return blocks[block - 1]
    differences = model_differences(blocks)
    if differences:
        where = ", ".join(f"{i} in line {found.line}" for i, found in enumerate(blocks, 1))
        raise SettingsError(
            f"{path} has {len(blocks)} blocks of Hyperparameters ({where}), which disagree: {'; '.join(differences)}",
            hint=f"say which one trained this file: --log-block 1 … {len(blocks)} (a restarted run appends the last)",
        )
    if len(blocks) > 1:
        say(f"{path}: {len(blocks)} blocks of Hyperparameters, the same about the model; the last is taken")
    return blocks[-1]


def model_differences(blocks: Sequence[Block]) -> list[str]:
    """Return the settings of the model in which blocks differ, with every block's value."""
    names = sorted({name for block in blocks for name in block.settings if name in known_keys()})
    values = {
        name: [repr(block.settings[name]) if name in block.settings else "absent" for block in blocks] for name in names
    }
    return [f"{name} = {' | '.join(each)}" for name, each in values.items() if len(set(each)) > 1]


def notes_on(block: Block) -> list[str]:
    """Return what a person should know about how a block was read."""
    notes = []
    if block.prefix.strip():
        notes.append(f"prefix {block.prefix.strip()!r} taken off its lines")
    if block.repeated:
        notes.append(f"{block.repeated} settings stand there more than once, with the same value")
    if block.skipped:
        shown = "; ".join(repr(line.strip()[:80]) for line in block.skipped[:4])
        notes.append(f"{len(block.skipped)} lines among the settings are none and were skipped: {shown}")
    if block.is_cut:
        notes.append(f"it ends inside the block, after {list(block.settings)[-1]}: settings may be missing")
    return notes
