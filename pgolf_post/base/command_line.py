"""A command as a process: its failures as one line, the next command and an exit code.

Shared by `pgolf-post` and the trainer. Nothing here imports torch at start-up, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

import click

from pgolf_post.base.signals import exit_code_of_signal, signals_interrupt
from pgolf_post.base.storage import hint_of
from pgolf_post.base.streams import patient_streams
from pgolf_post.base.threads import settle_threads
from pgolf_post.errors import PgolfError

FAILED, INTERRUPTED = 1, 130  # exit codes


def run_command(command: click.Command) -> None:
    """Run a command and end the process with its exit code.

    A foreseen failure is printed as `error: message` and `next: hint`; only an unforeseen one shows a traceback. After
    SIGINT, SIGTERM or SIGHUP the code is 130, 143 or 129, whatever became of the interruption on its way here. Under
    torchrun the process ends without the interpreter's own clean-up (see `pgolf_post.base.ranks.end_process`).
    """
    settle_threads()
    with patient_streams():
        code = _interruptible_code(command)
    ranks = sys.modules.get("pgolf_post.base.ranks")  # not imported: one process
    if ranks is not None and ranks.has_joined():
        ranks.end_process(code)
    if code:
        sys.exit(code)


def _interruptible_code(command: click.Command) -> int:
    """Run a command and return its exit code; if a signal ended it, in whatever way, the signal's."""
    code: int | None = None
    try:
        with signals_interrupt():
            code = _exit_code(command)
    except BaseException:
        if exit_code_of_signal() is None:
            raise
    if code is None or (code != 0 and exit_code_of_signal() is not None):
        click.echo("interrupted; nothing was left half-written", err=True)
        return exit_code_of_signal() or INTERRUPTED
    return code


def _exit_code(command: click.Command) -> int | None:
    """Run a command, print its failure if it fails, and return its exit code; None if it was interrupted."""
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return None
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        if hint := hint_of(error):
            click.echo(f"next: {hint}", err=True)
        return FAILED
    except PgolfError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"next: {error.hint}", err=True)
        return error.exit_code
    return 0
