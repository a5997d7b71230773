"""Atomic storage: whatever interrupts a write, what was there stays, and nothing half-written appears."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pgolf_post.base import storage
from pgolf_post.base.ownership import TEMPORARY_PREFIX, kernel_id
from pgolf_post.base.storage import (
    atomic_file,
    atomic_folder,
    atomic_symlink,
    disk_errors,
    named_failures,
    read_json,
    write_json,
)
from pgolf_post.checkpoint import Checkpoint, ViewName, save_checkpoint
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError
from tests import processes

FAILURES = [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


def everything_in(root: Path) -> dict[str, bytes | None]:
    """Relative path → contents (None for a folder), hidden ones included."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def files_in(root: Path) -> dict[str, bytes]:
    return {name: contents for name, contents in everything_in(root).items() if contents is not None}


def temporaries_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def replace_folder(destination: Path) -> AbstractContextManager[Path]:
    return atomic_folder(destination, replace=True)


def fail_in_folder(folder: AbstractContextManager[Path], failure: BaseException) -> None:
    with folder as building:
        (building / "payload").write_bytes(b"half")
        raise failure


def fail_in_file(file: AbstractContextManager[Path], failure: BaseException) -> None:
    with file as temporary:
        temporary.write_bytes(b"half")
        raise failure


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "result"
    folder.mkdir(parents=True)
    (folder / "payload").write_bytes(b"old")
    return folder


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "deep" / "result"
    with atomic_folder(destination) as building:
        (building / "sub").mkdir()
        (building / "sub" / "payload").write_bytes(b"new")
        assert not destination.exists()
        assert building.parent == destination.parent
    assert everything_in(destination.parent) == {"result": None, "result/sub": None, "result/sub/payload": b"new"}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("open_folder", [atomic_folder, replace_folder], ids=["new", "replace"])
def test_a_failure_midway_leaves_the_destination_as_it_was(
    tmp_path: Path, old_folder: Path, open_folder: Callable[[Path], AbstractContextManager[Path]], failure: Exception
) -> None:
    destination = old_folder if open_folder is replace_folder else old_folder.with_name("absent")
    before = everything_in(tmp_path)
    raised = PgolfError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(raised) as caught:
        fail_in_folder(open_folder(destination), failure)
    assert everything_in(tmp_path) == before
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
        assert str(destination) in str(caught.value)
        assert caught.value.hint


def test_an_existing_folder_is_never_replaced_unasked(tmp_path: Path, old_folder: Path) -> None:
    before = everything_in(tmp_path)
    with pytest.raises(PgolfError, match="already exists"), atomic_folder(old_folder):
        pytest.fail("the body must not run")
    assert everything_in(tmp_path) == before


def test_a_folder_that_another_has_written_meanwhile_stays(tmp_path: Path) -> None:
    def write(text: str, meanwhile: Callable[[], None]) -> None:
        with atomic_folder(tmp_path / "new") as folder:
            (folder / "name").write_text(text)
            meanwhile()

    with pytest.raises(PgolfError, match="written by another process meanwhile"):
        write("second", lambda: write("first", lambda: None))
    assert files_in(tmp_path) == {"new/name": b"first"}
    assert not temporaries_in(tmp_path)


@pytest.mark.parametrize("call", ["os.mkdir of the temporary folder", "os.mkdir of a parent"])
def test_a_parent_that_another_process_removes_while_it_is_empty_is_made_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [tmp_path / "stats" / "id", tmp_path / "stats"]
    inner = call == "os.mkdir of a parent"
    make, removed = os.mkdir, []

    def remove_then_make(path: Path, *more: int) -> None:
        if not removed and (
            Path(path) == parents[0] and parents[1].exists() if inner else TEMPORARY_PREFIX in str(path)
        ):
            for parent in parents[1:] if inner else parents:
                parent.rmdir()
                removed.append(parent)
        make(path, *more)

    monkeypatch.setattr(os, "mkdir", remove_then_make)
    with atomic_file(parents[0] / "file") as path:
        path.write_text("new")
    assert removed
    assert (parents[0] / "file").read_text() == "new"


