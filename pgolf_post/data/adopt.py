"""Existing shards → a data folder: everything that a manifest states is counted from the tokens themselves.

It serves downloaded shards, and through `pgolf-post data adopt` those that another program wrote, such as the
challenge's own download script.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file, atomic_folder, sha256_file, write_json
from pgolf_post.data.counts import count_split, sidecar_bytes
from pgolf_post.data.folder import FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME, DataFolder
from pgolf_post.data.repeats import hashes_of_shards, say_repeats
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID, ByteTable, load_tokenizer
from pgolf_post.errors import MismatchError, NotFoundError


@dataclass(frozen=True)
class ShardNames:
    """File names inside a data folder, in order."""

    train: Sequence[str]
    val: Sequence[str]
    val_bytes: Sequence[str]  # byte sidecars of val; may be empty


def adopt(shard_folder: Path, tokenizer: Path, out: Path, name: str) -> DataFolder:
    """Make the data folder `out` over the shards of `shard_folder`: hard links where the disk allows, else copies.

    Raises NotFoundError if there are no validation shards, MismatchError for equal shards or token ids that the
    tokenizer lacks, PgolfError if `out` exists.
    """
    shards = find_shards(shard_folder)
    refuse_equal_shards(shard_folder, [*shards.train, *shards.val])
    with atomic_folder(out) as building:
        shutil.copyfile(tokenizer, building / TOKENIZER_NAME)
        for file_name in [*shards.train, *shards.val, *shards.val_bytes]:
            _link_or_copy(shard_folder / file_name, building / file_name)
        write_manifest(building, name, shards, {"made_by": "pgolf-post data adopt"})
    return DataFolder.open(out)


def find_shards(folder: Path) -> ShardNames:
    """Return the challenge's file names in `folder`. Raises NotFoundError if none is a validation shard."""
    names = sorted(path.name for path in folder.glob("fineweb_*.bin"))
    sidecars = [name for name in names if name.startswith("fineweb_val_bytes_")]
    val = [name for name in names if name.startswith("fineweb_val_") and name not in sidecars]
    if not val:
        raise NotFoundError(f"{folder} has no fineweb_val_*.bin", hint="pgolf-post data download")
    return ShardNames([name for name in names if name.startswith("fineweb_train_")], val, sidecars)


def refuse_equal_shards(folder: Path, names: Sequence[str]) -> None:
    """Raise MismatchError for two shards with the same tokens: a copy is not more text."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(hashlib.sha256(read_shard(folder / name).tobytes()).hexdigest(), name)
        if first != name:
            raise MismatchError(
                f"{folder}: {name} has the same tokens as {first}: its text would count twice",
                hint=f"mv {shlex.quote(str(folder / name))} {shlex.quote(str(folder / name) + '.copy')}",
            )


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)


def write_manifest(folder: Path, name: str, shards: ShardNames, source: dict[str, Any]) -> DataFolder:
    """Write the manifest of a folder whose files are all there. Raises MismatchError if they do not belong together."""
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    if tokenizer.bos_id() != BOS_ID:
        raise MismatchError(f"the tokenizer has BOS id {tokenizer.bos_id()}, shards open documents with {BOS_ID}")
    table = ByteTable.from_tokenizer(tokenizer)
    say("counting documents and bytes")
    described = {
        "file": TOKENIZER_NAME,
        "sha256": sha256_file(folder / TOKENIZER_NAME),
        "vocab_size": tokenizer.vocab_size(),
    }
    splits = {
        "train": _split_entry(folder, shards.train, [], table),
        "val": _split_entry(folder, shards.val, shards.val_bytes, table),
    }
    train_paths, val_paths = ([folder / name for name in names] for names in (shards.train, shards.val))
    repeated = say_repeats(hashes_of_shards(train_paths), hashes_of_shards(val_paths))
    source = {**source, **repeated, "val_bytes_from": "byte sidecar" if shards.val_bytes else "byte table"}
    with atomic_file(folder / MANIFEST_NAME) as temporary:
        head = {"format_version": FORMAT_VERSION, "name": name}
        write_json(temporary, {**head, "tokenizer": described, "splits": splits, "source": source})
    return DataFolder.open(folder)


def _split_entry(folder: Path, shards: Sequence[str], sidecars: Sequence[str], table: ByteTable) -> dict[str, Any]:
    """Return a split's part of the manifest. Its bytes are the sidecars', or without any the byte table's."""
    counts = count_split([folder / shard for shard in shards], table)
    byte_sidecars = [_file_entry(folder / file) for file in sidecars]
    num_entries = sum(item["num_tokens"] for item in byte_sidecars)
    if sidecars and num_entries != counts.num_tokens:
        raise MismatchError(f"{folder}: the shards have {counts.num_tokens} tokens, their byte sidecars {num_entries}")
    return {
        "num_tokens": counts.num_tokens,
        "num_documents": counts.num_documents,
        "num_bytes": sidecar_bytes([folder / file for file in sidecars]) if sidecars else counts.table_bytes,
        "shards": [_file_entry(folder / shard) for shard in shards],
        "byte_sidecars": byte_sidecars,
    }


def _file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": sha256_file(path), "num_tokens": len(read_shard(path))}
