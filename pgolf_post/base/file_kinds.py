"""Names of files by their first bytes, so that a file which is something else is said to be that.

A download that failed leaves an HTML page or a git-LFS pointer under the right name; a copy that stopped leaves half a
zip. Each kind comes with what to do about it. Compression marks: brotli and raw LZMA2 have none.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import NamedTuple

TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6: a pickled magic number
AGAIN = "copy or download it again, and compare its size with the original"
RAW_FILE = "download the file itself: on Hugging Face /resolve/ in place of /blob/, on GitHub the raw file"
NPZ_TO_PT = (
    "python -c \"import numpy, torch; d = numpy.load('{path}'); "
    "torch.save({{k: torch.from_numpy(d[k]) for k in d}}, '{path}.pt')\", then import that"
)
UNPACKED = "{} {{path}}, then import the weights in it"
RESAVE = "in the script that wrote it: torch.save(model.state_dict(), 'weights.pt'), then import that"


class FileKind(NamedTuple):
    """A kind of file: how its bytes begin, what it is called, what to do with it."""

    name: str
    fits: Callable[[bytes], bool]
    words: str
    hint: str  # {path} stands for the file


def begins(*marks: bytes) -> Callable[[bytes], bool]:
    """Return a test of a file's first bytes."""
    return lambda content: content.startswith(marks)


def is_safetensors(content: bytes) -> bool:
    """Return whether a JSON header of the stated length stands behind the first eight bytes."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < 1 << 27


def zip_names(content: bytes) -> list[str]:
    """Return the names in a whole zip file; nothing if it is cut, no zip, or something else with a zip inside."""
    if not content.startswith(b"PK"):
        return []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return []


def is_torch_zip(content: bytes) -> bool:
    """Return whether a whole zip file holds what torch.save writes."""
    return any(name.endswith("data.pkl") for name in zip_names(content))


def _page(content: bytes) -> bool:
    return content[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head"))


def _npz(content: bytes) -> bool:
    names = zip_names(content)
    return bool(names) and all(name.endswith(".npy") for name in names)


def _cut_zip(content: bytes) -> bool:
    return content.startswith(b"PK\3\4") and not zip_names(content)


def _text(content: bytes) -> bool:
    """Return whether there are no control characters at the start, and no bytes beyond ASCII at the very start."""
    return not any(byte < 9 or 13 < byte < 27 for byte in content[:512]) and content[:64].isascii()


PICKLE = FileKind(
    "pickle", lambda content: content[:1] == b"\x80" and content[1:2] in b"\1\2\3\4\5",
    "a plain pickle, not a file of torch.save; reading it would run code", RESAVE,
)  # fmt: skip


def _stream(name: str, mark: bytes, words: str, tool: str) -> FileKind:
    """Return the kind of a compressed stream, and how its tool undoes it."""
    return FileKind(name, begins(mark), words, f"{tool}, then the same command on {{path}}.raw")


KINDS = (  # the first that fits
    FileKind("empty", lambda content: not content, "empty (0 bytes)", AGAIN),
    FileKind("safetensors", is_safetensors, "a safetensors file", "pgolf-post import {path}"),
    FileKind("torch", is_torch_zip, "a file of torch.save", "pgolf-post import {path}"),
    FileKind("torch", begins(TORCH_LEGACY), "a file of torch.save", "pgolf-post import {path}"),
    FileKind("npz", _npz, "an npz file of NumPy arrays", NPZ_TO_PT),
    FileKind("cut zip", _cut_zip, "a zip file, cut short or damaged (it has no directory at its end)", AGAIN),
    FileKind("zip", begins(b"PK\3\4"), "a zip file without a file of torch.save", UNPACKED.format("unzip")),
    FileKind("lfs", begins(b"version https://git-lfs"), "a git-LFS pointer, not the file itself", "git lfs pull"),
    FileKind("html", _page, "an HTML page, not a file of weights", RAW_FILE),
    FileKind("artifact", begins(b"BSHF", b"PGRP"), "an artifact of a public script", "pgolf-post repack {path}"),
    _stream("gzip", b"\x1f\x8b", "a gzip stream", "gzip -dc {path} > {path}.raw"),
    _stream("bzip2", b"BZh", "a bzip2 stream (bz2)", "bzip2 -dc {path} > {path}.raw"),
    _stream("xz", b"\xfd7zXZ\0", "an xz stream (lzma)", "xz -dc {path} > {path}.raw"),
    _stream("lzma", b"\x5d\0\0", "an lzma stream without xz's frame", "xz --format=lzma -dc {path} > {path}.raw"),
    _stream("zstd", b"\x28\xb5\x2f\xfd", "a zstd stream", "zstd -dc {path} > {path}.raw"),
    _stream("lrzip", b"LRZI", "an lrzip stream", "lrzip -d -o {path}.raw {path}"),
    _stream("lz4", b"\x04\x22\x4d\x18", "an lz4 stream", "lz4 -dc {path} > {path}.raw"),
    FileKind("7z", begins(b"7z\xbc\xaf\x27\x1c"), "a 7z archive", UNPACKED.format("7z x")),
    FileKind("tar", lambda content: content[257:262] == b"ustar", "a tar archive", UNPACKED.format("tar -xf")),
    FileKind("npy", begins(b"\x93NUMPY"), "a single NumPy array", RESAVE),
    FileKind("gguf", begins(b"GGUF"), "a GGUF file of llama.cpp", RESAVE),
    FileKind("hdf5", begins(b"\x89HDF"), "an HDF5 file", RESAVE),
    FileKind("ours", begins(b"PGLF"), "an artifact of pgolf-post", "pgolf-post show {path}"),
    PICKLE,
    FileKind("text", _text, "text, not a file of weights", "the file of weights is FILE; a log is given by --log"),
)
UNKNOWN = FileKind("unknown", lambda _: True, "of no kind that is known here", RESAVE)


def file_kind(content: bytes) -> FileKind:
    """Return the kind of a file from its bytes."""
    return next((kind for kind in KINDS if kind.fits(content)), UNKNOWN)


def first_bytes(content: bytes) -> str:
    """Return the first bytes of a file, for a message."""
    return content[:8].hex(" ") or "none"
