"""Token shards in the challenge's binary format, memory-mapped for reading and written atomically.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then that many little-endian
uint16 values. Tokens and per-token byte sidecars share the format (openai/parameter-golf, from modded-nanogpt).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgolf_post.base.storage import atomic_file
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS


def read_shard(path: Path) -> np.ndarray:  # (num_tokens,) uint16, memory-mapped, read-only
    """Memory-map a shard's tokens. Raises NotFoundError, or DamagedFileError for a wrong magic, version or length."""
    if not path.is_file():
        raise NotFoundError(f"no such shard: {path}", hint="pgolf-post data build --help")
    size_bytes = path.stat().st_size
    if size_bytes < HEADER_BYTES:
        raise DamagedFileError(f"{path} is {size_bytes} bytes, shorter than a shard's {HEADER_BYTES}-byte header")
    magic, version, num_tokens = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC or version != VERSION:
        raise DamagedFileError(f"{path}: magic {magic} version {version}, expected magic {MAGIC} version {VERSION}")
    expected_bytes = HEADER_BYTES + 2 * num_tokens
    if size_bytes != expected_bytes:
        raise DamagedFileError(
            f"{path}: header promises {num_tokens} tokens ({expected_bytes} bytes), the file has {size_bytes} bytes"
        )
    if num_tokens == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write `tokens` (num_tokens,) with values in 0..65535 as one shard. Raises PgolfError on values outside."""
    if tokens.ndim != 1:
        raise PgolfError(f"{path}: a shard holds a flat list of tokens, got shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFF):
        raise PgolfError(f"{path}: token ids {int(tokens.min())}..{int(tokens.max())} do not fit in uint16 (0..65535)")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())
