"""Check of a data folder: every number in its manifest, recomputed from the files.

The checks of bytes matter most, because bits per byte divides by them. The byte table is compared with sentencepiece's
own decoder, and a validation split of the challenge with the bytes that are known (`challenge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.progress import progress_bar
from pgolf_post.base.storage import sha256_file
from pgolf_post.data.challenge import challenge_note, challenge_verdict
from pgolf_post.data.counts import SplitCounts, count_split, sidecar_bytes
from pgolf_post.data.folder import DataFolder, Split, check_token_ids
from pgolf_post.data.shard_lists import refuse_equal_shards, refuse_holes
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import PgolfError


@dataclass(frozen=True)
class CheckRow:
    """One check, its outcome, and the numbers that show it."""

    name: str
    passed: bool
    evidence: str


def check(folder: DataFolder, sample_documents: int = 64) -> list[CheckRow]:
    """Recompute what the folder's manifest states. Damage does not raise: the failed check says what is wrong."""
    steps = list(_steps(folder, sample_documents))
    rows: list[CheckRow] = []
    with progress_bar(f"checking {folder.name}", len(steps), "checks") as advance:
        for name, step in steps:
            rows.append(_row(name, step))
            advance(note=name)
    return rows


def check_split(folder: DataFolder, split: Split, sample_documents: int = 64) -> list[CheckRow]:
    """Recompute what the manifest states of one split; see `check`."""
    return [_row(name, step) for name, step in _split_steps(folder, split, sample_documents)]


Step = Callable[[], tuple[bool, str]]


def _row(name: str, step: Step) -> CheckRow:
    """Run one step; a PgolfError is a failed check with its message as evidence."""
    try:
        return CheckRow(name, *step())
    except PgolfError as error:
        return CheckRow(name, False, str(error))


def _steps(folder: DataFolder, sample_documents: int) -> Iterator[tuple[str, Step]]:
    yield "tokenizer: sha256, vocabulary", lambda: _check_tokenizer(folder)
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        yield from _split_steps(folder, split, sample_documents)


def _split_steps(folder: DataFolder, split: Split, sample_documents: int) -> Iterator[tuple[str, Step]]:
    if folder.manifest["splits"].get(split, {}).get("shards"):
        checks = SplitChecks(folder, split, sample_documents)
        yield f"{split}: sha256", checks.hashes
        yield f"{split}: headers, lengths", checks.lengths
        yield f"{split}: no shard twice", checks.shards_differ
        yield f"{split}: token ids", checks.token_ids
        yield f"{split}: documents open with BOS", checks.documents
        yield f"{split}: byte table = decoder", checks.byte_table
        if checks.sidecars:
            yield f"{split}: byte sidecar", checks.byte_sidecar
        yield f"{split}: bytes of text", checks.num_bytes


def _check_tokenizer(folder: DataFolder) -> tuple[bool, str]:
    """Check that the model file is the recorded one, with the recorded vocabulary and BOS."""
    stated = folder.manifest["tokenizer"]
    sha256 = sha256_file(folder.path / stated["file"])
    if sha256 != stated["sha256"]:
        return False, f"{stated['file']}: sha256 {sha256[:12]}…, the manifest states {stated['sha256'][:12]}…"
    vocab_size, bos_id = folder.tokenizer.vocab_size(), folder.tokenizer.bos_id()
    passed = vocab_size == folder.vocab_size and bos_id == BOS_ID
    return passed, f"sha256 {sha256[:12]}…, {vocab_size} pieces (stated {folder.vocab_size}), BOS {bos_id}"


