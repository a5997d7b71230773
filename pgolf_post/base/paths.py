"""Paths as people give them: what is said of one that is no file which can be read, and which names make a folder.

"No such file" sends people to look for a typing error. Often something is there: a link to a disk that is not mounted,
a folder, the pipe of a shell's `<(…)`. A name that becomes a folder's stays where it was meant: `../up`, or what is
left of a file called `...pt`, would leave the root, and what begins with a dot is not listed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pgolf_post.errors import NotFoundError, SettingsError

FOLDER_NAME = re.compile(r"[^/\\\0-\x1f.-][^/\\\0-\x1f]*")

LONGEST_NAME = 200  # bytes: file systems take 255, and temporary names are longer than the final ones


def require_folder_name(name: str, option: str = "--name") -> str:
    """Return a name that can be a folder's.

    Raises SettingsError for several parts, a leading dot or dash, controls, and more bytes than a file system takes.
    """
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise SettingsError(
            f"{option} {name[:20]}… has {len(os.fsencode(name))} bytes; a folder's name has at most {LONGEST_NAME}",
            hint=f"give a shorter one: {option} NAME",
        )
    if not FOLDER_NAME.fullmatch(name):
        raise SettingsError(
            f"{option} {name!r} cannot name a folder: one part without / and \\ is wanted, which begins with no dot or "
            "dash",
            hint=f"give another one: {option} NAME",
        )
    return name


def absent(path: Path, what: str = "file") -> str:
    """Return why a path is no regular file, as a message; `what` names the file that was expected."""
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {path.readlink()}, which is not there"
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if path.exists():
        return f"{path} is a pipe or a device, not a file; copy what it holds to a file first"
    return f"no such {what}: {path}"


def require_another(out: Path, source: Path) -> None:
    """Raise SettingsError if what a command writes would replace the file that it reads."""
    if out.exists() and source.exists() and out.samefile(source):
        raise SettingsError(
            f"--out {out} is the file that is read: it would be replaced", hint="give --out another name"
        )


def followed(path: Path) -> Path:
    """Return where a link leads, any other path as it is. Raises NotFoundError for a link to nothing or to itself."""
    if not path.is_symlink():
        return path
    if not path.exists():
        raise NotFoundError(absent(path), hint=f"remove the link, or name what it should lead to: rm {path}")
    return path.resolve()
