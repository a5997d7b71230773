"""Existing shards → a data folder: everything that a manifest states is counted from the tokens themselves.

It serves downloaded shards, and through `pgolf-post data adopt` those that another program wrote, such as the
challenge's own download script.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_file, atomic_folder, require_new, sha256_file, write_json
from pgolf_post.data.challenge import challenge_note
from pgolf_post.data.counts import count_split, sidecar_bytes
from pgolf_post.data.folder import FORMAT_VERSION, MANIFEST_NAME, TOKENIZER_NAME, DataFolder
from pgolf_post.data.repeats import hashes_of_shards, say_repeats
from pgolf_post.data.shard_lists import refuse_equal_shards, refuse_holes, refuse_without_bos
from pgolf_post.data.shard_names import ShardNames, find_shards
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID, ByteTable, load_tokenizer
from pgolf_post.errors import MismatchError

ITS_TOKENIZER = "--tokenizer FILE.model names the sentencepiece model that the shards were made with"


def adopt(shard_folder: Path, tokenizer: Path, out: Path, name: str) -> DataFolder:
    """Make the data folder `out` over the shards of `shard_folder`: hard links where the disk allows, else copies.

    Raises NotFoundError if there are no validation shards, DamagedFileError for a file that is no shard or not whole,
    MismatchError for shards that do not make a text or have token ids that the tokenizer lacks, PgolfError if `out`
    exists. Errors name the files of `shard_folder`.
    """
    require_new(out)
    shards = find_shards(shard_folder)
    load_tokenizer(tokenizer)
    for file_name in [*shards.train, *shards.val, *shards.val_bytes]:
        read_shard(shard_folder / file_name)
    with atomic_folder(out) as building:
        shutil.copyfile(tokenizer, building / TOKENIZER_NAME)
        for file_name in [*shards.train, *shards.val, *shards.val_bytes]:
            _link_or_copy(shard_folder / file_name, building / file_name)
        write_manifest(building, name, shards, {"made_by": "pgolf-post data adopt"}, shard_folder)
    return DataFolder.open(out)


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)


def write_manifest(
    folder: Path, name: str, shards: ShardNames, source: dict[str, Any], shard_folder: Path | None = None
) -> DataFolder:
    """Write the manifest of a folder whose files are all there, and open it.

    The shards are checked and counted in `shard_folder` if they came from there, so that errors name those files.
    Raises MismatchError if the files do not belong together, DamagedFileError for one that is not whole.
    """
    shard_folder = shard_folder or folder
    tokenizer = load_tokenizer(folder / TOKENIZER_NAME)
    if tokenizer.bos_id() != BOS_ID:
        raise MismatchError(
            f"the tokenizer has BOS id {tokenizer.bos_id()}, shards open documents with {BOS_ID}", hint=ITS_TOKENIZER
        )
    table = ByteTable.from_tokenizer(tokenizer)
    train, val, val_bytes = (
        [shard_folder / name for name in names] for names in (shards.train, shards.val, shards.val_bytes)
    )
    _refuse_what_is_no_text(train, val, table)
    say("counting documents and bytes")
    described = {
        "file": TOKENIZER_NAME,
        "sha256": sha256_file(folder / TOKENIZER_NAME),
        "vocab_size": tokenizer.vocab_size(),
    }
    splits = {"train": _split_entry(folder, train, [], table), "val": _split_entry(folder, val, val_bytes, table)}
    if note := challenge_note(tokenizer.vocab_size(), splits["val"]["num_tokens"]):
        say(note)
    repeated = say_repeats(hashes_of_shards(train), hashes_of_shards(val))
    source = {**source, **repeated, "val_bytes_from": "byte sidecar" if shards.val_bytes else "byte table"}
    with atomic_file(folder / MANIFEST_NAME) as temporary:
        head = {"format_version": FORMAT_VERSION, "name": name}
        write_json(temporary, {**head, "tokenizer": described, "splits": splits, "source": source})
    return DataFolder.open(folder)


def _refuse_what_is_no_text(train: Sequence[Path], val: Sequence[Path], table: ByteTable) -> None:
    """Raise MismatchError or DamagedFileError unless the shards make two texts; see `shard_lists`."""
    refuse_equal_shards([*train, *val])
    for split, paths in (("train", train), ("val", val)):
        refuse_without_bos(split, paths)
        for path in paths if table.is_boundary[0] else ():
            refuse_holes(path)


def _split_entry(folder: Path, shards: Sequence[Path], sidecars: Sequence[Path], table: ByteTable) -> dict[str, Any]:
    """Return a split's part of the manifest. Its bytes are the sidecars', or without any the byte table's."""
    try:
        counts = count_split(shards, table)
    except MismatchError as error:
        raise MismatchError(str(error), hint=ITS_TOKENIZER) from None
    if counts.num_unknown and not sidecars:
        say(
            f"{counts.num_unknown:,} of {counts.num_tokens:,} tokens of {shards[0].name} and on are unknown pieces: "
            "the text they stand for counts 0 bytes"
        )
    for shard, sidecar in itertools.zip_longest(shards, sidecars) if sidecars else ():
        lengths = [len(read_shard(path)) if path else 0 for path in (shard, sidecar)]
        if lengths[0] != lengths[1]:
            raise MismatchError(
                f"{sidecar or shard}: the shard has {lengths[0]} tokens, its byte sidecar {lengths[1]}",
                hint="fetch both again, of one version",
            )
    return {
        "num_tokens": counts.num_tokens,
        "num_documents": counts.num_documents,
        "num_bytes": sidecar_bytes(sidecars) if sidecars else counts.table_bytes,
        "shards": [_file_entry(folder / shard.name) for shard in shards],
        "byte_sidecars": [_file_entry(folder / sidecar.name) for sidecar in sidecars],
    }


def _file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": sha256_file(path), "num_tokens": len(read_shard(path))}
