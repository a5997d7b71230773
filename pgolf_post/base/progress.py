"""What a person sees while a command works: progress with an ETA, tables, and one JSON line for machines.

Everything for people goes to stderr, so that `--json` leaves stdout to exactly one JSON object as its last line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

_live: list[Any] = []  # the progress display on the terminal, if one is up; inner work adds a line to it
_silent: list[bool] = []  # not empty: this process is one of several and not the one that speaks


def silence() -> None:
    """Print nothing for people from here on: for processes beside the one that speaks."""
    _silent.append(True)


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing is said inside: for looking up, again and again, what is known to be there."""
    _silent.append(True)
    try:
        yield
    finally:
        _silent.pop()


def console() -> Any:
    """A rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=bool(_silent))


def say(message: str) -> None:
    """One line for the person at the terminal, above the progress display if one is up."""
    if _silent:
        return
    live = _live[:1]  # taken once: another thread may close the display meanwhile
    if live:
        live[0].console.print(message, markup=False, soft_wrap=True)
    else:
        click.echo(message, err=True)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`: done/total, elapsed and ETA on a terminal, one closing line elsewhere."""
    with _display() as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count)
            if note:
                progress.update(task, note=note)

        try:
            yield advance
            finished = next(row for row in progress.tasks if row.id == task)
            if not progress.console.is_terminal:
                say(f"{description}: {total} done in {finished.elapsed or 0.0:.1f} s")
        finally:
            if _live and progress.tasks and progress.tasks[0].id != task:
                progress.remove_task(task)  # inner work leaves no line behind


@contextmanager
def _display() -> Iterator[Any]:
    """The progress display that is up, or a new one for as long as the outermost work lasts."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if _live:
        yield _live[0]
        return
    terminal = console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    closing = (TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *closing, console=terminal, disable=not terminal.is_terminal) as progress:
        if terminal.is_terminal:
            _live.append(progress)
        try:
            yield progress
        finally:
            _live.clear()


def terminal_width() -> int:
    """Columns that a table may fill; 160 where stderr is no terminal."""
    terminal = console()
    return terminal.width if terminal.is_terminal else 160


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people. Columns after the first are right-aligned."""
    from rich.table import Table

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    terminal = console()
    terminal.width = terminal_width()
    say(title)
    terminal.print(table)


def print_json(value: dict[str, Any]) -> None:
    """The machine's answer: one JSON object on one line of stdout."""
    click.echo(json.dumps(value, allow_nan=False))
