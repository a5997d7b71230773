"""Files that are either there or not: atomic folders and files, and the hashes that name them.

A folder is built under a hidden temporary name beside its destination, flushed to disk, and appears by one rename.
Whatever interrupts the build (an exception, Ctrl-C, a full disk, kill -9) leaves the destination as it was; a killed
process leaves at most a `.tmp-*` folder, which the next build in the same place removes once its owner is gone.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_PREFIX = ".tmp-"  # being written; the process id follows
OLD_PREFIX = ".old-"  # replaced or about to be deleted
PARTIAL_SUFFIX = ".partial"  # what an interrupted stage has done so far
FREE_SPACE = "free disk space (pgolf-post cache list shows derived folders, which can be deleted), then run it again"


@contextmanager
def atomic_folder(destination: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `destination`, on any failure it is removed.

    Raises PgolfError if `destination` exists and `replace` is False, or if the disk refuses the bytes.
    """
    if destination.exists() and not replace:
        raise PgolfError(f"{destination} already exists; nothing was written")
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(destination.parent)
    building = destination.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{destination.name}"
    building.mkdir()
    try:
        yield building
        _flush_tree(building)
        _move_into_place(building, destination)
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # the caller's input is missing; nothing of ours can be
            raise
        raise PgolfError(
            f"could not write {destination}: {error}; what was there before is unchanged", hint=FREE_SPACE
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _move_into_place(building: Path, destination: Path) -> None:
    """Rename `building` to `destination`. An older folder is swapped with it in one step where the system can."""
    if not destination.exists():
        building.rename(destination)
    elif not _exchange(building, destination):
        aside = destination.with_name(f"{OLD_PREFIX}{secrets.token_hex(4)}-{destination.name}")  # never removed unasked
        destination.rename(aside)
        try:
            building.rename(destination)
        except BaseException:
            if not destination.exists():
                aside.rename(destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(destination.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux renameat2 with RENAME_EXCHANGE). Return False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def remove_abandoned(parent: Path) -> None:
    """Delete temporary folders, files and links in `parent` whose process no longer runs."""
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        owner = leftover.name.removeprefix(TEMPORARY_PREFIX).split("-", 1)[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder that others may look for: rename it away in one step, then delete its files. Raises OSError."""
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{folder.name}")
    folder.rename(aside)
    _fsync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `destination` in one rename. Raises PgolfError."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(destination.parent)
    temporary = destination.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{destination.name}")
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(destination)
        _fsync(destination.parent)
    except OSError as error:
        raise PgolfError(
            f"could not write {destination}: {error}; what was there before is unchanged", hint=FREE_SPACE
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_symlink(link: Path, target: Path) -> None:
    """Point `link` at `target` (stored relative to the link's folder), replacing an older link in one rename."""
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{link.name}")
    try:
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON (two-space indent, keys in the given order)."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises NotFoundError or DamagedFileError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex sha256 over names, dtypes, shapes and bytes, in name order: independent of file layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        update_digest(digest, name, tensors[name])
    return digest.hexdigest()


def update_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Add one tensor to the digest of `tensors_sha256`; feed them in name order."""
    import torch  # here, so that reading and writing files need not wait for it

    tensor = tensor.detach().cpu().contiguous()
    digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
    if tensor.numel():
        flat = tensor.as_strided((tensor.numel(),), (1,))  # a tensor of one element is contiguous with any stride
        digest.update(flat.view(torch.uint8).numpy().data)
