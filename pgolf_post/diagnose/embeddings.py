"""The rows of the token table: how long they are by class of token, and which of them are nearly the same.

With a tied head a row's norm is also how readily its token is predicted, so a class with short rows starts behind. Two
rows in one direction are two tokens that the model cannot tell apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.diagnose.numbers import Number, number
from pgolf_post.score.breakdown.token_text import CLASSES, TokenText

NEAR = 0.9  # cosine from which a row counts as a duplicate
ROWS_AT_ONCE = 1024
ROLE = "embedding"


def embedding_numbers(name: str, table: Tensor, tokenizer: Any | None) -> list[Number]:  # table: (vocab_size, width)
    """Return the numbers of the token table; by class and with the pieces' text where a tokenizer is given."""
    rows = torch.nn.functional.normalize(table.float(), dim=1)
    cosines, nearest = nearest_rows(rows)
    first = int(cosines.argmax())
    pair = sorted((first, int(nearest[first])))
    note = "" if tokenizer is None else " and ".join(repr(tokenizer.id_to_piece(token)) for token in pair)
    numbers = [
        number("nearest_row_cosine", name, float(cosines.max()), at=pair[0], note=note, role=ROLE),
        number("duplicate_rows", name, float((cosines > NEAR).sum()), role=ROLE),
    ]
    return numbers + (
        [] if tokenizer is None else _by_class(name, table, rows, TokenText.from_tokenizer(tokenizer).token_class)
    )


def nearest_rows(rows: Tensor) -> tuple[Tensor, Tensor]:  # (n, width) of norm 1 → (n,) cosines, (n,) int64
    """Return for each row the largest cosine with another row, and which; rows of zeros have cosine 0."""
    cosines, nearest = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE] @ rows.T
        own = torch.arange(len(part))
        part[own, own + start] = -2.0  # not itself
        best = part.max(dim=1)
        cosines.append(best.values)
        nearest.append(best.indices)
    return torch.cat(cosines), torch.cat(nearest)


def _by_class(name: str, table: Tensor, rows: Tensor, classes: np.ndarray) -> list[Number]:
    norms = table.double().norm(dim=1)
    means: dict[str, float] = {}
    numbers: list[Number] = []
    for index, kind in enumerate(CLASSES):
        chosen = torch.from_numpy(classes == index)
        if chosen.any():
            means[kind] = float(norms[chosen].mean())
            count = f"{int(chosen.sum()):,} rows"
            numbers.append(number("class_norm", f"{name} ({kind})", means[kind], role=ROLE, note=count))
        if kind == "byte fallback" and int(chosen.sum()) > 1:
            numbers.append(number("byte_row_cosine", name, mean_cosine(rows[chosen]), role=ROLE))
    if means.get("word start") and means.get("continuation"):
        ratio = means["word start"] / means["continuation"]
        numbers.append(number("word_start_norm_ratio", name, ratio, role=ROLE))
    return numbers


def mean_cosine(rows: Tensor) -> float:  # (n, width) of norm 1, n > 1
    """Return the mean cosine over all pairs of different rows."""
    total = float(rows.double().sum(dim=0).square().sum()) - float(rows.double().square().sum())
    return total / (len(rows) * (len(rows) - 1))
