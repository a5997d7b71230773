"""Output of a command: progress with an ETA and tables for people, one JSON line for machines.

Everything for people goes to stderr, so that `--json` leaves stdout to exactly one JSON object as its last line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from pgolf_post.base.plain_tables import PLAIN_WIDTH, plain_table

_live: list[Any] = []  # the progress display on the terminal, if there is one; inner work adds a line to it
_silent: list[bool] = []  # not empty: print nothing for people
_quiet: list[bool] = []  # not empty: print tables alone for people
_last_line: list[float] = []  # by time.monotonic(): when progress was last printed where there is no terminal

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def silence() -> None:
    """Print nothing for people from here on: for all processes of a group but the first."""
    _silent.append(True)


@contextmanager
def hushed() -> Iterator[None]:
    """Print nothing for people inside the block: for look-ups that would repeat known messages."""
    _silent.append(True)
    try:
        yield
    finally:
        _silent.pop()


@contextmanager
def tables_alone() -> Iterator[None]:
    """Print tables, and nothing else for people, inside the block: the option --quiet."""
    _quiet.append(True)
    try:
        yield
    finally:
        _quiet.pop()


def console() -> Any:
    """Return a rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=bool(_silent))


def say(message: str) -> None:
    """Print one line for people, above the progress display if there is one."""
    if not (_silent or _quiet):
        _print_line(message)


def _print_line(message: str) -> None:
    live = _live[:1]  # taken once: another thread may close the display meanwhile
    if live:
        live[0].console.print(message, markup=False, soft_wrap=True)
    else:
        click.echo(message, err=True)


@contextmanager
def progress_bar(
    description: str,
    total: int,
    unit: str = "steps",  # plural of what is counted
) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`: done/total, elapsed and ETA, as a bar on a terminal and as lines elsewhere.

    Where there is no terminal, all bars together print at most one line in LINE_SECONDS.
    """
    with _display() as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(count: int = 1, note: str = "") -> None:
            progress.update(task, advance=count)
            if note:
                progress.update(task, note=note)
            if not progress.console.is_terminal:
                say_if_due(lambda: f"{description}: {_state(task_of())} {note}".rstrip())

        def task_of() -> Any:
            return next(other for other in progress.tasks if other.id == task)

        if not progress.console.is_terminal:
            _last_line[:] = _last_line or [time.monotonic()]
        try:
            yield advance
            if not progress.console.is_terminal:
                say_if_due(lambda: f"{description}: {total:,} {unit} in {task_of().elapsed or 0.0:.1f} s")
        finally:
            if _live and progress.tasks and progress.tasks[0].id != task:
                progress.remove_task(task)  # inner work leaves no line behind


def say_if_due(line: Callable[[], str]) -> None:
    """Print a line of progress unless another was printed less than LINE_SECONDS ago."""
    now = time.monotonic()
    if now - _last_line[0] >= LINE_SECONDS:
        _last_line[:] = [now]
        say(line())


def _state(task: Any) -> str:
    """Return how far a task is: done, total, unit, seconds spent and expected."""
    spent, done = task.elapsed or 0.0, task.completed
    rest = f", about {spent / done * (task.total - done):.0f} s to go" if done else ""
    return f"{done:,.0f} of {task.total:,.0f} {task.fields['unit']} in {spent:.0f} s{rest}"


@contextmanager
def _display() -> Iterator[Any]:
    """Yield the current progress display, or a new one that ends with the block."""
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
    counted = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    timed = (TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
    with Progress(
        *counted,
        *timed,
        TextColumn("{task.fields[note]}"),
        console=terminal,
        disable=not terminal.is_terminal or bool(_quiet),
    ) as progress:
        if terminal.is_terminal:
            _live.append(progress)
        try:
            yield progress
        finally:
            _live.clear()


def terminal_width() -> int:
    """Return the number of characters that a table may fill in a line; 80 where stderr is no terminal."""
    terminal = console()
    return terminal.width if terminal.is_terminal else PLAIN_WIDTH


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people. Columns after the first are right-aligned.

    Where stderr is no terminal, lines have no box characters and at most 80 columns, and no value is cut.
    """
    from rich.table import Table

    terminal = console()
    if not terminal.is_terminal:
        if not _silent:
            click.echo("\n".join(filter(None, [title, *plain_table(header, rows)])), err=True)
        return
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    if not _silent:
        _print_line(title)
    terminal.print(table)


def print_json(value: dict[str, Any]) -> None:
    """Print the answer for machines: one JSON object on one line of stdout."""
    click.echo(json.dumps(value, allow_nan=False))
