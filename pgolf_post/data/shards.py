"""Token shards in the challenge's binary format, memory-mapped for reading and written atomically.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros), then that many little-endian
uint16 values. Tokens and per-token byte sidecars share the format (openai/parameter-golf, from modded-nanogpt).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgolf_post.base.storage import atomic_file
from pgolf_post.data.shard_kinds import HEADER_BYTES, HEADER_INTS, MAGIC, VERSION, describe
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError


def read_shard(path: Path) -> np.ndarray:  # (num_tokens,) uint16, memory-mapped, read-only
    """Memory-map a shard's tokens. Raises NotFoundError, or DamagedFileError that says what the file is instead."""
    if path.is_symlink() and not path.exists():
        raise NotFoundError(
            f"{path} is a link to {path.readlink()}, which is not there", hint="copy the files themselves: cp -L"
        )
    if not path.is_file():
        raise NotFoundError(f"no such shard: {path}", hint="pgolf-post data build --help")
    size_bytes = path.stat().st_size
    header = [*np.fromfile(path, dtype="<i4", count=3).tolist(), 0, 0, -1][:3]
    num_tokens = int(header[2])
    if header[:2] != [MAGIC, VERSION] or size_bytes != HEADER_BYTES + 2 * num_tokens:
        problem, hint = describe(path)
        raise DamagedFileError(f"{path} {problem}", hint=hint)
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
