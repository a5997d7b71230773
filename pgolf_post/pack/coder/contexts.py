"""What the entropy coder knows before it reads a symbol: integers made of symbols that the decoder has already.

A symbol n is about as large as its column's earlier ones, as the other symbols of its row, and as its step is small.
Each symbol has a *scale* in eighths of an octave: its row's stored one (row_scales.py) less the integer factors of its
weight, which the decoder has read before (modulo 128, so that what a tensor's factors have in common costs nothing).
Each column keeps a running integer mean, over 128 rows, of the magnitudes |2n + z| (z is the trellis bit, 0 without a
trellis), every one divided by its scale. Then

    level = log2(mean) + scale, in eighths of an octave

predicts the next magnitude; level and trellis bit say which table the symbol is coded by (frequency_tables.py).
Artifacts of two older kinds, QUICK and STEADY, ignore factors and have means of other lengths; QUICK takes differences
from the row before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pgolf_post.base.numba import use_compiled
from pgolf_post.pack.decode import MANTISSAS, RANS
from pgolf_post.quantize.gptq.trellis import Trellis, next_states

LEVELS = 256
ENTRIES = 256  # of a histogram: the escape, then -127 .. 127
CENTRE = 128
FLAT_SCALE = 64  # scale 0 as stored
DIFFERENCE = 128  # flag of a row that is coded as the difference from another
FIRST_MEAN = 1024
QUICK, STEADY, INFORMED = RANS  # kinds of block, by codec id

_eighths = np.arange(128)
LOG = np.searchsorted(MANTISSAS[_eighths & 7] << (_eighths >> 3) >> 8, np.arange(1 << 16), "right").astype(np.uint8)
SHRINK = (MANTISSAS[-_eighths & 7] << 8 >> (8 - ((64 - _eighths) >> 3))).astype(np.int64)


@dataclass(frozen=True)
class Block:
    """Tensors of one role, shape and trellis, side by side: what the coder walks through row by row."""

    symbols: np.ndarray  # (rows, tensors·columns) int8 or int16
    columns: int
    trellis: Trellis | None
    steps: np.ndarray  # like symbols, int16: sums of integer factors, eighths of an octave
    scales: np.ndarray  # (tensors, rows) uint8: eighths of an octave + 64; bit 7: the row is coded as a difference
    residuals: np.ndarray  # like symbols, less another row where that is so
    kind: int

    @property
    def num_symbols(self) -> int:
        return int(self.symbols.size)

    def scale_of(self, row: int) -> np.ndarray:  # (tensors·columns,) int32, 0 to 127
        """By what the magnitudes of a row are divided, as the decoder knows it: eighths of an octave + 64."""
        stored = (self.scales[:, row] & 127).astype(np.int32).repeat(self.columns)
        known: np.ndarray = stored - self.steps[row] & 127 if self.kind == INFORMED else stored
        return known


def make_block(
    matrices: Sequence[np.ndarray],  # each (rows, columns)
    trellis: Trellis | None,
    steps: Sequence[np.ndarray] = (),  # each (rows, columns) int16: eighths of an octave
) -> Block:
    """Equal-shaped matrices as a block, rows not yet scaled."""
    symbols = np.concatenate(matrices, axis=1)
    known = steps or [np.zeros(symbols.shape, np.int16)]
    scales = np.full((len(matrices), len(symbols)), FLAT_SCALE, np.uint8)
    return Block(symbols, matrices[0].shape[1], trellis, np.concatenate(known, axis=1), scales, symbols, INFORMED)


def side_by_side(blocks: Sequence[Block]) -> Block:
    """Blocks of one shape and trellis as one."""
    symbols, steps, residuals = (
        np.concatenate([getattr(block, name) for block in blocks], axis=1) for name in ("symbols", "steps", "residuals")
    )
    scales = np.concatenate([block.scales for block in blocks])
    return replace(blocks[0], symbols=symbols, steps=steps, residuals=residuals, scales=scales)


def levels_of(block: Block, compiled: bool | None = None) -> tuple[np.ndarray, np.ndarray]:  # (rows, width) uint8 each
    """The level that predicts each symbol, and its trellis bit."""
    levels, odds = np.empty(block.symbols.shape, np.uint8), np.zeros(block.symbols.shape, np.uint8)
    table = next_states(block.trellis.states).ravel() if block.trellis else np.zeros(0, np.uint8)
    means = np.full(block.symbols.shape[1], FIRST_MEAN, np.int32)
    if block.num_symbols:
        (_walk_compiled if use_compiled(compiled) else _walk)(block, table, means, levels, odds)
    return levels, odds


def _shifts(block: Block) -> np.ndarray:  # (rows,) int64
    """By how many bits each row's news are divided before they move the means: short at first."""
    shift, first, _ = RANS[block.kind]
    return np.array([min(shift, (row + first).bit_length() - 1) for row in range(len(block.symbols))], np.int64)


def _walk_compiled(block: Block, table: np.ndarray, means: np.ndarray, levels: np.ndarray, odds: np.ndarray) -> None:
    from pgolf_post.pack.coder import kernels

    known = (block.residuals, block.symbols, block.scales, block.steps, block.kind == INFORMED)
    lane_rows = block.trellis.lane_rows if block.trellis else 1
    kernels.walk(*known, _shifts(block), RANS[block.kind][2], LOG, SHRINK, means, table, lane_rows, levels, odds)


def _walk(block: Block, table: np.ndarray, means: np.ndarray, levels: np.ndarray, odds: np.ndarray) -> None:
    half, state = RANS[block.kind][2], np.zeros(len(means), np.uint8)
    for row, shift in enumerate(_shifts(block)):
        scale = block.scale_of(row)
        np.add(LOG[means], scale, out=levels[row], casting="unsafe")
        sizes = 2 * block.residuals[row].astype(np.int32)
        if block.trellis is not None:
            if row % block.trellis.lane_rows == 0:
                state[:] = 0
            odds[row] = state & 1
            sizes += odds[row]
            state = table[2 * state.astype(np.int32) + (block.symbols[row] & 1)]
        sizes = np.minimum(np.abs(sizes) * SHRINK[scale], 65535).astype(np.int32)
        means += (sizes - means + half) >> shift


def histogram(block: Block, levels: np.ndarray, odds: np.ndarray) -> np.ndarray:  # (LEVELS, 2, ENTRIES) int64
    """How often each symbol follows each level and trellis bit."""
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
    """The histogram of one role, from its blocks' levels and trellis bits."""
    counts = np.zeros((LEVELS, 2, ENTRIES), np.int64)
    for block, walk in zip(blocks, walks, strict=True):
        counts += histogram(block, *walk)
    return counts


def entries_of(symbols: np.ndarray) -> np.ndarray:  # int8 or int16 → int32
    """The histogram entry of each symbol: 0 is the escape."""
    entries = symbols.astype(np.int32) + CENTRE
    if symbols.dtype != np.int8:
        entries[(entries < 1) | (entries >= ENTRIES)] = 0
    return entries
