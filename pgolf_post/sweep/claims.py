"""Who works on what, where several processes take from one list: locks that the system lets go of when a process dies.

A claim is an exclusive lock on a small file. Whoever is killed, by whatever, loses its claims at once, and the work is
free for the next; nothing has to be cleaned up, and the files left behind mean nothing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(folder: Path, name: str, wait: bool = False) -> Iterator[bool]:
    """Yield whether this process has the claim, for as long as the block lasts. With `wait` it always has, in time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
