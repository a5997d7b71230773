"""Tensors with one row per token: a tied head that was saved twice, and rows that only pad the vocabulary.

A module that ties its head by `lm_head.weight = tok_emb.weight` saves both names. Scripts pad the vocabulary to a
multiple of 64 for the hardware; those rows belong to no token, but the script's softmax counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pgolf_post.checkpoint import ViewName
from pgolf_post.errors import MismatchError

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"
ROW_PER_TOKEN = (EMBEDDING, HEAD, "value_embed.embed.weight")
MULTIPLE = 64  # to which scripts pad
MAX_PADDING = 256  # rows: more than any script pads by; another tokenizer's model has thousands
Views = dict[ViewName, dict[str, Tensor]]


def retie(views: Views, given: Mapping[str, Any]) -> tuple[Views, list[str]]:
    """Return views without a head that equals the embedding in all of them, and notes on it.

    A head stated to be untied stays. Raises MismatchError if it is stated to be tied and differs.
    """
    both = {name: tensors for name, tensors in views.items() if HEAD in tensors and EMBEDDING in tensors}
    if not both:  # an average made from named_parameters() has a tied head once, under the embedding's name
        return views, []
    differing = {name: text for name, tensors in both.items() if (text := _difference(tensors))}
    stated = given.get("tie_embeddings")
    if differing and stated is True:
        where = "; ".join(f"{name} weights: {text}" for name, text in differing.items())
        raise MismatchError(
            f"tie_embeddings is given as true, but {HEAD} is not {EMBEDDING}: {where}",
            hint="leave tie_embeddings out, or give --set tie_embeddings=false",
        )
    if differing and len(differing) < len(both):
        return views, [
            f"{HEAD} equals {EMBEDDING} in some weights only, so both are kept: {'; '.join(differing)} differ"
        ]
    if differing or stated is False:
        return views, []
    tied: Views = {name: {k: t for k, t in tensors.items() if k != HEAD} for name, tensors in views.items()}
    return tied, [f"{HEAD} equals {EMBEDDING} in every element: tied again (--set tie_embeddings=false keeps both)"]


def _difference(tensors: Mapping[str, Tensor]) -> str:
    """Return how a head differs from the embedding; nothing if their values are the same."""
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.shape != embedding.shape:
        return f"shapes {tuple(head.shape)} and {tuple(embedding.shape)}"
    distance = (head.double() - embedding.double()).abs()
    count = int((distance > 0).sum())
    return f"{count:,} of {distance.numel():,} elements differ, by up to {float(distance.max()):.3g}" if count else ""


def fit_vocabulary(views: Views, vocab_size: int, trim: bool, source: str, data: str) -> tuple[Views, list[str]]:
    """Return views with one row per token of the data's vocabulary; rows beyond it are cut off only if `trim`.

    The logits of all tokens stay as they are. Raises MismatchError for another vocabulary than the data's.
    """
    rows = views["raw"][EMBEDDING].size(0)
    extra = rows - vocab_size
    if extra == 0:
        return views, [f"--trim-vocab: nothing to trim, the vocabulary has {rows} rows"] if trim else []
    message = f"{source} has a vocabulary of {rows} (rows of {EMBEDDING}), {data} of {vocab_size}"
    if extra < 0 or extra > MAX_PADDING:
        raise MismatchError(message, hint="give the data folder with the model's own tokenizer: --data")
    if not trim:
        padded = f", padded to a multiple of {MULTIPLE}" if rows % MULTIPLE == 0 else ""
        raise MismatchError(
            f"{message}: {extra} rows more than tokens{padded}; {_outline(views['raw'][EMBEDDING][vocab_size:])}",
            hint="if they are padding: the same command with --trim-vocab; if not, give the model's own data folder",
        )
    trimmed: Views = {}
    for view, tensors in views.items():
        trimmed[view] = dict(tensors)
        for name in ROW_PER_TOKEN:
            if name in tensors:
                trimmed[view][name] = _first_rows(tensors[name], rows, vocab_size, name, source)
    note = f"vocabulary trimmed from {rows} rows to {vocab_size}: the {extra} others belong to no token"
    return trimmed, [f"{note}. The logits of all tokens are unchanged; a softmax over {rows} would also count the rest"]


def _first_rows(tensor: Tensor, rows: int, vocab_size: int, name: str, source: str) -> Tensor:
    if tensor.size(0) != rows:
        raise MismatchError(f"{source}: {name} has {tensor.size(0)} rows, {EMBEDDING} has {rows}")
    return tensor[:vocab_size].clone()


def _outline(rows: Tensor) -> str:
    """Return what rows look like: untrained ones are zero, or all alike."""
    if not torch.count_nonzero(rows):
        return "all of them zero"
    return f"their largest value is {float(rows.abs().max()):.3g}"
