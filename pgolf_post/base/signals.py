"""Requests to stop: Ctrl-C (SIGINT), SIGTERM (a spot machine that is taken back) and SIGHUP (a terminal that closed).

All three raise KeyboardInterrupt in the main thread, keep what can be resumed, and end the process with 128 plus their
number. An interrupt can arrive anywhere, also where Python drops exceptions (a finalizer) or where a library turns them
into its own; so the first signal is remembered, one that was dropped is sent again, and whatever error follows it, the
process was interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from pgolf_post.base.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESEND_SECONDS = 0.05

_received: list[int] = []  # numbers of the signals that asked this process to stop, the first one first


def exit_code_of_signal() -> int | None:
    """Return 128 plus the number of the first signal that asked to stop; None if none did."""
    return 128 + _received[0] if _received else None


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Raise KeyboardInterrupt for a signal, and remember it."""
    _received.append(number)
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], numbers: Sequence[int]) -> Iterator[None]:
    """Handle signals in this block. One that is ignored (nohup, a shell's background job) stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # which alone may choose what a signal does
        yield
        return
    usual = {number: signal.getsignal(number) for number in numbers}
    handled = {number: before for number, before in usual.items() if before not in (signal.SIG_IGN, None)}
    try:
        for number in handled:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in handled.items():
            signal.signal(number, before)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let each of the three signals raise KeyboardInterrupt in this block."""
    _received.clear()
    usual, timers = sys.unraisablehook, list[threading.Timer]()

    def resend(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt and _received:  # dropped, in a finalizer for example
            timers.append(threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), _received[0])))
            timers[-1].start()
        else:
            usual(unraisable)

    sys.unraisablehook = resend
    try:
        with _handled(interrupt, SIGNALS):
            yield
    finally:
        sys.unraisablehook = usual
        for timer in timers:  # what was to be interrupted is over
            timer.cancel()


@contextmanager
def stop_requests(message: str, one_request_seconds: float = 0.0) -> Iterator[Sequence[int]]:
    """Yield a list that fills on the first signal, which prints the message; the next one raises KeyboardInterrupt.

    Signals within `one_request_seconds` of the first are the same request: torchrun passes on what a terminal has
    already sent to all of its processes.
    """
    asked: list[int] = []
    first = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not asked:
            first = time.monotonic()
            asked.append(number)
            _received.append(number)
            with suppress(RuntimeError):  # the signal came amid another line
                say(f"{signal.Signals(number).name}: {message}")
        elif time.monotonic() - first > one_request_seconds:
            interrupt(number, frame)

    with _handled(ask, SIGNALS):
        yield asked
