"""Waiting for the ledger's lock: aloud, for a stated time, and by the name of the process that holds it.

SQLite waits in silence and does not know for whom. A writer that is stopped (Ctrl-Z, a debugger, an open shell of
`sqlite3`) holds its lock for hours. Linux lists the locks of files with their processes; elsewhere, and for a process
of another machine or container, nobody can be named.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pgolf_post.base.progress import say

Result = TypeVar("Result")
BUSY_SECONDS = 60.0  # a writer waits so long for the others
QUIET_SECONDS = 1.0  # and so long without saying so
RETRY_SECONDS = 0.02
LOCKS = Path("/proc/locks")
BESIDE = ("", "-shm", "-wal")  # the database itself; in WAL mode, locks are of the index file


def patiently(path: Path, action: Callable[[], Result]) -> Result:
    """Return what `action` returns once the ledger at `path` is free; said aloud if that takes long.

    Raises the `sqlite3.OperationalError` of the last attempt after BUSY_SECONDS, and any other one at once.
    """
    started, said = time.monotonic(), False
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            waited = time.monotonic() - started
            if "locked" not in str(error) or waited > BUSY_SECONDS:
                raise
        if waited >= QUIET_SECONDS and not said:
            say(f"waiting up to {BUSY_SECONDS:.0f} s for the ledger {path}: {writers(path)} writes to it")
            said = True
        time.sleep(RETRY_SECONDS)


def writers(path: Path) -> str:
    """Return the processes that hold a lock on a ledger, in words."""
    others = [f"process {pid}{_command(pid)}" for pid in lock_holders(path) if pid != os.getpid()]
    return " and ".join(others) or "another process"


def lock_holders(path: Path) -> list[int]:
    """Return the ids of processes that hold a write lock on a ledger's files; empty where that is not known."""
    files = set()
    for suffix in BESIDE:
        try:
            stat = Path(f"{path}{suffix}").stat()
        except OSError:
            continue
        files.add(f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}")
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return []
    held = [words for line in lines if len(words := line.split()) >= 8 and words[1] != "->"]
    return sorted({int(words[4]) for words in held if words[3] == "WRITE" and words[5] in files and int(words[4]) > 0})


def _command(pid: int) -> str:
    """Return what a process was started as, in brackets; nothing if that cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return ""
    line = " ".join(words)
    return f" ({line[:80]})" if line else ""
