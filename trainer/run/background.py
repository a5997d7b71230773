"""Work that training hands over and does not wait for: one thread, jobs in their order, a bound on how many are open.

Order is a promise to the jobs: what was handed over earlier is done, or has failed, before a later one begins, and
after a failure nothing more is begun. An error is raised where training next looks (`check`, `make_room`, the end), so
none is lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from pgolf_post.base.progress import say

SAY_AFTER_SECONDS = 1.0
WriterJob = Callable[[], object]


@dataclass
class Waits:
    """Seconds, by reason, for which training stood still off its clock; a resumed run counts on."""

    scoring_seconds: float = 0.0
    snapshot_seconds: float = 0.0  # copying to host memory
    waited_seconds: float = 0.0  # for the writer, which had too much open

    @contextmanager
    def scoring(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.scoring_seconds += time.perf_counter() - started

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.snapshot_seconds += time.perf_counter() - started

    def record(self) -> dict[str, float]:
        """Return the seconds as meta.json and train.jsonl have them."""
        return {key: round(seconds, 3) for key, seconds in vars(self).items()}

    def __str__(self) -> str:
        copying = self.snapshot_seconds + self.waited_seconds
        return f"{self.scoring_seconds:.1f} s for scoring, {copying:.2f} s for saving"


class BackgroundWriter:
    """A context manager: jobs handed over inside it are done when it is left, however it is left.

    With `limit` 0 there is no thread, and `submit` does the job itself.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # jobs that may be open at once: what bounds the memory they hold
        self._open: deque[Future[None]] = deque()
        self._failed = threading.Event()
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer")  # starts with the first job

    def make_room(self) -> float:
        """Wait until one more job may be open, and say so. Return the seconds waited. Raises what a job raised."""
        started = time.perf_counter()
        self.check()
        if self.limit and len(self._open) >= self.limit:
            if not wait([self._open[0]], timeout=SAY_AFTER_SECONDS).done:
                say(f"training waits for the disk: {len(self._open)} writes are open (checkpoint.max_in_flight)")
            self._collect_until(self.limit - 1)
        return time.perf_counter() - started

    def submit(self, job: WriterJob) -> float:
        """Hand over a job. Return the seconds that its caller waited. Raises what an earlier job raised."""
        waited = self.make_room()
        if self.limit:
            self._open.append(self._thread.submit(self._do, job))
            return waited
        started = time.perf_counter()
        job()
        return waited + time.perf_counter() - started

    def check(self) -> None:
        """Raise the error of a finished job, if one failed."""
        while self._open and self._open[0].done():
            self._open.popleft().result()

    def drain(self) -> None:
        """Wait for every open job. Raises what one of them raised."""
        self._collect_until(0)

    def _do(self, job: WriterJob) -> None:
        if self._failed.is_set():
            return
        try:
            job()
        except BaseException:
            self._failed.set()
            raise

    def _collect_until(self, num_open: int) -> None:
        while len(self._open) > num_open:
            wait([self._open[0]])  # Ctrl-C ends the waiting and leaves the job where it is
            self._open.popleft().result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.drain()
            else:
                self._finish_after_failure()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)  # the interpreter waits for the job that runs

    def _finish_after_failure(self) -> None:
        """Finish what is open without hiding the error that ended training."""
        if self._open and not self._failed.is_set():
            say(f"finishing {len(self._open)} writes; Ctrl-C again leaves those not begun")
        try:
            self.drain()
        except KeyboardInterrupt:
            say("left; the write that had begun is finished")
        except Exception as error:
            say(f"and a checkpoint could not be written: {error}")
