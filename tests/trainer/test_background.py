"""Laws of the writer: order, bound, no error lost, nothing handed over forgotten."""

from __future__ import annotations

import threading
import time

import pytest

from pgolf_post.errors import PgolfError
from trainer.run.background import BackgroundWriter, WriterJob


def failing() -> None:
    raise PgolfError("the disk is full")


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_jobs_are_done_in_their_order_before_the_context_is_left(limit: int) -> None:
    done: list[int] = []
    with BackgroundWriter(limit) as writer:
        for number in range(20):
            writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == list(range(20))


def test_no_more_jobs_are_open_than_the_limit() -> None:
    open_now, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal open_now
        with lock:
            open_now -= 1

    with BackgroundWriter(2) as writer:
        for _ in range(50):
            writer.make_room()
            with lock:
                open_now += 1  # as a caller that fills memory once there is room
                most = max(most, open_now)
            writer.submit(job)
    assert most <= 2


def test_training_goes_on_while_a_job_runs_and_waits_when_there_is_no_room(capsys: pytest.CaptureFixture[str]) -> None:
    gate = threading.Event()
    with BackgroundWriter(2) as writer:
        writer.submit(gate.wait)
        assert writer.submit(gate.wait) < 60  # came back with both jobs open
        opener = threading.Timer(1.3, gate.set)
        opener.start()
        assert writer.make_room() > 1
    assert "training waits for the disk: 2 writes are open" in capsys.readouterr().err


@pytest.mark.parametrize("look", ["check", "make_room", "drain"])
def test_an_error_is_raised_where_training_next_looks_and_nothing_is_begun_after_it(look: str) -> None:
    done: list[int] = []
    writer = BackgroundWriter(8)
    writer.submit(failing)
    writer._open[0].exception()  # until it has failed
    writer._open.append(writer._thread.submit(writer._do, lambda: done.append(1)))
    with pytest.raises(PgolfError, match="disk is full"):
        getattr(writer, look)()
    writer.drain()
    assert done == []


def fail_with(error: BaseException, writer: BackgroundWriter, *jobs: WriterJob) -> None:
    """Training that hands over jobs and then fails."""
    with writer:
        for job in jobs:
            writer.submit(job)
        raise error


def test_an_error_of_the_last_job_is_raised_at_the_end() -> None:
    with pytest.raises(PgolfError, match="disk is full"), BackgroundWriter(1) as writer:
        writer.submit(failing)


def test_what_was_handed_over_is_finished_when_training_fails_and_its_error_does_not_hide_training_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail_with(ZeroDivisionError(), BackgroundWriter(4), lambda: time.sleep(0.1), lambda: done.append(1), failing)
    assert done == [1]
    assert "and a checkpoint could not be written: the disk is full" in capsys.readouterr().err


def test_a_second_interrupt_leaves_what_was_not_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    begun, gate, writer = threading.Event(), threading.Event(), BackgroundWriter(4)

    def slow() -> None:
        begun.set()
        gate.wait()
        done.append("slow")

    def interrupted(*_: object, **__: object) -> None:
        begun.wait()
        raise KeyboardInterrupt  # Ctrl-C while the first is being written

    monkeypatch.setattr("trainer.run.background.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fail_with(KeyboardInterrupt(), writer, slow, lambda: done.append("second"), lambda: done.append("third"))
    gate.set()
    writer._thread.shutdown(wait=True)
    assert done == ["slow"]
    assert "finishing 3 writes; Ctrl-C again leaves those not begun" in capsys.readouterr().err