def test_a_file_in_the_place_of_a_parent_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "stats").write_text("mine")
    with pytest.raises(PgolfError, match="could not write"), atomic_file(tmp_path / "stats" / "file"):
        pass
    assert (tmp_path / "stats").read_text() == "mine"


def test_replacing_a_folder_leaves_nothing_of_the_old_one(old_folder: Path) -> None:
    (old_folder / "only-in-old").touch()
    with atomic_folder(old_folder, replace=True) as building:
        (building / "payload").write_bytes(b"new")
    assert everything_in(old_folder.parent) == {"result": None, "result/payload": b"new"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")], ids=["interrupt", "error"])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(
    monkeypatch: pytest.MonkeyPatch, old_folder: Path, failure: BaseException
) -> None:
    monkeypatch.setattr("pgolf_post.base.storage._exchange", lambda *_: False)  # a system that cannot swap two paths
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if target == old_folder and not self.name.startswith(".old"):
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with (
        pytest.raises((PgolfError, KeyboardInterrupt)),
        atomic_folder(old_folder, replace=True) as building,
    ):
        (building / "payload").write_bytes(b"new")
    assert everything_in(old_folder.parent) == {"result": None, "result/payload": b"old"}


def test_of_two_writers_of_one_folder_the_result_is_one_s_and_whole(tmp_path: Path) -> None:
    destination = tmp_path / "result"
    with atomic_folder(destination, replace=True) as slow:
        (slow / "payload").write_bytes(b"slow")
        with atomic_folder(destination, replace=True) as fast:
            (fast / "payload").write_bytes(b"fast")
    assert everything_in(tmp_path) == {"result": None, "result/payload": b"slow"}


# ---- what killed processes leave -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("writer", ["folder", "file"])
def test_abandoned_temporaries_are_removed_and_others_kept(tmp_path: Path, kind: str, writer: str) -> None:
    def leave(name: str) -> None:
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
            (path / "payload").write_bytes(b"half")
        elif kind == "file":
            path.write_bytes(b"half")
        else:
            path.symlink_to("nowhere")

    kept = [".tmp-0123abcd-lock-aa-x", ".tmp-1234-bb-x", ".tmp-notes", "tmp-0-cc-x", f".tmp-{kernel_id()}-none-dd-x"]
    old = [".tmp-0123abcd-lock-ee-x", f".tmp-{kernel_id()}-none-ff-x", ".tmp-1234-a0-x"]
    for name in [*kept, *old, f".tmp-{kernel_id()}-lock-a1-x"]:
        leave(name)
    for path in (each for name in old for each in (tmp_path / name, *(tmp_path / name).rglob("*"))):
        os.utime(path, (0, 0), follow_symlinks=False)
    with atomic_folder(tmp_path / "new") if writer == "folder" else atomic_file(tmp_path / "new") as temporary:
        if writer == "file":
            temporary.write_bytes(b"new")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "new"}


# ---- files, links, JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("existing", [True, False], ids=["replace", "new"])
def test_a_failure_midway_leaves_the_file_as_it_was(tmp_path: Path, failure: Exception, existing: bool) -> None:
    destination = tmp_path / "file"
    if existing:
        destination.write_bytes(b"old")
    before = everything_in(tmp_path)
    raised = PgolfError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(raised):
        fail_in_file(atomic_file(destination), failure)
    assert everything_in(tmp_path) == before


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    destination = tmp_path / "deep" / "file"
    for contents in (b"first", b"second"):
        with atomic_file(destination) as temporary:
            temporary.write_bytes(contents)
    assert everything_in(tmp_path / "deep") == {"file": b"second"}


def test_a_link_is_relative_moves_with_its_folder_and_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("first", "second"):
        (root / "run" / name).mkdir(parents=True)
        atomic_symlink(root / "latest", root / "run" / name)
    moved = root.rename(tmp_path / "moved")
    assert (moved / "latest").resolve() == moved / "run" / "second"
    assert sorted(path.name for path in moved.iterdir()) == ["latest", "run"]


