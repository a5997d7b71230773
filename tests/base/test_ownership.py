"""Temporary folders on a volume that several processes, containers and machines write to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgolf_post.base import ownership
from pgolf_post.base.ownership import ABANDONED_SECONDS, TEMPORARY_PREFIX, is_abandoned, kernel_id, remove_abandoned
from pgolf_post.base.storage import atomic_file, atomic_folder, require_new, require_writable
from pgolf_post.errors import PgolfError

WRITER = """
import sys
from pathlib import Path
from pgolf_post.base.storage import atomic_folder
with atomic_folder(Path(sys.argv[1])) as building:
    (building / "payload").write_text("work of an hour")
    print(building, flush=True)
    sys.stdin.readline()
    (building / "more").write_text("the end of it")
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]


def has_namespaces() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0


@contextmanager
def writer(destination: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is at work in a temporary folder until it is sent a line."""
    command = [*prefix, sys.executable, "-c", WRITER, str(destination)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate("\n")
    return process.returncode


def write_beside(destination: Path) -> None:
    with atomic_file(destination.with_name("other")) as temporary:
        temporary.write_text("other")


def age(path: Path, seconds: float) -> None:
    """Let a path look as if it was last written this long ago."""
    for each in (path, *path.rglob("*")):
        stamp = each.lstat().st_mtime - seconds
        os.utime(each, (stamp, stamp), follow_symlinks=False)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process believe that it runs under another kernel than the processes it starts."""
    monkeypatch.setattr(ownership, "kernel_id", lambda: "0123abcd")


@pytest.mark.parametrize("prefix", [[], NAMESPACE], ids=["same", "another_pid_namespace"])
def test_a_stranger_leaves_running_work_alone_whatever_its_process_id(tmp_path: Path, prefix: list[str]) -> None:
    if prefix and not has_namespaces():
        pytest.skip("this system lets nobody make a process id namespace")
    with writer(tmp_path / "result", prefix) as (process, building):
        age(building, 10 * ABANDONED_SECONDS)
        write_beside(tmp_path / "result")
        assert (building / "payload").is_file()
        assert finish(process) == 0
    assert sorted(path.name for path in (tmp_path / "result").iterdir()) == ["more", "payload"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "result"]


def test_what_a_killed_process_leaves_is_removed_by_the_next_at_once(tmp_path: Path) -> None:
    with writer(tmp_path / "result") as (process, building):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert building.is_dir()
        write_beside(tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.usefixtures("elsewhere")
def test_a_folder_of_another_machine_goes_when_it_is_unlocked_and_old(tmp_path: Path) -> None:
    with writer(tmp_path / "result") as (process, building):
        age(building, 2 * ABANDONED_SECONDS)
        assert not is_abandoned(building)  # its lock is seen
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert is_abandoned(building)
        (building / "payload").write_text("again")  # a volume that hides locks: work goes on there
        assert not is_abandoned(building)
        age(building, ABANDONED_SECONDS + 60)
        write_beside(tmp_path / "result")
        assert not building.exists()


def test_where_there_are_no_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with atomic_folder(tmp_path / "result") as building:
        write_beside(tmp_path / "result")
        (building / "payload").touch()
        write_beside(tmp_path / "result")
        assert (building / "payload").is_file()
    left = tmp_path / f"{TEMPORARY_PREFIX}{kernel_id()}-none-00aa-x"
    (left / "deep").mkdir(parents=True)
    age(left, ABANDONED_SECONDS + 60)
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "result"]


def test_a_folder_taken_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    flock, taken = fcntl.flock, []

    def take_first(descriptor: int, operation: int) -> None:
        if not taken:
            (folder,) = tmp_path.glob(f"{TEMPORARY_PREFIX}*")
            taken.append(folder)
            folder.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", take_first)
    with atomic_folder(tmp_path / "result") as building:
        assert building not in taken
        (building / "payload").touch()
    assert (tmp_path / "result" / "payload").is_file()


def test_failures_name_the_final_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PgolfError, match="could not write") as caught, atomic_folder(tmp_path / "result") as building:
        building.mkdir()
    assert TEMPORARY_PREFIX not in str(caught.value)
    with pytest.raises(PgolfError, match=r"could not write /proc/result: .*'/proc/result'"):  # no folder is made there
        require_new(Path("/proc/result"))
    with pytest.raises(PgolfError) as caught, atomic_file(tmp_path / "file") as temporary:
        raise PgolfError(f"{temporary} is wrong", hint=f"see {temporary}")
    assert (str(caught.value), caught.value.hint) == (f"{tmp_path / 'file'} is wrong", f"see {tmp_path / 'file'}")


def test_a_place_that_cannot_be_written_is_found_out_before_the_work_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PgolfError, match="could not write"):
        require_writable(tmp_path / "file" / "stats" / "id")
    require_writable(tmp_path / "derived" / "stats" / "id")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(PgolfError, match="already exists"):
        require_new(tmp_path / "file")
