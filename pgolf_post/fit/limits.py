"""Budgets that make no sense: under one bit per weight, or more than all weights take in fp16.

The second is known from a checkpoint's shapes alone, so it is said before statistics are collected, which take minutes.
"""

from __future__ import annotations

from pgolf_post.base.progress import say
from pgolf_post.checkpoint import View
from pgolf_post.errors import OverBudgetError, SettingsError
from pgolf_post.fit.build import Builder, rounded_names
from pgolf_post.quantize.rows import as_matrix

MOST_BITS = 8  # of a weight, where matrices of zeros leave more bytes than the others need
FLOAT_SHARE = 0.85  # of a float's bytes, compressed
EXPONENT_BYTES = 0.6  # of a row's or column's exponent, compressed
MANIFEST_BYTES = 1500


def fixed_bytes(builder: Builder) -> int:
    """Return about what everything but symbols takes: floats, exponents and the manifest."""
    floats = sum(array.nbytes for array in builder.passthrough.values())
    exponents = sum(len(matrix.steps.rows) + len(matrix.steps.columns) for matrix in builder.matrices.values())
    return round(FLOAT_SHARE * floats + EXPONENT_BYTES * exponents + MANIFEST_BYTES)


def require_solvable(builder: Builder, limit: int) -> None:
    """Raise for budgets under one bit per weight, and for those that hold every weight in fp16."""
    least = builder.num_weights // 8 + fixed_bytes(builder)
    if limit < least:
        raise OverBudgetError(
            f"{limit:,} bytes for the artifact are less than one bit for each of {builder.num_weights:,} weights; "
            f"the least is about {least:,}",
            hint=f"raise --budget by {least - limit:,} bytes",
        )
    num_weights = builder.num_weights + sum(tensor.symbols.size for tensor in builder.zeros.values())
    _require_less(limit, num_weights, 2 * num_weights + fixed_bytes(builder))


def require_less_than_fp16(view: View, limit: int) -> None:
    """Raise SettingsError for a limit that no artifact of a view fills, from its shapes: its floats are not rounded.

    Cheap. A limit that passes may still be refused by `require_solvable`, if some matrices are stored as zeros.
    """
    names = rounded_names(view)
    matrices = [as_matrix(view.tensors[name]) for name in names]
    num_weights = sum(matrix.numel() for matrix in matrices)
    floats = 4 * sum(tensor.numel() for name, tensor in view.tensors.items() if name not in names)
    fixed = FLOAT_SHARE * floats + EXPONENT_BYTES * sum(sum(matrix.shape) for matrix in matrices) + MANIFEST_BYTES
    _require_less(limit, num_weights, round(2 * num_weights + fixed))


def _require_less(limit: int, num_weights: int, most: int) -> None:
    if limit >= most:
        raise SettingsError(
            f"{limit:,} bytes hold all {num_weights:,} weights in fp16 ({most:,}): there is nothing to solve",
            hint=f"lower --budget by more than {limit - most:,} bytes, or train a larger model",
        )


def useful_bytes(builder: Builder, limit: int) -> int:
    """Return the bytes to fill: the limit, or less where most matrices are zeros and the others cannot use it."""
    most = builder.num_weights * MOST_BITS // 8 + fixed_bytes(builder)
    if not builder.zeros or limit <= most:
        return limit
    say(
        f"{limit - most:,} bytes are left over: {len(builder.zeros)} matrices are stored as zeros, and "
        f"{MOST_BITS} bits for each of the other {builder.num_weights:,} weights take {most:,}"
    )
    return most