class SplitChecks:
    """The checks of one split; each returns (passed, evidence) or raises PgolfError."""

    def __init__(self, folder: DataFolder, split: Split, sample_documents: int) -> None:
        self.folder, self.sample_documents = folder, sample_documents
        self.stated: Mapping[str, Any] = folder.manifest["splits"][split]
        self.shards: Sequence[Mapping[str, Any]] = self.stated["shards"]
        self.sidecars: Sequence[Mapping[str, Any]] = self.stated.get("byte_sidecars", [])
        self.tokenizer_normalises = bool(folder.manifest["splits"].get("val", {}).get("byte_sidecars"))
        self.is_val = split == "val"

    def _paths(self, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
        return [self.folder.path / entry["file"] for entry in entries]

    def _counts(self) -> SplitCounts:
        return count_split(self._paths(self.shards), self.folder.byte_table)

    def hashes(self) -> tuple[bool, str]:
        """Check that every file has the recorded sha256."""
        entries = [*self.shards, *self.sidecars]
        bad = [entry["file"] for entry in entries if sha256_file(self.folder.path / entry["file"]) != entry["sha256"]]
        if bad:
            return False, f"{len(bad)} of {len(entries)} files are not those recorded: {', '.join(bad)}"
        return True, f"{len(entries)} of {len(entries)} files match"

    def lengths(self) -> tuple[bool, str]:
        """Check headers and token counts, per file and in all."""
        for entry in [*self.shards, *self.sidecars]:
            num_tokens = len(read_shard(self.folder.path / entry["file"]))
            if num_tokens != entry["num_tokens"]:
                return False, f"{entry['file']}: {num_tokens} tokens, stated {entry['num_tokens']}"
        total = sum(int(entry["num_tokens"]) for entry in self.shards)
        return total == self.stated["num_tokens"], f"{total:,} tokens, stated {self.stated['num_tokens']:,}"

    def shards_differ(self) -> tuple[bool, str]:
        """Check that no shard is a copy of another one; of validation, that none is a training shard either."""
        others = self.folder.manifest["splits"].get("train", {}).get("shards", []) if self.is_val else []
        refuse_equal_shards([*self._paths(others), *self._paths(self.shards)])
        return True, f"{len(self.shards)} of {len(self.shards)} differ"

    def token_ids(self) -> tuple[bool, str]:
        """Check that every id is a piece of the vocabulary, and that all tokens were written."""
        largest = 0
        for path in self._paths(self.shards):
            tokens = read_shard(path)
            check_token_ids(tokens, self.folder.vocab_size, path)
            if self.folder.byte_table.is_boundary[0]:
                refuse_holes(path)
            largest = max(largest, int(tokens.max(initial=0)))
        return True, f"largest id {largest}, vocabulary {self.folder.vocab_size}"

    def documents(self) -> tuple[bool, str]:
        """Check that validation opens with BOS, and that the split has as many BOS as stated documents."""
        first = int(read_shard(self._paths(self.shards)[0])[:1].sum())
        counted, stated = self._counts().num_documents, self.stated["num_documents"]
        passed = counted == stated and (first == BOS_ID or (not self.is_val and counted > 0))
        return passed, f"first token {first}, {counted:,} BOS, {stated:,} documents stated"

    def byte_table(self) -> tuple[bool, str]:
        """Compare the byte table with the text that the tokenizer decodes, on sampled documents."""
        decoded_bytes = num_documents = num_unknown = 0
        for tokens in sample_documents(self._paths(self.shards), self.sample_documents):
            check_token_ids(tokens, self.folder.vocab_size, self.folder.path)
            if np.any(tokens == self.folder.tokenizer.unk_id()):  # decodes to a mark of its own
                num_unknown += 1
                continue
            by_table = int(self.folder.byte_table.count(tokens[:-1], tokens[1:]).sum())
            decoded = len(self.folder.tokenizer.decode(tokens[1:].tolist()).encode("utf-8"))
            if by_table != decoded:
                return False, f"a document of {len(tokens)} tokens: table {by_table} bytes, decoded {decoded} bytes"
            decoded_bytes += decoded
            num_documents += 1
        left_out = f"; {num_unknown} with unknown pieces left out" if num_unknown else ""
        if num_documents == 0:
            return True, f"not compared: no document lies whole within one shard{left_out}"
        return True, f"{num_documents} documents, {decoded_bytes:,} bytes, equal in each{left_out}"

    def byte_sidecar(self) -> tuple[bool, str]:
        """Check that the sidecar has one entry per token, 0 for BOS, and adds up to the stated bytes."""
        for shard, sidecar in zip(self._paths(self.shards), self._paths(self.sidecars), strict=False):
            tokens, entries = read_shard(shard), read_shard(sidecar)
            if len(tokens) != len(entries):
                return False, f"{sidecar.name}: {len(entries)} entries for {len(tokens)} tokens"
            if int(entries[tokens == BOS_ID].sum(dtype=np.int64)) != 0:
                return False, f"{sidecar.name}: BOS tokens stand for bytes, expected 0"
        total = sidecar_bytes(self._paths(self.sidecars))
        passed = total == self.stated["num_bytes"] and len(self.shards) == len(self.sidecars)
        return passed, f"{total:,} bytes, stated {self.stated['num_bytes']:,}"

    def num_bytes(self) -> tuple[bool, str]:
        """Check the bytes that a score divides by, and for a split of the challenge that they are the known number."""
        counts, stated = self._counts(), int(self.stated["num_bytes"])
        counted = sidecar_bytes(self._paths(self.sidecars)) if self.sidecars else counts.table_bytes
        ratio = f"{counted / max(counts.num_tokens, 1):.3f} bytes/token"
        if counted != stated and not self.is_val and self.tokenizer_normalises:
            return True, f"{stated:,} of original text, {counted:,} of normalised text, {ratio}; not scored"
        if counted < stated and not self.is_val and counts.num_unknown:
            unknown = f"{counts.num_unknown:,} unknown pieces count 0"
            return True, f"{stated:,} of original text, {counted:,} by the byte table: {unknown}; not scored"
        if counted != stated:
            return False, f"{counted:,} counted, stated {stated:,}"
        verdict = challenge_verdict(self.folder.vocab_size, counts.num_tokens, counted) if self.is_val else None
        if verdict is None:
            note = challenge_note(self.folder.vocab_size, counts.num_tokens) if self.is_val else None
            return True, f"{counted:,}, {ratio}{f'; {note}' if note else ''}"
        return verdict[0], f"{ratio}; {verdict[1]}"


def sample_documents(paths: Sequence[Path], count: int) -> Iterator[np.ndarray]:  # each (tokens with BOS,)
    """Yield about `count` whole documents, spread evenly over each shard (its last may continue in the next shard)."""
    per_shard = max(1, -(-count // max(len(paths), 1)))
    for path in paths:
        tokens = read_shard(path)
        edges = np.flatnonzero(tokens == BOS_ID)
        if path == paths[-1]:
            edges = np.append(edges, len(tokens))
        num_whole = max(len(edges) - 1, 0)
        for index in np.unique(np.linspace(0, num_whole - 1, min(per_shard, num_whole)).astype(int)):
            yield np.asarray(tokens[edges[index] : edges[index + 1]])
