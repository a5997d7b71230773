"""Standard output and error that outlive their reader: `| head` ends the reading, not the work.

When the other end of a pipe closes or a terminal is gone, what would be written there is dropped and the command goes
on: its results are files. So it is where a stream was closed before the start (`>&-`, as some schedulers do). Any other
failure of a stream (a full disk) stays an error.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # a pipe without reader, a terminal that hung up


class PatientFile(io.FileIO):
    """A file descriptor whose writes are dropped once nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes


@contextmanager
def patient_streams() -> Iterator[None]:
    """Drop what is written to standard output and error in this block after their reader has gone."""
    usual = sys.stdout, sys.stderr
    _fill_closed_descriptors()
    sys.stdout, sys.stderr = _patient(sys.stdout, 1), _patient(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = usual


def _fill_closed_descriptors() -> None:
    """Open what stands in for closed standard streams: else a file of results would get their descriptors."""
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _patient(stream: Any, descriptor: int) -> Any:
    """Return a stream that writes where `stream` does; `stream` itself if it is not the process's own.

    Without a stream, what is written is dropped.
    """
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    try:
        if stream.fileno() != descriptor:
            return stream
    except (AttributeError, OSError, ValueError):
        return stream
    stream.flush()
    buffer = io.BufferedWriter(PatientFile(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