def test_a_link_that_cannot_be_replaced_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    before = everything_in(tmp_path)
    with pytest.raises(PgolfError, match=r"could not write .*/latest: .*directory"):
        atomic_symlink(tmp_path / "latest", tmp_path / "run")
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("contents", [b"", b"{", b'{"a": 1', b"[1]", b"null", b"\xff\xfe{}"])
def test_json_that_is_not_an_object_is_named_as_damaged(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(contents)
    with pytest.raises(DamagedFileError, match=r"meta\.json"):
        read_json(path)


def test_json_comes_back_as_written_and_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    value = {"z": 1, "a": [0.1, None, "λ"]}
    write_json(path, value)
    assert list(read_json(path).items()) == list(value.items())
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"bpb": float("nan")})
    with pytest.raises(NotFoundError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")


# ---- real processes that are stopped ---------------------------------------------------------------------------------

SAVER = """
import os, sys
from pathlib import Path
from pgolf_post.checkpoint import Checkpoint, save_checkpoint

source, out, name = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
views = {name: source.load(name).tensors for name in ("raw", "ema")}
meta = {key: source.meta[key] for key in ("kind", "phase", "step", "parents")}
try:
    for number in range(1_000_000):
        save_checkpoint(out / f"saved_{name}_{number:06d}", source.config, views, meta)
        if number == 0:
            print("saved", flush=True)
except KeyboardInterrupt:
    os._exit(130)
finally:
    os._exit(1)
"""


def stop_savers(source: Checkpoint, out: Path, stop: signal.Signals, times: int) -> list[int]:
    """Start `times` processes that save checkpoints without pause, stop each at a random moment: their exit codes."""
    moments = random.Random(int(stop))
    codes = []
    for number in range(times):
        words = ["-c", SAVER, str(source.path), str(out), str(number)]
        with processes.Process(words, stdout=subprocess.PIPE) as saver:
            assert saver.stdout
            assert saver.stdout.readline() == "saved\n"
            time.sleep(moments.uniform(0.0, 0.25))
            os.kill(saver.pid, stop)
            codes.append(saver.wait())
    return codes


def check_stopped_savers(source: Checkpoint, stop: signal.Signals, code: int, times: int) -> None:
    run = source.path.parent
    ids: dict[ViewName, str] = {name: source.view_id(name) for name in ("raw", "ema")}
    older = files_in(run)  # the run's own checkpoints
    assert stop_savers(source, run, stop, times) == [code] * times
    saved = [path for path in run.iterdir() if path.name.startswith("saved_")]
    assert len(saved) >= times
    for folder in saved:  # a folder under a real name is a complete checkpoint
        assert {name: Checkpoint.open(folder).load(name).id for name in ids} == ids
    assert older.items() <= files_in(run).items()
    meta = {key: source.meta[key] for key in ("kind", "phase", "step", "parents")}
    save_checkpoint(run / "saved_next", source.config, {"raw": source.load("raw").tensors}, meta)
    assert temporaries_in(run) == []


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_process_stopped_while_saving_leaves_only_complete_checkpoints(
    pico_checkpoint: Checkpoint, stop: signal.Signals, code: int
) -> None:
    check_stopped_savers(pico_checkpoint, stop, code, times=3)


@pytest.mark.long
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_thirty_processes_stopped_while_saving_leave_only_complete_checkpoints(
    pico_checkpoint: Checkpoint, stop: signal.Signals, code: int
) -> None:
    check_stopped_savers(pico_checkpoint, stop, code, times=30)


KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from pgolf_post.checkpoint import Checkpoint, save_checkpoint

source, out = Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2])
views = {name: source.load(name).tensors for name in ("raw", "ema")}
meta = {key: source.meta[key] for key in ("kind", "phase", "step", "parents")}

def save_and_die(last):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    save_checkpoint(out / f"killed_{last:03d}", source.config, views, meta)
    os._exit(0)

