"""Flushing the write-ahead log beside the work: a sweep's row is on the disk while its next trial runs.

A transaction in WAL mode waits some 4 ms for the disk. With `synchronous = NORMAL` it does not: what it wrote is with
the system at once, so a killed process loses nothing, and only a power cut could. A thread closes that gap by flushing
the log after each transaction.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pgolf_post.base.storage import FREE_SPACE, flush_to_disk
from pgolf_post.errors import PgolfError


class LaterSync:
    """A thread that flushes one file whenever it is told that more was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._error: OSError | None = None
        self._due, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="ledger flush", daemon=True)
        self._thread.start()

    def due(self) -> None:
        """Have the file flushed soon. Raises PgolfError if an earlier flush failed."""
        self._raise()
        self._due.set()

    def close(self) -> None:
        """Flush what is due and end. Raises PgolfError if a flush failed."""
        self._closing = True
        self._due.set()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:  # else nothing is set: the thread may be about to
            error, self._error = self._error, None
            raise PgolfError(f"{self.path} could not be flushed to the disk: {error}", hint=FREE_SPACE) from error

    def _run(self) -> None:
        closing = False
        while not closing:
            self._due.wait()
            self._due.clear()
            closing = self._closing  # before the flush: what became due during one is flushed once more
            try:
                if self.path.exists():
                    flush_to_disk(self.path)
            except OSError as error:
                self._error = error
