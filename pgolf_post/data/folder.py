"""One data folder: its files, its tokenizer and its tokens.

The manifest is the folder's identity: checkpoints record its sha256, so that a score can say which text it was
measured on. Opening checks that each file exists, reading checks lengths and token ids, `data check` everything.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pgolf_post.base.storage import read_json
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import ByteTable, load_tokenizer
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError
from pgolf_post.settings import canonical_json

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"  # in folders that we write; others name theirs in the manifest
FORMAT_VERSION = 1

Split = Literal["train", "val"]


@dataclass(frozen=True)
class DataFolder:
    """An opened data folder. `manifest` is {format_version, name, tokenizer: {file, sha256, vocab_size},
    splits: {train|val: {num_tokens, num_documents, num_bytes, shards: [{file, sha256, num_tokens}],
    byte_sidecars: [{file, sha256, num_tokens}]}}, source: {…}}."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> DataFolder:
        """Open a folder whose manifest is complete and whose files exist. Raises NotFoundError, DamagedFileError."""
        path = Path(path)
        manifest_path = path / MANIFEST_NAME
        if not manifest_path.is_file():
            raise NotFoundError(
                f"{path} is not a data folder: it has no {MANIFEST_NAME}",
                hint=f"pgolf-post data build --stdlib --out {path}   (or: pgolf-post data download --out {path})",
            )
        manifest = read_json(manifest_path)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedFileError(
                f"{manifest_path}: format_version {manifest.get('format_version')!r}, expected {FORMAT_VERSION}"
            )
        try:
            cls(path, manifest)._check_files()
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"{manifest_path} lacks what a manifest must have: {error!r}") from None
        return cls(path, manifest)

    def _check_files(self) -> None:
        """Raise DamagedFileError listing the files that the manifest names and the folder lacks."""
        missing = [name for name in self.file_names() if not (self.path / name).is_file()]
        if missing:
            raise DamagedFileError(f"{self.path}: files named by the manifest are missing: {', '.join(missing)}")

    def file_names(self) -> list[str]:
        """Return the name of every file in the manifest: tokenizer, shards, byte sidecars."""
        splits = self.manifest["splits"].values()
        shards = [shard for split in splits for shard in [*split["shards"], *split.get("byte_sidecars", [])]]
        return [self.manifest["tokenizer"]["file"], *(shard["file"] for shard in shards)]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def tokenizer_sha256(self) -> str:
        return str(self.manifest["tokenizer"]["sha256"])

    @cached_property
    def manifest_sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.manifest)).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path / self.manifest["tokenizer"]["file"])

    @cached_property
    def byte_table(self) -> ByteTable:
        return ByteTable.from_tokenizer(self.tokenizer)

    def shard_paths(self, split: Split) -> list[Path]:
        """Return the paths of the split's shards in order. Raises NotFoundError if the folder has none."""
        shards = self.manifest["splits"].get(split, {}).get("shards", [])
        if not shards:
            raise NotFoundError(f"{self.path} has no {split!r} shards", hint="pgolf-post data build --help")
        return [self.path / shard["file"] for shard in shards]

    def shards(self, split: Split) -> Iterator[tuple[Path, np.ndarray]]:  # (num_tokens,) uint16, memory-mapped
        """Yield the split's shards in order with their paths. Raises NotFoundError, DamagedFileError, MismatchError."""
        recorded = [shard["num_tokens"] for shard in self.manifest["splits"].get(split, {}).get("shards", [])]
        for path, num_tokens in zip(self.shard_paths(split), recorded, strict=True):
            shard = read_shard(path)
            if len(shard) != num_tokens:
                raise DamagedFileError(
                    f"{path} holds {len(shard)} tokens, the manifest says {num_tokens}",
                    hint=f"pgolf-post data check {shlex.quote(str(self.path))}",
                )
            check_token_ids(shard, self.vocab_size, path)
            yield path, shard

    def tokens(self, split: Split, max_tokens: int | None = None) -> np.ndarray:  # (n,) uint16
        """Return the first `max_tokens` tokens of a split (all by default), across shards.

        Raises MismatchError for a token id that the vocabulary does not have.
        """
        pieces: list[np.ndarray] = []
        for _, shard in self.shards(split):
            held = sum(map(len, pieces))
            if max_tokens is not None and held >= max_tokens:
                break
            pieces.append(np.asarray(shard if max_tokens is None else shard[: max_tokens - held]))
        return np.concatenate(pieces)

    def token_bytes(self, split: Split, tokens: np.ndarray) -> np.ndarray:  # (n,) int64
        """Return the bytes of text of the split's first len(tokens) tokens, from its sidecar or else the byte table."""
        sidecars = self.manifest["splits"][split].get("byte_sidecars", [])
        if sidecars:
            counts = np.concatenate([read_shard(self.path / sidecar["file"]) for sidecar in sidecars])
            return counts[: len(tokens)].astype(np.int64)
        previous = np.concatenate([tokens[:1], tokens[:-1]])
        return self.byte_table.count(previous, tokens)


def check_token_ids(tokens: np.ndarray, vocab_size: int, where: Path) -> None:
    """Raise MismatchError naming the first token id that is not below `vocab_size`."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        position = int(np.argmax(tokens >= vocab_size))
        raise MismatchError(
            f"{where}: token id {int(tokens[position])} at position {position}, but the vocabulary has {vocab_size} "
            f"pieces (ids 0..{vocab_size - 1}); the shard and the tokenizer do not belong together",
            hint=f"pgolf-post data check {shlex.quote(str(where.parent))}",
        )
