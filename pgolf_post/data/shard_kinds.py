"""Names of what is called a shard and is none, from first bytes and length; and what to do about it.

Shards come from other programs, through browsers, git and object stores: a pointer instead of the file, a page instead
of the download, another program's header or none, a copy that stopped or was padded.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS

LLAMA3_MAGIC = 20240801  # llm.c, tokens of 32 bits
AGAIN = "fetch it again, and compare its size with the original's"
MARKS = (  # first bytes, what the file is, what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git -C {folder} lfs pull"),
    (b"<!doctype", "an HTML page, not a shard", AGAIN),
    (b"<html", "an HTML page, not a shard", AGAIN),
    (b"\x1f\x8b", "a gzip stream", "mv {path} {path}.gz && gzip -d {path}.gz"),
    (b"\xfd7zXZ\0", "an xz stream", "mv {path} {path}.xz && xz -d {path}.xz"),
    (b"BZh", "a bzip2 stream", "mv {path} {path}.bz2 && bzip2 -d {path}.bz2"),
    (b"\x28\xb5\x2f\xfd", "a zstd stream", "mv {path} {path}.zst && zstd -d {path}.zst"),
    (b"PK\3\4", "a zip file", "mv {path} {path}.zip && unzip {path}.zip -d {folder}"),
    (b"PAR1", "a parquet file of text, not tokens", "pgolf-post data build {path}"),
    (b"\x93NUMPY", "a NumPy array without a shard's header", "{rewrite_npy}"),
)
REWRITE = (
    "mv {path} {path}.raw && {python} -c "
    '"import sys, numpy, pathlib; from pgolf_post.data import write_shard; '
    'write_shard(pathlib.Path(sys.argv[2]), {read})" {path}.raw {path}'
)
RAW, NPY, BIG_ENDIAN = (
    "numpy.fromfile(sys.argv[1], '<u2')",
    "numpy.load(sys.argv[1])",
    f"numpy.fromfile(sys.argv[1], '>u2')[{HEADER_BYTES // 2}:]",
)


def describe(path: Path) -> tuple[str, str | None]:
    """Return what a file is that is no readable shard, as the end of a sentence, and the next thing to do."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if not head:
        return "is empty (0 bytes)", AGAIN
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, words, hint in MARKS:
        if head.startswith(mark) or (mark[:1] == b"<" and start.startswith(mark)):
            return f"is {words}", _filled(hint.replace("{rewrite_npy}", REWRITE.replace("{read}", NPY)), path)
    if size_bytes < HEADER_BYTES:
        return f"is {size_bytes} bytes, shorter than a shard's {HEADER_BYTES}-byte header", AGAIN
    return _describe_header(path, head, size_bytes)


def _describe_header(path: Path, head: bytes, size_bytes: int) -> tuple[str, str | None]:
    """Describe a file by the numbers where a shard has its header."""
    magic, version, num_tokens = (int(value) for value in np.frombuffer(head, dtype="<i4", count=3))
    found = f"has magic {magic} version {version}, expected magic {MAGIC} version {VERSION}"
    if magic == LLAMA3_MAGIC:
        again = "tokenize the text again with a sentencepiece .model: pgolf-post data build TEXT --tokenizer FILE.model"
        return f"{found}: it is an llm.c shard of 32-bit tokens, and ours have 16 bits (at most 65,536 pieces)", again
    if int(np.frombuffer(head, dtype=">i4", count=1)[0]) == MAGIC:
        return f"{found}: it is big-endian", _filled(REWRITE.replace("{read}", BIG_ENDIAN), path)
    if magic != MAGIC:
        if size_bytes % 2:
            return found, AGAIN
        raw = _filled(REWRITE.replace("{read}", RAW), path)
        return f"{found}: it has no shard's header", f"if it is raw 16-bit tokens (nanoGPT writes those): {raw}"
    if version != VERSION:
        return found, "write it again as version 1, with tokens of 16 bits"
    return _describe_length(path, num_tokens, size_bytes)


def _describe_length(path: Path, num_tokens: int, size_bytes: int) -> tuple[str, str | None]:
    """Describe a shard whose length is not that which its header promises."""
    expected = HEADER_BYTES + 2 * num_tokens
    if num_tokens < 0:
        return f"has a header that promises {num_tokens} tokens", AGAIN
    promise = f"has {size_bytes} bytes, its header promises {num_tokens} tokens ({expected} bytes)"
    if size_bytes < expected:
        return f"{promise}: it is cut off", AGAIN
    with path.open("rb") as file:
        file.seek(expected)
        is_padding = not any(file.read(1 << 20)) and size_bytes - expected <= 1 << 20
    if is_padding:
        return f"{promise}: the rest is zeros, as a copy pads it", _filled(f"truncate -s {expected} {{path}}", path)
    return f"{promise}: something stands behind its tokens", AGAIN


def _filled(command: str, path: Path) -> str:
    """Return a command with the file's path, its folder and this Python in it, quoted for a shell."""
    for field, value in (("path", path), ("folder", path.parent), ("python", sys.executable)):
        command = command.replace(f"{{{field}}}", shlex.quote(str(value)))
    return command
