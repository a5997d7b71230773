"""Processor seconds of a round, by stage and by life, kept on disk while they are spent.

A stage runs as a child process. Twice a second the processor seconds of it and of all its descendants are read and
written down, so that a round that is killed at any moment, by whatever, has counted what it spent. When the child has
ended the system's own count takes the place of the last reading. A child does not outlive this process. Its idle
threads sleep unless the caller says otherwise: those that spin while they wait are counted as if they computed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.errors import PgolfError

READ_SECONDS = 0.5  # between two readings of a child's clock
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
MOST_LINES = 3  # of a failed child's errors


class Account:
    """Processor seconds by stage, one number for each life of a stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lives: dict[str, list[float]] = read_json(path) if path.is_file() else {}

    def begin(self, stage: str) -> Callable[[float], None]:
        """Open a life of a stage. Returns what writes down the seconds that it has spent so far."""
        lives = self.lives.setdefault(stage, [])
        place = len(lives)
        lives.append(0.0)

        def write(seconds: float) -> None:
            lives[place] = round(max(lives[place], seconds), 3)
            with atomic_file(self.path) as building:
                write_json(building, self.lives)

        write(0.0)
        return write

    def spent(self, *stages: str) -> float:
        """Return the seconds of some stages, of all their lives."""
        return sum(sum(self.lives.get(stage, ())) for stage in stages)


class Runner(Protocol):
    """Runs a stage: a child process, or in tests a call."""

    def run(self, module: str, words: Sequence[str], account: Account, stage: str, limit_seconds: float | None) -> str:
        """Run `python -m MODULE WORDS`, account for its seconds, return its standard output. Raises PgolfError."""


class SpentError(PgolfError):
    """A stage that went on beyond its processor seconds, and was ended."""


@dataclass(frozen=True)
class Children:
    """Runs stages as child processes: `python -m MODULE WORDS`."""

    def run(self, module: str, words: Sequence[str], account: Account, stage: str, limit_seconds: float | None) -> str:
        """Run a stage to its end and return what it wrote to standard output.

        `limit_seconds` is what the child may spend. Raises SpentError if it would spend more, having asked it to stop
        and keep what it has, and PgolfError, with its exit code, if it fails or if the system has no /proc.
        """
        if not Path("/proc/self/stat").is_file():
            raise PgolfError("mini golf reads processor seconds from /proc, which this system does not have")
        write, before = account.begin(stage), _waited_seconds()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            command, sleeping = [sys.executable, "-m", module, *words], {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
            child = subprocess.Popen(
                command, stdout=out, stderr=err, text=True, env=sleeping, preexec_fn=_die_with_parent
            )
            try:
                over = _watch(child, write, limit_seconds)
            except BaseException:  # asked to stop: the child saves what it has, which takes seconds too
                child.terminate()
                child.wait()
                raise
            finally:
                write(_waited_seconds() - before)
            out.seek(0)
            err.seek(0)
            if over:
                raise SpentError(f"{stage} has spent its {limit_seconds:,.1f} processor seconds and was stopped")
            if child.returncode:
                raise failed(stage, child.returncode, err.read())
            return out.read()


def failed(stage: str, code: int, errors: str) -> PgolfError:
    """Return the error of a stage that failed, with the last lines it wrote and its exit code."""
    error = PgolfError(f"{stage} failed (exit {code}): {' | '.join(errors.strip().splitlines()[-MOST_LINES:])}")
    error.exit_code = code if code > 0 else 1
    return error


def _watch(child: subprocess.Popen[str], write: Callable[[float], None], limit_seconds: float | None) -> bool:
    """Write down a child's seconds until it ends. Returns whether it was asked to stop at the limit."""
    over = False
    while True:
        try:
            child.wait(READ_SECONDS)
            return over
        except subprocess.TimeoutExpired:
            seconds = tree_seconds(child.pid)
            write(seconds)
            if limit_seconds is not None and seconds > limit_seconds and not over:
                child.send_signal(signal.SIGINT)
                over = True


def _die_with_parent() -> None:
    """Have the system kill this process when its parent dies (Linux)."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


def _waited_seconds() -> float:
    """Return processor seconds of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_seconds(pid: int) -> float:
    """Return processor seconds of a process, of its descendants, and of those of them that were waited for."""
    parents: dict[int, list[int]] = {}
    own: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:  # the name, in parentheses, may hold anything
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
            own[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total, ahead = 0.0, [pid]
    while ahead:
        one = ahead.pop()
        total += own.get(one, 0.0)
        ahead += parents.get(one, [])
    return total
