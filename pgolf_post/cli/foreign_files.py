"""Kinds of files that are handed over where an artifact of ours is asked for, and the command that takes each.

Our decoder can only say that the first bytes are not its own. Somebody who passes the artifact of a public script, a
state dict or a half-finished download is told which of these it is.
"""

from __future__ import annotations

from pathlib import Path

from pgolf_post.base.file_kinds import UNKNOWN, FileKind, file_kind, first_bytes
from pgolf_post.errors import MismatchError

OURS = "ours"
STREAMS = ("artifact", "gzip", "bzip2", "xz", "lzma", "zstd", "lrzip", "lz4", UNKNOWN.name)
REPACK = "if a public script wrote it: pgolf-post repack {path}"
HINTS = {**dict.fromkeys(STREAMS, REPACK), "text": "name a checkpoint folder, or the artifact.pgolf of one"}


def kind_of(path: Path) -> FileKind:
    """Return the kind of a file. Raises OSError."""
    return file_kind(path.read_bytes())


def require_ours(path: Path) -> None:
    """Raise MismatchError that says what a file is if it is no artifact of ours."""
    content = path.read_bytes()
    kind = file_kind(content)
    if kind.name == OURS:
        return
    raise MismatchError(
        f"{path} is {kind.words}, not an artifact of pgolf-post (it begins {first_bytes(content)})",
        hint=HINTS.get(kind.name, kind.hint).format(path=path),
    )
