"""Contexts: how large the next symbol will be, predicted from symbols and factors that the decoder has already read.

A symbol n is about as large as its column's earlier ones, as the other symbols of its row, and as its step is small.
The last two are one integer, the *context shift* s of the symbol, in eighths of an octave:

    s = row shift - sum of the integer factors of its weight, modulo 128

The row shift is stored (row_shifts.py); the factors are read before the symbols. The modulus makes what all factors of
a tensor have in common cost nothing. Each column keeps a running integer mean, over 128 rows, of |2n + z| / 2^(s/8),
where z is the trellis bit (0 without a trellis). Then

    level = 8·log2(mean) + s

predicts the next magnitude, in eighths of an octave. Level and trellis bit select the frequency table of the symbol
(frequency_tables.py). Everything is integer arithmetic, the same on every machine.

Older artifacts hold blocks of two other kinds, QUICK and STEADY. Both ignore the factors and average over fewer rows;
QUICK takes differences from the row before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pgolf_post.base.numba import use_compiled
from pgolf_post.pack.decode import MANTISSAS, RANS
from pgolf_post.quantize.gptq.trellis import Trellis, first_bits, next_states

LEVELS = 256
ENTRIES = 256  # of a histogram: the escape, then -127 .. 127
CENTRE = 128
FLAT_SHIFT = 64  # a row shift of 0 as stored
DIFFERENCE = 128  # flag in a stored row shift: the row is coded as the difference from another
FIRST_MEAN = 1024  # of every column, before its first symbol
QUICK, STEADY, INFORMED = RANS  # kinds of block, by codec id

_eighths = np.arange(128)
LOG = np.searchsorted(MANTISSAS[_eighths & 7] << (_eighths >> 3) >> 8, np.arange(1 << 16), "right").astype(np.uint8)
SHRINK = (MANTISSAS[-_eighths & 7] << 8 >> (8 - ((64 - _eighths) >> 3))).astype(np.int64)


@dataclass(frozen=True)
class Block:
    """Tensors of one role, shape and trellis, side by side, which the coder walks through row by row."""

    symbols: np.ndarray  # (rows, tensors·columns) int8 or int16
    columns: int
    trellis: Trellis | None
    steps: np.ndarray  # like symbols, int16: sums of integer factors, eighths of an octave
    row_shifts: np.ndarray  # (tensors, rows) uint8: eighths of an octave + 64; bit 7: the row is coded as a difference
    residuals: np.ndarray  # like symbols: the symbols, less another row where bit 7 says so
    kind: int
    odds: np.ndarray | None = None  # like symbols, uint8: bits of a trellis along diagonals, which runs across columns

    def picked(self, rows: slice = slice(None), columns: slice = slice(None)) -> Block:
        """Return some rows, or some columns of a block of one tensor."""
        symbols, steps, residuals = (array[rows, columns] for array in (self.symbols, self.steps, self.residuals))
        odds = None if self.odds is None else self.odds[rows, columns]
        picked = replace(self, symbols=symbols, steps=steps, residuals=residuals, odds=odds)
        width = self.columns if columns == slice(None) else symbols.shape[1]
        return replace(picked, columns=width, row_shifts=self.row_shifts[:, rows])

    @property
    def num_symbols(self) -> int:
        return int(self.symbols.size)

    def context_shifts(self, row: int) -> np.ndarray:  # (tensors·columns,) int32, 0 to 127
        """Return the shift of each symbol of a row, as the decoder knows it: eighths of an octave + 64."""
        stored = (self.row_shifts[:, row] & 127).astype(np.int32).repeat(self.columns)
        known: np.ndarray = stored - self.steps[row] & 127 if self.kind == INFORMED else stored
        return known


def make_block(
    matrices: Sequence[np.ndarray],  # each (rows, columns)
    trellis: Trellis | None,
    steps: Sequence[np.ndarray] = (),  # each (rows, columns) int16: eighths of an octave
) -> Block:
    """Return equal-shaped matrices as one block, all row shifts 0."""
    symbols = np.concatenate(matrices, axis=1)
    known = steps or [np.zeros(symbols.shape, np.int16)]
    row_shifts = np.full((len(matrices), len(symbols)), FLAT_SHIFT, np.uint8)
    columns = matrices[0].shape[1]
    odds = first_bits(symbols, trellis, columns) if trellis and trellis.diagonal else None
    return Block(symbols, columns, trellis, np.concatenate(known, axis=1), row_shifts, symbols, INFORMED, odds)


def side_by_side(blocks: Sequence[Block]) -> Block:
    """Return blocks of one shape and trellis as one block."""
    symbols, steps, residuals = (
        np.concatenate([getattr(block, name) for block in blocks], axis=1) for name in ("symbols", "steps", "residuals")
    )
    row_shifts = np.concatenate([block.row_shifts for block in blocks])
    known = [block.odds for block in blocks if block.odds is not None]
    odds = np.concatenate(known, axis=1) if known else None
    return replace(blocks[0], symbols=symbols, steps=steps, residuals=residuals, row_shifts=row_shifts, odds=odds)


def levels_of(block: Block, compiled: bool | None = None) -> tuple[np.ndarray, np.ndarray]:  # (rows, width) uint8 each
    """Return the level that predicts each symbol, and its trellis bit."""
    levels = np.empty(block.symbols.shape, np.uint8)
    odds = np.zeros(block.symbols.shape, np.uint8) if block.odds is None else np.ascontiguousarray(block.odds)
    walks = block.trellis is not None and not block.trellis.diagonal
    table = next_states(block.trellis.states).ravel() if block.trellis and walks else np.zeros(0, np.uint8)
    means = np.full(block.symbols.shape[1], FIRST_MEAN, np.int32)
    if block.num_symbols:
        (_walk_compiled if use_compiled(compiled) else _walk)(block, table, means, levels, odds)
    return levels, odds


def _update_shifts(block: Block) -> np.ndarray:  # (rows,) int64
    """Return the right shift applied to each row's update of the running means; smaller for early rows."""
    largest, first, _ = RANS[block.kind]
    return np.array([min(largest, (row + first).bit_length() - 1) for row in range(len(block.symbols))], np.int64)


