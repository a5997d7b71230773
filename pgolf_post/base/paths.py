"""Paths that are no file which can be read: what is said about them.

"No such file" sends people to look for a typing error. Often something is there: a link to a disk that is not mounted,
a folder, the pipe of a shell's `<(…)`.
"""

from __future__ import annotations

from pathlib import Path


def absent(path: Path, what: str = "file") -> str:
    """Return why a path is no regular file, as a message; `what` names the file that was expected."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which is not there"
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if path.exists():
        return f"{path} is a pipe or a device, not a file; copy what it holds to a file first"
    return f"no such {what}: {path}"
