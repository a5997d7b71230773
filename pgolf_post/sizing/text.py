"""Text of a ladder whose vocabularies differ: bits per byte are comparable over the same text alone.

The recipe's own data folder says which text is scored: the first tokens of its validation split. A folder of another
vocabulary reads as many of its own tokens as cover the same bytes, to within one token and the last window, and must be
made of the same documents. Training text is counted in bytes, too, by its mean a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError


@dataclass(frozen=True)
class Text:
    """Reading of one data folder."""

    eval_tokens: int | None  # of the validation split; None: all
    token_bytes: float  # mean text of a training token; 1 where one vocabulary is all there is


@dataclass(frozen=True)
class Texts:
    """Reading of all data folders of a ladder."""

    by_folder: Mapping[str, Text]  # path → text

    def of(self, data: DataFolder) -> Text:
        """Return what a folder reads."""
        return self.by_folder[str(data.path.resolve())]


def same_text(folders: Sequence[DataFolder], eval_tokens: int | None) -> Texts:
    """Return how much each folder reads so that all score the text of the first one's `eval_tokens`.

    Raises MismatchError for a folder whose splits are not made of the same documents.
    """
    first = folders[0]
    if len(folders) == 1:
        return Texts({str(first.path.resolve()): Text(eval_tokens, 1.0)})
    for other in folders[1:]:
        _require_same_documents(first, other)
    wanted = None if eval_tokens is None else int(_text_bytes(first, eval_tokens).sum())
    return Texts({str(one.path.resolve()): Text(_tokens_for(one, wanted), _train_bytes(one)) for one in folders})


def _require_same_documents(first: DataFolder, other: DataFolder) -> None:
    for split in ("train", "val"):
        sizes = [folder.manifest["splits"].get(split, {}) for folder in (first, other)]
        for key, what in (("num_documents", "documents"), ("num_bytes", "bytes")):
            one, another = (size.get(key) for size in sizes)
            if one is None or one != another:
                raise MismatchError(
                    f"{other.path} has {another} {what} in its {split} split, {first.path} has {one}: bits per byte of "
                    "different texts do not compare",
                    hint="build both from the same documents: pgolf-post data build --tokenizer MODEL",
                )


def _tokens_for(folder: DataFolder, num_bytes: int | None) -> int | None:
    """Return the number of validation tokens that cover a number of bytes."""
    if num_bytes is None:
        return None
    ends = np.cumsum(_text_bytes(folder, None))
    return int(np.searchsorted(ends, num_bytes)) + 1


def _text_bytes(folder: DataFolder, tokens: int | None) -> np.ndarray:  # (tokens,) int64
    return folder.token_bytes("val", folder.tokens("val", tokens))


def _train_bytes(folder: DataFolder) -> float:
    split = folder.manifest["splits"]["train"]
    return float(split["num_bytes"]) / float(split["num_tokens"])
