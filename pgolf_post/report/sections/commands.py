"""Commands: what was typed to make each thing, to copy."""

from __future__ import annotations

import shlex

from pgolf_post.ledger import Row
from pgolf_post.report.blocks import Commands, Section
from pgolf_post.report.subject import Subject

SHOWN = 200  # the newest


def commands(subject: Subject) -> Section | None:
    """Return the section of the recorded commands, the newest first; each once, with all that it made."""
    made: dict[str, list[str]] = {}
    for row in reversed(subject.rows):
        if row.command:
            made.setdefault(row.command, []).append(_name(row))
    for one in subject.checkpoints:
        argv = one.meta.get("argv")
        if isinstance(argv, list) and argv and one.meta["kind"] == "raw":
            command = f"python -m trainer {shlex.join(map(str, argv))}"
            if not any(known.endswith(shlex.join(map(str, argv))) for known in made):
                made.setdefault(command, []).append(f"run {one.path.parent.name}")
    rows = [(", ".join(dict.fromkeys(names)), command) for command, names in list(made.items())[:SHOWN]]
    note = "As recorded when each was made, relative to the folder it was typed in."
    return Section("commands", "Commands", [Commands("What made each thing", rows)], note) if rows else None


def _name(row: Row) -> str:
    return f"{row.kind} {row.name or row.id[:12]}"
