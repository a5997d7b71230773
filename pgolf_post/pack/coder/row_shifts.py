"""Row shifts: how large the symbols of a row are, stored before them where that makes the artifact smaller.

A role has one shift for all its rows where that is enough, else one per row, with no more precision than pays for its
bits. Rows that nearly repeat another, such as the embeddings of tokens that never occur, form a chain: each is coded as
the difference from the previous row of the chain, and contexts are then about the differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pgolf_post.pack.coder.contexts import DIFFERENCE, FIRST_MEAN, FLAT_SHIFT, QUICK, Block, histogram_of, levels_of
from pgolf_post.pack.coder.frequency_tables import classes_of, entropy, group_cost

CLOSE = 0.8  # a difference of less than this share of the row's own mean magnitude is coded instead of the row
CHANCE = 0.755  # standard deviation of a Gaussian's magnitudes, relative to their mean
SAMPLE_SYMBOLS = 1 << 20  # of a role, on which one shift and shifts per row are compared
ROUNDS, LOST_BITS = 12, 0.005  # a shift wrong by x eighths costs LOST_BITS·x² bits per symbol


def with_row_shifts(blocks: Sequence[Block]) -> list[Block]:
    """Return one role's blocks with one shift or one per row, whichever is smaller on a sample of rows."""
    chained = [with_chain(with_residuals(block)) for block in blocks]
    shifted = [[shift(block) for block in chained] for shift in (with_one_shift, with_shift_per_row)]
    return min(shifted, key=_sample_bits)


def with_residuals(block: Block) -> Block:
    """Return the block with a flag on each row that is close to the one before it."""
    if len(block.symbols) < 2 or block.symbols.shape[1] == 0:
        return block
    steps = block.symbols.astype(np.int32)
    steps[1:] -= block.symbols[:-1]
    alike = mean_sizes(steps, block.columns) < CLOSE * mean_sizes(block.symbols, block.columns)  # (tensors, rows)
    alike[:, 0] = False
    return replace(block, row_shifts=block.row_shifts | (alike * DIFFERENCE).astype(np.uint8))


def with_stored_residuals(block: Block) -> Block:
    """Return the block with the residuals that the flags in its row shifts ask for."""
    alike = block.row_shifts >= DIFFERENCE  # (tensors, rows)
    if not alike.any():
        return block
    residuals = block.symbols.astype(np.int32)
    for tensor, flags in enumerate(alike):
        # the row that each row would be the difference from: the last flagged one before it; QUICK: the one before it
        others = np.arange(-1, len(flags) - 1)
        if block.kind != QUICK:
            last = np.maximum.accumulate(np.where(flags, np.arange(len(flags)), -1))
            others = np.concatenate([[-1], last[:-1]])

        # subtract it within the tensor's columns; the first flagged row stays as it is
        rows = np.flatnonzero(flags & (others >= 0))
        columns = slice(tensor * block.columns, (tensor + 1) * block.columns)
        residuals[rows, columns] -= block.symbols[others[rows], columns]
    return replace(block, residuals=residuals)


def with_chain(block: Block) -> Block:
    """Return the block with flags on every row near those flagged now, wherever it stands, and with residuals."""
    alike = block.row_shifts >= DIFFERENCE  # (tensors, rows)
    chained = np.zeros_like(alike)
    for tensor, flags in enumerate(alike):
        if flags.any():
            # rows closer to the median of the flagged rows than to zero join the chain
            symbols = block.symbols[:, tensor * block.columns : (tensor + 1) * block.columns].astype(np.int32)
            away = symbols - np.rint(np.median(symbols[flags], axis=0)).astype(np.int32)
            chained[tensor] = mean_sizes(away, block.columns)[0] < CLOSE * mean_sizes(symbols, block.columns)[0]

    # the old flags give way to the chain's, and residuals are taken from the symbols again
    row_shifts = (block.row_shifts & 127) | (chained * DIFFERENCE).astype(np.uint8)
    return with_stored_residuals(replace(block, row_shifts=row_shifts, residuals=block.symbols))


