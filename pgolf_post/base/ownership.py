"""Who owns a temporary folder: the lock that its maker holds, or its age where locks cannot tell.

Several machines and containers may write to one volume, and process ids mean nothing across them. The maker of a
temporary folder holds an exclusive lock (flock) on it for as long as it works there; the system releases the lock when
the process ends, however it ends. The name records the kernel it runs on (its boot id, or the host's name) and whether
the file system has locks. A folder is abandoned

    when nobody holds its lock                      and it was made under this kernel, with a lock
    when nobody holds its lock, nothing in it       and it was made elsewhere (the volume may not pass locks on), or
    was written for ABANDONED_SECONDS               without a lock, or under a name of an older version
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"  # being written; `KERNEL-lock` or `KERNEL-none`, a random part and the final name follow
ABANDONED_SECONDS = 24 * 3600.0
MAKE_ATTEMPTS = 100  # to make a folder while others remove the empty ones above it
LOCKED, UNLOCKED = "lock", "none"
NAME = re.compile(r"\.tmp-(?:(?P<kernel>[0-9a-f]{8})-(?P<kind>lock|none)|[0-9]+)-[0-9a-f]+-")  # or an older process id
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def kernel_id() -> str:
    """Return eight hex digits that name the running kernel: the same in all of its containers, new at every boot."""
    try:
        name = BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def temporary_path(destination: Path, kind: str = LOCKED) -> Path:
    """Return a new hidden name beside a destination."""
    return destination.with_name(f"{TEMPORARY_PREFIX}{kernel_id()}-{kind}-{secrets.token_hex(4)}-{destination.name}")


@contextmanager
def owned_folder(destination: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside a destination, owned while the block lasts, then removed if still there.

    Folders above it that are missing are made.
    """
    building, descriptor = _make_owned(destination)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)
        os.close(descriptor)


def _make_owned(destination: Path) -> tuple[Path, int]:
    """Make and lock a folder; under another name if a stranger took it for abandoned before it was locked."""
    while True:
        building = temporary_path(destination)
        _make_with_parents(building)
        try:
            descriptor = os.open(building, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if building.exists():
                return building, descriptor
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            unlocked = temporary_path(destination, UNLOCKED)
            building.rename(unlocked)
            return unlocked, descriptor
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _make_with_parents(folder: Path) -> None:
    """Make a new folder and those above it, again where another process removes an empty one of them in between."""
    for attempt in range(1, MAKE_ATTEMPTS + 1):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except (FileNotFoundError, FileExistsError):  # a file may stand in the way, or /proc refuse all folders
            if attempt == MAKE_ATTEMPTS:
                raise
        else:
            return


def is_abandoned(path: Path) -> bool:
    """Return whether nobody works in a temporary folder (or file, or link) any more."""
    name = NAME.match(path.name)
    if name is None or _is_locked(path):
        return False
    return (name["kernel"] == kernel_id() and name["kind"] == LOCKED) or _idle_seconds(path) > ABANDONED_SECONDS


def remove_abandoned(parent: Path) -> None:
    """Delete abandoned temporary folders, files and links in a folder."""
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):  # another process removes it too, or this one may not
            if is_abandoned(leftover):
                delete(leftover)


def delete(path: Path) -> None:
    """Delete a folder with all that is in it, or a file, or a link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock; True also where this one may not look."""
    if path.is_symlink() or not path.exists():
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: age decides
        return False
    finally:
        os.close(descriptor)
    return False


def _idle_seconds(path: Path) -> float:
    """Return the seconds since anything in a path was written, by the clock of its file system."""
    newest = max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
    return _file_system_now(path.parent) - newest


def _file_system_now(folder: Path) -> float:
    """Return the time that the file system gives to a file written now: hosts that share it may disagree on theirs."""
    probe = temporary_path(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a folder that this process may not write to
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()