def _walk_compiled(block: Block, table: np.ndarray, means: np.ndarray, levels: np.ndarray, odds: np.ndarray) -> None:
    from pgolf_post.pack.coder import kernels

    known = (block.residuals, block.symbols, block.row_shifts, block.steps, block.kind == INFORMED)
    lane_rows = block.trellis.lane_rows if block.trellis and len(table) else 1
    kernels.walk(*known, _update_shifts(block), RANS[block.kind][2], LOG, SHRINK, means, table, lane_rows, levels, odds)


def _walk(block: Block, table: np.ndarray, means: np.ndarray, levels: np.ndarray, odds: np.ndarray) -> None:
    half, state = RANS[block.kind][2], np.zeros(len(means), np.uint8)
    for row, update_shift in enumerate(_update_shifts(block)):
        # what the means predict for this row
        context_shifts = block.context_shifts(row)
        np.add(LOG[means], context_shifts, out=levels[row], casting="unsafe")

        # the trellis bit of each symbol, and the state that the symbol leads to
        if block.trellis is not None and len(table):
            if row % block.trellis.lane_rows == 0:
                state[:] = 0
            odds[row] = state & 1
            state = table[2 * state.astype(np.int32) + (block.symbols[row] & 1)]

        # the row's magnitudes, less their shifts, move the means
        sizes = 2 * block.residuals[row].astype(np.int32) + odds[row]
        sizes = np.minimum(np.abs(sizes) * SHRINK[context_shifts], 65535).astype(np.int32)
        means += (sizes - means + half) >> update_shift


def histogram(block: Block, levels: np.ndarray, odds: np.ndarray) -> np.ndarray:  # (LEVELS, 2, ENTRIES) int64
    """Count how often each symbol follows each level and trellis bit."""
    counts = np.zeros(LEVELS * 2 * ENTRIES, np.int64)
    step = max(1, (1 << 20) // max(1, block.symbols.shape[1]))
    for row in range(0, len(levels), step):
        here = slice(row, row + step)
        where = (
            (levels[here].astype(np.int32) << 9)
            + (odds[here].astype(np.int32) << 8)
            + entries_of(block.residuals[here])
        )
        counts += np.bincount(where.ravel(), minlength=len(counts))
    return counts.reshape(LEVELS, 2, ENTRIES)


def histogram_of(blocks: Sequence[Block], walks: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the histogram of one role, from the levels and trellis bits of its blocks."""
    counts = np.zeros((LEVELS, 2, ENTRIES), np.int64)
    for block, walk in zip(blocks, walks, strict=True):
        counts += histogram(block, *walk)
    return counts


def entries_of(symbols: np.ndarray) -> np.ndarray:  # int8 or int16 → int32
    """Return the histogram entry of each symbol; 0 is the escape."""
    entries = symbols.astype(np.int32) + CENTRE
    if symbols.dtype != np.int8:
        entries[(entries < 1) | (entries >= ENTRIES)] = 0
    return entries
