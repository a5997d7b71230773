"""Claims on work, where several processes take from one list: locks that the system releases when a process dies.

A claim is an exclusive lock on a small file. Whoever is killed, by whatever, loses its claims at once, and the work is
free for the next; nothing has to be cleaned up, and the files left behind mean nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(folder: Path, name: str, wait: bool = False, inherit: bool = False) -> Iterator[bool]:
    """Yield whether this process has the claim, for as long as the block lasts. With `wait` it always has, in time.

    With `inherit`, processes started with close_fds=False hold it too: it ends when the last of them does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        os.set_inheritable(file.fileno(), inherit)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