for last in range(1, 1000):
    child = os.fork()
    if child == 0:
        save_and_die(last)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder = out / f"killed_{last:03d}"
    print(code, folder.is_dir(), (folder / "meta.json").is_file(), flush=True)
    if code == 0:
        break
"""


def test_a_process_killed_at_any_of_its_file_operations_leaves_a_complete_checkpoint_or_none(
    pico_checkpoint: Checkpoint,
) -> None:
    run = pico_checkpoint.path.parent
    older = files_in(run)
    done = processes.run(["-c", KILLED_AT_EVERY_STEP, str(pico_checkpoint.path), str(run)])
    done.check_returncode()
    steps = [line.split() for line in done.stdout.splitlines()]
    assert {code for code, _, _ in steps[:-1]} == {str(-signal.SIGKILL)}
    assert steps[-1] == ["0", "True", "True"]
    assert len(steps) > 10
    for number, (_, is_there, has_meta) in enumerate(steps, start=1):
        assert is_there == has_meta
        if is_there == "True":
            saved = Checkpoint.open(run / f"killed_{number:03d}")
            assert saved.load("raw").id == pico_checkpoint.view_id("raw")
            assert saved.load("ema").id == pico_checkpoint.view_id("ema")
    assert older.items() <= files_in(run).items()
    assert temporaries_in(run) == []  # the last save removed what the killed ones left


REPLACE_KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from pgolf_post.base.storage import atomic_folder

destination = Path(sys.argv[1])

def replace_and_die(last):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym"):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    with atomic_folder(destination, replace=True) as building:
        for name in ("a", "b", "c"):
            (building / name).write_text(str(last))
    os._exit(0)

for last in range(1, 1000):
    child = os.fork()
    if child == 0:
        replace_and_die(last)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    held = [(destination / name).read_text() if (destination / name).is_file() else "gone" for name in ("a", "b", "c")]
    print(code, *held, flush=True)
    if code == 0:
        break
"""


def test_a_process_killed_while_replacing_a_folder_leaves_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    destination = tmp_path / "data"
    destination.mkdir()
    for name in ("a", "b", "c"):
        (destination / name).write_text("old")
    done = processes.run(["-c", REPLACE_KILLED_AT_EVERY_STEP, str(destination)])
    done.check_returncode()
    steps = [line.split() for line in done.stdout.splitlines()]
    assert len(steps) > 10
    assert all(len(set(held)) == 1 and "gone" not in held for _, *held in steps)
    assert steps[0][1] == "old"
    assert steps[-1][1] == str(len(steps))


# ---- disks that run out of space -----------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_what_was_written_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "flush_to_disk", full)
    for write in (lambda: fill_folder(tmp_path / "new" / "result"), lambda: fill_file(tmp_path / "new" / "file")):
        with pytest.raises(
            PgolfError, match=r"could not write .*/new/.*No space left.*after 3,000 bytes; [\d,]+ are"
        ) as e:
            write()
        assert e.value.hint == storage.FREE_SPACE
    assert files_in(tmp_path) == {}


def fill_folder(path: Path) -> None:
    with atomic_folder(path) as building:
        (building / "a").write_bytes(bytes(1000))
        (building / "b").write_bytes(bytes(2000))


def fill_file(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(bytes(3000))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.ENOTDIR])
def test_what_safetensors_says_of_a_disk_is_the_systems_error(number: int, tmp_path: Path) -> None:
    with pytest.raises(PgolfError) as caught, named_failures(tmp_path / "x"), disk_errors():
        raise SafetensorError(f"Error while serializing: I/O error: some words (os error {number})")
    assert os.strerror(number) in str(caught.value)
    assert (
        caught.value.hint
        == {
            errno.ENOSPC: storage.FREE_SPACE,
            errno.EFBIG: storage.LARGER_FILES,
            errno.EROFS: storage.WRITABLE,
            errno.ENOTDIR: storage.ANOTHER_PATH,
        }[number]
    )
