"""Compressed artifacts of the public scripts: a codec, perhaps a byte shuffle, a torch-saved dictionary inside.

Nothing in such a file is trusted. Streams are inflated up to a limit; the zip inside must hold its tensors as they
are, because a compressed one could grow once more; `weights_only=True` builds tensors and plain containers and nothing
else; and a tensor counts with all its elements, however few its storage has.

The byte shuffle puts every second byte of the pickle first and the others after: "BSHF", the stride (one byte), planes.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import torch
import zstandard
from torch import Tensor

from pgolf_post.base.file_kinds import AGAIN, KINDS, PICKLE, RESAVE, file_kind, first_bytes
from pgolf_post.base.paths import absent
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError
from pgolf_post.families import check_finite
from pgolf_post.quantize.tensor import Axis, QuantizedModel, QuantizedTensor, ScaleFactor

MAX_INFLATED_BYTES = 1 << 28  # of the dictionary: twice what our own format can hold
MAX_PICKLE_BYTES = 1 << 22  # of its names and shapes
SHUFFLED, PER_GROUP, ZIP = b"BSHF", b"PGRP", b"PK\x03\x04"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MLX_PICKLE = "a plain pickle, as train_gpt_mlx.py writes it; reading it would run code"
TABLES = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")  # nn.Embedding: bfloat16 in every script


def read_dictionary(path: Path) -> Mapping[str, Any]:
    """Return the dictionary in a compressed artifact. Raises NotFoundError, DamagedFileError, MismatchError."""
    if not path.is_file():
        raise NotFoundError(absent(path, "artifact file"))
    if path.stat().st_size > MAX_INFLATED_BYTES:
        raise DamagedFileError(f"{path} has {path.stat().st_size:,} bytes; the limit is {MAX_INFLATED_BYTES:,}")
    content = path.read_bytes()
    if content[:4] == PER_GROUP:
        raise MismatchError(
            f"{path} is a per-group artifact (PGRP): which tensor of a group comes first is not recorded in it",
            hint="export the state dict from the script that wrote it, then pgolf-post import and requant",
        )
    return load_dictionary(unshuffle(inflate(content, path), path), path)


# codecs


def inflate(content: bytes, path: Path) -> bytes:
    """Undo the codec, which the first bytes name; brotli has no mark of its own. Raises DamagedFileError."""
    name = next((name for name, (mark, _) in CODECS.items() if content.startswith(mark)), "brotli")
    if name == "brotli":
        _refuse_other_kinds(content, path)
    try:
        inflated, finished = CODECS[name][1](content) if name in CODECS else _brotli(content)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, brotli.error, MemoryError) as error:
        raise DamagedFileError(_damage(name, content, path, error), hint=AGAIN) from None
    if not finished:
        limit = f"{MAX_INFLATED_BYTES:,} bytes"
        raise DamagedFileError(f"{path}: {name} stream is cut short, or larger than {limit}", hint=AGAIN)
    return inflated


def _refuse_other_kinds(content: bytes, path: Path) -> None:
    """Raise DamagedFileError if the first bytes are those of another codec, or of no artifact at all."""
    kind = file_kind(content)
    if kind.name in OTHER_KINDS:
        raise DamagedFileError(
            f"{path} is {kind.words}, not an artifact under {', '.join(CODECS)} or brotli "
            f"(it begins {first_bytes(content)})",
            hint=kind.hint.format(path=path),
        )


def _damage(name: str, content: bytes, path: Path, error: Exception) -> str:
    """Return what is wrong with a stream; a file that no mark fits need not be brotli at all."""
    if name != "brotli":
        return f"{path}: {name} stream is damaged: {error}"
    return (
        f"{path} begins {first_bytes(content)}, which is the mark of no codec that is known; read as brotli, which has "
        f"none, it is damaged: {error} (raw LZMA2, without xz's frame, has no mark either)"
    )


def _stored(content: bytes) -> tuple[bytes, bool]:
    return content, True


def _zlib(content: bytes) -> tuple[bytes, bool]:
    decoder = zlib.decompressobj()
    return decoder.decompress(content, MAX_INFLATED_BYTES), decoder.eof


def _lzma(content: bytes) -> tuple[bytes, bool]:
    decoder = lzma.LZMADecompressor(memlimit=MAX_INFLATED_BYTES)
    return decoder.decompress(content, MAX_INFLATED_BYTES), decoder.eof


def _zstd(content: bytes) -> tuple[bytes, bool]:
    decoder, inflated = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(), bytearray()
    for at in range(0, len(content), 64):
        if decoder.eof or len(inflated) > MAX_INFLATED_BYTES:
            break
        inflated += decoder.decompress(content[at : at + 64])
    return bytes(inflated), decoder.eof and len(inflated) <= MAX_INFLATED_BYTES


def _brotli(content: bytes) -> tuple[bytes, bool]:
    decoder, inflated = brotli.Decompressor(), bytearray()
    for at in range(0, len(content), 64):  # older releases cannot limit the output of one call
        inflated += decoder.process(content[at : at + 64])
        if len(inflated) > MAX_INFLATED_BYTES:
            return b"", False
    return bytes(inflated), decoder.is_finished()


OTHER_KINDS = {kind.name for kind in KINDS} - {"torch", "artifact", "xz", "zstd", "text"}
CODECS: dict[str, tuple[bytes, Callable[[bytes], tuple[bytes, bool]]]] = {
    # name: (first bytes, content → (inflated, whether the stream ended))
    "stored": (ZIP, _stored),
    "zlib": (b"\x78", _zlib),
    "lzma": (b"\xfd7zXZ\x00", _lzma),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}


def unshuffle(content: bytes, path: Path) -> bytes:
    """Undo the byte shuffle, if there is one. Raises DamagedFileError for a stride of 0."""
    if content[:4] != SHUFFLED:
        return content
    stride = content[4] if len(content) > 4 else 0
    if stride == 0:
        raise DamagedFileError(f"{path}: byte shuffle of stride 0")
    planes = np.frombuffer(content, np.uint8)
    joined = _joined(planes[5:], stride)
    if not joined.startswith(ZIP) and content[5:6] == b"\0":  # the script of 2026-03-31 (#1204) has two bytes of stride
        wide = _joined(planes[6:], stride)
        return wide if wide.startswith(ZIP) else joined
    return joined


def _joined(planes: np.ndarray, stride: int) -> bytes:
    """Return bytes of which every stride-th stands in one plane."""
    whole = np.empty(len(planes), np.uint8)
    at = 0
    for plane in range(stride):
        length = len(whole[plane::stride])
        whole[plane::stride] = planes[at : at + length]
        at += length
    return whole.tobytes()


# the dictionary


def load_dictionary(content: bytes, path: Path) -> Mapping[str, Any]:
    """Return a torch-saved dictionary of tensors and plain containers. Raises DamagedFileError, MismatchError."""
    unreadable, kind = f"{path} cannot be read as tensors and plain containers", file_kind(content)
    if kind.name != "torch":
        about = MLX_PICKLE if kind is PICKLE else kind.words
        hint = kind.hint.format(path=path) if kind.name == "npz" else RESAVE
        raise DamagedFileError(f"{unreadable}: inflated, it is {about}", hint=hint)
    try:
        _check_zip(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged pickle breaks the reader in any way it likes
        text = (str(error) or type(error).__name__).splitlines()[0]
        reason = "it needs classes that would be run" if "weights_only" in str(error) else text
        raise DamagedFileError(f"{unreadable}: {reason}", hint=RESAVE) from None
    if not isinstance(loaded, Mapping):
        raise MismatchError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors")
    return loaded


def _check_zip(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its tensors are compressed once more")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its tensors overlap")
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickled > MAX_PICKLE_BYTES:
        raise ValueError(f"{pickled:,} bytes of names and shapes; the limit is {MAX_PICKLE_BYTES:,}")


def tensors_of(stored: Mapping[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    """Return the tensors under one key. Raises MismatchError for anything else, DamagedFileError over the limit."""
    tensors = stored.get(key)
    if not isinstance(tensors, Mapping):
        raise MismatchError(f"{path}: {key!r} is a {type(tensors).__name__}, expected a dictionary of tensors")
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise MismatchError(f"{path}: {key}[{name!r}] is a {type(tensor).__name__}, expected a plain tensor")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > MAX_INFLATED_BYTES:
        raise DamagedFileError(f"{path}: {key!r} declares {size:,} bytes; the limit is {MAX_INFLATED_BYTES:,}")
    return dict(tensors)


# tensors → the nouns of our own artifacts


def kept(name: str, tensor: Tensor, path: Path) -> np.ndarray:
    """Return a passed-through tensor in its own precision, bfloat16 as bits. Raises MismatchError for other types."""
    _require(tensor.dtype in FLOATS, path, name, f"is {tensor.dtype}, expected float16, bfloat16 or float32")
    plain = tensor.detach().contiguous()
    return (plain.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else plain.numpy()).copy()


def matrix(name: str, symbols: Tensor, scale: Tensor, path: Path) -> QuantizedTensor:
    """Return integers times one scale, or one per row: what the scripts compute as `q.float() * scale.float()`.

    Raises MismatchError if they do not belong together.
    """
    by_row = scale.ndim > 0
    rows = (symbols.shape[0] if symbols.ndim else 1) if by_row or symbols.ndim > 1 else 1
    if by_row:
        fits = symbols.ndim > 0 and scale.numel() == rows
        _require(fits, path, name, f"has {scale.numel()} scales for {tuple(symbols.shape)} symbols")
    return QuantizedTensor(
        name, integers(name, symbols, rows, path), (factor(name, "row" if by_row else "tensor", scale, path),),
        tuple(symbols.shape),
    )  # fmt: skip


def integers(name: str, symbols: Tensor, rows: int, path: Path) -> np.ndarray:  # → (rows, columns)
    """Return symbols as a matrix. Raises MismatchError for types other than int8 and int16."""
    _require(symbols.dtype in (torch.int8, torch.int16), path, name, f"is {symbols.dtype}, expected int8 or int16")
    columns = symbols.numel() // rows if rows else int(np.prod(symbols.shape[1:]))
    return symbols.detach().reshape(rows, columns).contiguous().numpy().copy()


def factor(name: str, axis: Axis, scale: Tensor, path: Path, group_size: int = 0) -> ScaleFactor:
    """Return scales in float16 or float32, which holds every bfloat16.

    Raises MismatchError for other types, NumericsError for a scale that is NaN or infinite.
    """
    _require(scale.dtype in FLOATS, path, f"{name}'s scale", f"is {scale.dtype}, expected float16 or float32")
    check_finite(f"{name}'s scale", scale, str(path))
    values = scale.detach().reshape(-1)
    return ScaleFactor(axis, (values if values.dtype == torch.float16 else values.float()).numpy().copy(), group_size)


def casts_of(model: QuantizedModel, path: Path) -> dict[str, torch.dtype]:
    """Return the types that the script casts tensors to as it loads them. Raises MismatchError for one that is none."""
    named = {name: str(dtype) for dtype, names in model.lineage.get("casts", {}).items() for name in names}
    for name, dtype in named.items():
        _require(getattr(torch, dtype, None) in FLOATS, path, name, f"is to be cast to {dtype}, expected a float type")
    return {name: getattr(torch, dtype) for name, dtype in named.items()}


def _require(condition: bool, path: Path, name: str, problem: str) -> None:
    if not condition:
        raise MismatchError(f"{path}: {name} {problem}")
