"""The documents of both splits in their final order.

The sha256 of a document's key orders the corpus, and its lowest `val_fraction` is the validation split, so that adding
documents never moves one across. Leading spaces are stripped: by the challenge's byte rule a space right after BOS is
the tokenizer's, not the text's, and a score must divide by exactly the bytes of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pgolf_post.data.documents import Document
from pgolf_post.errors import MismatchError, PgolfError

MAX_TEXT_BYTES = 4_000_000_000  # the corpus is held in memory to be ordered


@dataclass
class Corpus:
    """The documents of both splits in their final order, and counts of what was left out."""

    train: list[Document]
    val: list[Document]
    num_stripped_spaces: int = 0
    num_empty_documents: int = 0
    num_bytes: int = field(default=0, repr=False)

    @classmethod
    def split(
        cls, documents: Iterable[Document], val_documents: Iterable[Document] | None, val_fraction: float
    ) -> Corpus:
        """Split by hash of key, or as given. Raises PgolfError for an empty split, MismatchError for a shared key."""
        corpus = cls([], [])
        for document in corpus._cleaned(documents):
            is_val = val_documents is None and key_position(document.key) < val_fraction
            (corpus.val if is_val else corpus.train).append(document)
        corpus.val.extend(corpus._cleaned(val_documents or ()))
        corpus.train.sort(key=lambda document: _digest(document.key))
        corpus.val.sort(key=lambda document: _digest(document.key))
        corpus._refuse_empty_split(val_fraction)
        corpus._refuse_shared_keys()
        return corpus

    def _cleaned(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield documents without their leading spaces; count and leave out those without text."""
        for document in documents:
            text = document.text.lstrip(" ")
            self.num_stripped_spaces += len(document.text) - len(text)
            if not text:
                self.num_empty_documents += 1
                continue
            self._count_bytes(text)
            yield Document(document.key, text)

    def _count_bytes(self, text: str) -> None:
        self.num_bytes += len(text.encode("utf-8"))
        if self.num_bytes > MAX_TEXT_BYTES:
            raise PgolfError(
                f"the documents have more than {MAX_TEXT_BYTES:,} bytes of text, the most one build holds in memory",
                hint="build from fewer files at a time",
            )

    def _refuse_empty_split(self, val_fraction: float) -> None:
        if not self.train and not self.val:
            raise PgolfError("the inputs hold no text", hint="pgolf-post data build --help")
        if self.val and self.train:
            return
        documents = self.train or self.val
        keys = {document.key for document in documents}
        split = f"no document came into {'val' if self.train else 'train'}: "
        if len(keys) == 1:
            shared = f"all {len(documents)} documents have one key, {documents[0].key}, and stay together"
            raise PgolfError(
                split + (shared if len(documents) > 1 else "there is only one document, and none is cut in two"),
                hint="name validation documents with --val FILE"
                + (', or leave out "path" where it is no document\'s name' if len(documents) > 1 else ""),
            )
        enough = self._enough(documents, bool(self.train))
        raise PgolfError(
            f"{split}{len(documents)} documents were split at a validation fraction of {val_fraction}",
            hint=f"--val-fraction {enough}, or name validation documents with --val FILE",
        )

    @staticmethod
    def _enough(documents: Iterable[Document], is_val_empty: bool) -> str:
        """Return a validation fraction that leaves a document on each side."""
        positions = sorted({key_position(document.key) for document in documents})
        low, high = positions[:2] if is_val_empty else positions[-2:]
        return f"{(low + high) / 2:.6g}"

    def _refuse_shared_keys(self) -> None:
        shared = sorted({document.key for document in self.train} & {document.key for document in self.val})
        if shared:
            raise MismatchError(
                f"{len(shared)} validation documents are also in train, the first is {shared[0]}",
                hint="take them out of the training files: a score on text that was trained on means nothing",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_position(key: str) -> float:
    """Return a key's place in [0, 1), uniform over keys."""
    return int.from_bytes(_digest(key)[:6], "big") / (1 << 48)
