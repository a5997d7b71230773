"""Files that are either there or not: atomic folders and files, and the hashes that name them.

A folder is built under a hidden temporary name beside its destination, flushed to disk, and appears by one rename.
Whatever interrupts the build (an exception, Ctrl-C, a full disk, kill -9) leaves the destination as it was; a killed
process leaves at most a `.tmp-*` folder, which the next build in the same place removes once nobody owns it
(`pgolf_post.base.ownership`). A file is written in such a folder too.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf_post.base.ownership import TEMPORARY_PREFIX, owned_folder, remove_abandoned, temporary_path
from pgolf_post.base.paths import absent
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

if TYPE_CHECKING:
    from torch import Tensor

OLD_PREFIX = ".old-"  # replaced or about to be deleted
PARTIAL_SUFFIX = ".partial"  # what an interrupted stage has done so far
FREE_SPACE = "free disk space (pgolf-post cache list shows derived folders, which can be deleted), then run it again"
WRITABLE = "make the folder writable, or work on a copy of it"
LARGER_FILES = "allow larger files (ulimit -f unlimited), or write to a file system that has them"
ANOTHER_PATH = "name another path for it"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
HINTS = (
    (NO_SPACE, FREE_SPACE),
    ((errno.EFBIG,), LARGER_FILES),
    ((errno.EACCES, errno.EROFS, errno.EPERM), WRITABLE),
)


@contextmanager
def atomic_folder(destination: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `destination`, on any failure it is removed.

    Raises PgolfError if `destination` exists and `replace` is False, or if the disk refuses the bytes.
    """
    if destination.exists() and not replace:
        raise PgolfError(f"{destination} already exists; nothing was written")
    with named_failures(destination), _building(destination) as building, _final_paths(building, destination):
        yield building
        _flush_tree(building)
        if replace:
            _move_into_place(building, destination)
        else:
            _move_where_none_is(building, destination)


def require_new(destination: Path) -> None:
    """Raise PgolfError if a folder could not be written here: it is there already, or its place is not writable.

    For work that is long: it fails before, not at its end.
    """
    if destination.exists():
        raise PgolfError(f"{destination} already exists; nothing was written", hint="give another name")
    require_writable(destination)


def require_writable(destination: Path) -> None:
    """Raise PgolfError unless a folder can be made beside a destination; what had to be made for it is removed."""
    made = [parent for parent in destination.parents if not parent.exists()]
    try:
        with named_failures(destination), _building(destination):
            pass
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _building(destination: Path) -> Iterator[Path]:
    """Yield an owned folder beside a destination, where abandoned ones are removed first."""
    remove_abandoned(destination.parent)
    with owned_folder(destination) as building:
        yield building


@contextmanager
def named_failures(destination: Path) -> Iterator[None]:
    """Turn a refusal of the disk into an error that names the destination, what it needs, and what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not _is_of(error, destination):
            raise  # the caller's input is missing
        if _is_of(error, destination):
            error.filename = str(destination)
        need = _need(destination, getattr(error, "written_bytes", 0)) if error.errno in NO_SPACE else ""
        raise PgolfError(
            f"could not write {destination}: {error}{need}; what was there before is unchanged",
            hint=hint_of(error) or ANOTHER_PATH,
        ) from error


def _is_of(error: OSError, destination: Path) -> bool:
    """Return whether an error is about a temporary path of ours, which a file system like /proc does not make."""
    path = Path(error.filename if isinstance(error.filename, str) else "")
    return path.parent == destination.parent and path.name.startswith(TEMPORARY_PREFIX)


def hint_of(error: OSError) -> str | None:
    """Return what to do about a refusal of the disk; None for any other failure."""
    return next((hint for codes, hint in HINTS if error.errno in codes), None)


def _need(destination: Path, written_bytes: int) -> str:
    """Return what a file or folder needs and what is free for it, as a part of a sentence."""
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    return f" (after {written_bytes:,} bytes; {shutil.disk_usage(parent).free:,} are free there)"


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors says of a disk into the OSError that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(str(error)) from error
        code = int(number[1])
        raise OSError(code, os.strerror(code)) from error


@contextmanager
def _final_paths(temporary: Path, destination: Path) -> Iterator[None]:
    """Let failures name the path that a file was to have, not the temporary one, and carry the bytes written so far."""
    try:
        yield
    except PgolfError as error:
        error.args = (str(error).replace(str(temporary), str(destination)), *error.args[1:])
        error.hint = error.hint and error.hint.replace(str(temporary), str(destination))
        raise
    except OSError as error:
        for name in ("filename", "filename2"):
            if (path := getattr(error, name)) is not None:
                setattr(error, name, os.fsdecode(path).replace(str(temporary), str(destination)))
        files = [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]
        with suppress(OSError):
            error.written_bytes = sum(file.stat().st_size for file in files if file.is_file())  # type: ignore[attr-defined]
        raise


def _move_where_none_is(building: Path, destination: Path) -> None:
    """Rename `building` to `destination`. Raises PgolfError if another process has written it meanwhile."""
    try:
        building.rename(destination)
    except OSError as error:
        if not destination.exists():
            raise
        raise PgolfError(
            f"{destination} was written by another process meanwhile; nothing of it was changed",
            hint="give another name",
        ) from error
    flush_to_disk(destination.parent)


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
    flush_to_disk(destination.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux renameat2 with RENAME_EXCHANGE). Return False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0)


def remove_folder(folder: Path) -> None:
    """Delete a folder that others may look for: rename it away in one step, then delete its files. Raises OSError."""
    aside = temporary_path(folder)
    folder.rename(aside)
    flush_to_disk(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it replaces `destination` in one rename. Raises PgolfError."""
    with named_failures(destination), _building(destination) as building:
        temporary = building / destination.name
        with _final_paths(temporary, destination):
            yield temporary
            flush_to_disk(temporary)
            temporary.replace(destination)
            flush_to_disk(destination.parent)


def atomic_symlink(link: Path, target: Path) -> None:
    """Point `link` at `target` (stored relative to the link's folder), replacing an older link in one rename.

    Raises PgolfError if the disk refuses it.
    """
    with named_failures(link), _building(link) as building, _final_paths(building / link.name, link):
        temporary = building / link.name
        temporary.symlink_to(os.path.relpath(target, link.parent))
        temporary.replace(link)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush_to_disk(path)
    flush_to_disk(folder)


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has a file or a folder's entries. Raises OSError."""
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
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(absent(path)) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5,000 digits, brackets without end
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