def mean_sizes(symbols: np.ndarray, columns: int) -> np.ndarray:  # (rows, tensors·columns) → (tensors, rows)
    """Return the mean |symbol| of each row of each tensor."""
    parts = np.abs(symbols).reshape(len(symbols), -1, columns)
    means: np.ndarray = parts.mean(axis=2, dtype=np.float64).T
    return means


def with_shift_per_row(block: Block) -> Block:
    """Return the block with a shift per row, from as few different values as is cheapest.

    Each round moves every row to the value of least cost: bits lost by a wrong shift, plus bits to store the value.
    """
    if block.row_shifts.size == 0:
        return block
    wanted = _eighths_of(_row_means(block))
    eighths = np.rint(wanted)
    for _ in range(ROUNDS):
        values, counts = np.unique(eighths, return_counts=True)
        bits = np.log2(eighths.size / counts)
        lost = LOST_BITS * block.columns * (wanted.ravel()[:, None] - values) ** 2
        eighths = values[np.argmin(lost + bits, axis=1)].reshape(wanted.shape)
    return _with_shifts(block, eighths)


def with_one_shift(block: Block) -> Block:
    """Return the block with one shift for all rows coded as they are, and one for all coded as differences."""
    means, alike = _row_means(block), block.row_shifts >= DIFFERENCE
    both = [_eighths_of(means[kind].mean() if kind.any() else 0.0) for kind in (alike, ~alike)]
    return _with_shifts(block, np.rint(np.where(alike, *both)))


def has_even_rows(block: Block) -> bool:
    """Return whether the rows' mean magnitudes differ no more than those of one Gaussian would by chance."""
    chance = 8 * np.log2(np.e) * CHANCE / np.sqrt(max(1, block.columns))
    spread = _eighths_of(_row_means(block)).std() if block.row_shifts.size else 0.0
    return bool(spread < 1.3 * chance and not (block.row_shifts >= DIFFERENCE).any())


def _row_means(block: Block) -> np.ndarray:  # (tensors, rows)
    """Return the mean magnitude of each row; where steps are known, what it would be at equal steps."""
    if block.symbols.size == 0:
        return np.zeros(block.row_shifts.shape)
    if not block.steps.any():
        return mean_sizes(block.residuals, block.columns)
    relative = block.steps - _offsets(block)[0].astype(np.int16).repeat(block.columns)
    return mean_sizes(block.residuals * np.exp2(relative / np.float32(8)), block.columns)


def _offsets(block: Block) -> np.ndarray:  # (1, tensors) int64
    """Return the common part of each tensor's steps, in multiples of 64 eighths.

    Without it, small differences between the steps of tensors would give their rows different shifts.
    """
    if block.symbols.size == 0:
        return np.zeros((1, len(block.row_shifts)), np.int64)
    offsets: np.ndarray = 64 * np.rint(block.steps[:1, :: block.columns] / 64).astype(np.int64)
    return offsets


def _eighths_of(means: np.ndarray | float) -> np.ndarray:
    """Return 8·log2 of twice the mean magnitude, relative to FIRST_MEAN."""
    return 8 * np.log2(np.maximum(means, 2.0**-7) * 512 / FIRST_MEAN)


def _with_shifts(block: Block, eighths: np.ndarray) -> Block:  # eighths: (tensors, rows)
    row_shifts = np.clip(eighths + FLAT_SHIFT, 0, 127).astype(np.int64) + _offsets(block).T & 127
    return replace(block, row_shifts=row_shifts.astype(np.uint8) | (block.row_shifts & DIFFERENCE))


def _sample_bits(blocks: Sequence[Block]) -> float:
    """Return the bits of all symbols, tables and row shifts included, extrapolated from every `step`-th row."""
    num_symbols = sum(block.num_symbols for block in blocks)
    step = 1 + num_symbols // SAMPLE_SYMBOLS
    sample = [block.picked(rows=slice(None, None, step)) for block in blocks]
    counts = histogram_of(sample, [levels_of(block) for block in sample])
    sampled = sum(block.num_symbols for block in sample)
    row_shifts = np.concatenate([block.row_shifts.ravel() for block in blocks])
    tables = group_cost(counts, classes_of(counts))
    return tables * num_symbols / max(1, sampled) + len(row_shifts) * entropy(np.bincount(row_shifts))
