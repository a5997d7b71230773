"""Documents that occur more than once: within validation they are scored twice, in train too they were trained on.

They are counted by hash and said. Published data sets have a few, so they are no error.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pgolf_post.base.progress import say
from pgolf_post.data.documents import Document
from pgolf_post.data.shards import read_shard
from pgolf_post.data.tokenizer import BOS_ID


def hashes_of_texts(documents: Iterable[Document]) -> Iterator[bytes]:
    """Yield the hash of each document's text."""
    return (hashlib.sha256(document.text.encode("utf-8")).digest()[:16] for document in documents)


def hashes_of_shards(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield the hash of each document's tokens; a document may go on in the next shard."""
    current, open_document = hashlib.sha256(), False
    for path in paths:
        tokens = read_shard(path)
        edges = [0, *np.flatnonzero(tokens == BOS_ID).tolist(), len(tokens)]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            if number > 0:  # a document begins here
                if open_document:
                    yield current.digest()[:16]
                current, open_document = hashlib.sha256(), True
            if end > start:
                current.update(tokens[start:end].tobytes())
                open_document = True
    if open_document:
        yield current.digest()[:16]


def say_repeats(train: Iterable[bytes], val: Iterable[bytes]) -> dict[str, int]:
    """Say how many validation documents occur twice, or in train too; return the counts that are not zero.

    Only the hashes of validation documents are held in memory.
    """
    counts = Counter(val)
    repeated = counts.total() - len(counts)
    shared = sum(counts[key] for key in {key for key in train if key in counts})
    if repeated:
        say(f"{repeated:,} of {counts.total():,} validation documents repeat another one: their text is scored again")
    if shared:
        say(f"{shared:,} of {counts.total():,} validation documents are also in train: their score means little")
    found = {"repeated_val_documents": repeated, "val_documents_in_train": shared}
    return {name: count for name, count in found.items() if count}
