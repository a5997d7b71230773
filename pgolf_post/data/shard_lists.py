"""A split's shards as one text: no shard twice, documents that open with BOS, tokens that were really written."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgolf_post.base.progress import say
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import DamagedFileError, MismatchError

START_TOKENS = 1024
HOLE_TOKENS = 1024  # this many zeros in a row, and aligned, are no text


def refuse_equal_shards(paths: Sequence[Path]) -> None:
    """Raise MismatchError for two shards with the same tokens: a copy is not more text."""
    seen: dict[bytes, Path] = {}
    starts = [_start(path) for path in paths]
    times = Counter(starts)
    for path in (path for path, start in zip(paths, starts, strict=True) if times[start] > 1):  # the others differ
        key = hashlib.sha256(read_shard(path).tobytes()).digest()
        if key in seen:
            raise MismatchError(
                f"{path} has the same tokens as {seen[key].name}: its text would count twice",
                hint=f"mv {shlex.quote(str(path))} {shlex.quote(str(path))}.copy",
            )
        seen[key] = path


def _start(path: Path) -> tuple[int, bytes]:
    """Return a shard's length and its first tokens."""
    tokens = read_shard(path)
    return len(tokens), tokens[:START_TOKENS].tobytes()


def refuse_holes(path: Path) -> None:
    """Raise DamagedFileError for a stretch of zeros: a file that was given its size and never its contents.

    Call it where id 0 stands for no text (pad or unknown).
    """
    tokens = read_shard(path)
    blocks = tokens[: len(tokens) // HOLE_TOKENS * HOLE_TOKENS].reshape(-1, HOLE_TOKENS)
    empty = np.flatnonzero(~blocks.any(axis=1))
    if len(empty):
        raise DamagedFileError(
            f"{path}: {len(empty) * HOLE_TOKENS} of {len(tokens)} tokens are stretches of zeros, the first at position "
            f"{int(empty[0]) * HOLE_TOKENS}: its contents never arrived",
            hint="fetch it again, and compare its sha256 with the original's",
        )


def refuse_without_bos(split: str, paths: Sequence[Path]) -> None:
    """Raise MismatchError if no document opens with BOS, or if validation is empty or begins inside a document.

    Training shards from the middle of a data set begin inside a document; that is said.
    """
    first = next((tokens for path in paths if len(tokens := read_shard(path))), None)
    if first is None:
        if split == "val":
            raise MismatchError(f"{paths[0]}: the validation split has no tokens", hint="fetch or build it again")
        return
    if int(first[0]) == BOS_ID:
        return
    begins = f"{paths[0]} begins with token {int(first[0])}, not with BOS ({BOS_ID})"
    if not any(np.any(read_shard(path) == BOS_ID) for path in paths):
        raise MismatchError(
            f"{begins}, and no token is BOS: its documents cannot be told apart",
            hint="build shards whose documents each open with BOS: pgolf-post data build TEXT --tokenizer FILE.model",
        )
    if split == "val":
        raise MismatchError(f"{begins}: its first document is cut", hint="fetch the shard that comes before it")
    say(f"{begins}: the document before its first BOS is cut")
