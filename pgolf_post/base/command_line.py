"""A command as a process: its failures as one line, the next command and an exit code.

Shared by `pgolf-post` and the trainer. Nothing here imports torch at start-up, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys

import click

from pgolf_post.base.threads import settle_threads
from pgolf_post.errors import PgolfError

FAILED, INTERRUPTED = 1, 130  # exit codes


def run_command(command: click.Command) -> None:
    """Run a command and end the process with its exit code.

    A foreseen failure is printed as `error: message` and `next: hint`; only an unforeseen one shows a traceback. Under
    torchrun the process ends without the interpreter's own clean-up (see `pgolf_post.base.ranks.end_process`).
    """
    settle_threads()
    code = _exit_code(command)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pgolf_post.base.ranks import end_process

        end_process(code)
    if code:
        sys.exit(code)


def _exit_code(command: click.Command) -> int:
    """Run a command, print its failure if it fails, and return its exit code."""
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was left half-written", err=True)
        return INTERRUPTED
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return FAILED
    except PgolfError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"next: {error.hint}", err=True)
        return error.exit_code
    return 0
