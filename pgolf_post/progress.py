"""What a person sees while a command works: progress with an ETA, tables, and one JSON line for machines.

Everything for people goes to stderr, so that `--json` leaves stdout to exactly one JSON object as its last line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def console() -> Any:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line for the person at the terminal."""
    click.echo(message, err=True)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`: done/total, elapsed and ETA on a terminal, one closing line elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    terminal = console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count)
            if note:
                progress.update(task, note=note)

        yield advance
        if not terminal.is_terminal:
            say(f"{description}: {total} done in {progress.tasks[0].elapsed or 0.0:.1f} s")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people. Columns after the first are right-aligned."""
    from rich.table import Table

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    terminal = console()
    if not terminal.is_terminal:
        terminal.width = 160
    say(title)
    terminal.print(table)


def print_json(value: dict[str, Any]) -> None:
    """The machine's answer: one JSON object on one line of stdout."""
    click.echo(json.dumps(value, allow_nan=False))
