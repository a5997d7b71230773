"""Row scales: what an artifact says of a row before its symbols, where saying it pays.

Stored scales are one for a whole role where that is enough, or one per row where they pay, no more precise than they
pay. Rows that nearly repeat another, as the embeddings of tokens that never occur do, are coded as the difference from
the last row that was coded so, and the rest is about the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pgolf_post.pack.coder.contexts import DIFFERENCE, FIRST_MEAN, FLAT_SCALE, QUICK, Block, histogram_of, levels_of
from pgolf_post.pack.coder.frequency_tables import classes_of, entropy, group_cost

CLOSE = 0.8  # mean size of that difference, relative to the row's own, below which it is
CHANCE = 0.755  # standard deviation of a Gaussian's magnitudes, relative to their mean
SAMPLE_SYMBOLS = 1 << 20  # on which row scales are tried
ROUNDS, LOST_BITS = 12, 0.005  # a scale wrong by x eighths costs LOST_BITS·x² bits per symbol


def with_scales(blocks: Sequence[Block]) -> list[Block]:
    """One role's blocks with the row scales that make it smaller, judged on a sample of rows."""
    chained = [with_chain(with_residuals(block)) for block in blocks]
    scaled = [[scale(block) for block in chained] for scale in (with_one_scale, with_row_scales)]
    return min(scaled, key=_sample_bits)


def with_residuals(block: Block) -> Block:
    """The block with rows that are close to the one before, as unused tokens' embeddings are, coded as differences."""
    if len(block.symbols) < 2 or block.symbols.shape[1] == 0:
        return block
    steps = block.symbols.astype(np.int32)
    steps[1:] -= block.symbols[:-1]
    alike = mean_sizes(steps, block.columns) < CLOSE * mean_sizes(block.symbols, block.columns)  # (tensors, rows)
    alike[:, 0] = False
    return replace(block, scales=block.scales | (alike * DIFFERENCE).astype(np.uint8))


def with_stored_residuals(block: Block) -> Block:
    """The block with the residuals that its scales' flags say."""
    alike = block.scales >= DIFFERENCE  # (tensors, rows)
    if not alike.any():
        return block
    residuals = block.symbols.astype(np.int32)
    for tensor, flags in enumerate(alike):
        others = np.arange(-1, len(flags) - 1)
        if block.kind != QUICK:
            last = np.maximum.accumulate(np.where(flags, np.arange(len(flags)), -1))
            others = np.concatenate([[-1], last[:-1]])
        rows = np.flatnonzero(flags & (others >= 0))
        columns = slice(tensor * block.columns, (tensor + 1) * block.columns)
        residuals[rows, columns] -= block.symbols[others[rows], columns]
    return replace(block, residuals=residuals)


def with_chain(block: Block) -> Block:
    """The block with rows near those that repeat the one before, wherever they are, as a chain; steady."""
    alike = block.scales >= DIFFERENCE
    chained = np.zeros_like(alike)
    for tensor, flags in enumerate(alike):
        if flags.any():
            symbols = block.symbols[:, tensor * block.columns : (tensor + 1) * block.columns].astype(np.int32)
            away = symbols - np.rint(np.median(symbols[flags], axis=0)).astype(np.int32)
            chained[tensor] = mean_sizes(away, block.columns)[0] < CLOSE * mean_sizes(symbols, block.columns)[0]
    scales = (block.scales & 127) | (chained * DIFFERENCE).astype(np.uint8)
    return with_stored_residuals(replace(block, scales=scales, residuals=block.symbols))


def mean_sizes(symbols: np.ndarray, columns: int) -> np.ndarray:  # (rows, tensors·columns) → (tensors, rows)
    """Mean |symbol| of every tensor's rows."""
    parts = np.abs(symbols).reshape(len(symbols), -1, columns)
    means: np.ndarray = parts.mean(axis=2, dtype=np.float64).T
    return means


def with_row_scales(block: Block) -> Block:
    """A scale per row, of the few values for which less precision would cost more bits than it saves."""
    if block.scales.size == 0:
        return block
    wanted = _eighths_of(_row_means(block))
    eighths = np.rint(wanted)
    for _ in range(ROUNDS):
        values, counts = np.unique(eighths, return_counts=True)
        bits = np.log2(eighths.size / counts)
        lost = LOST_BITS * block.columns * (wanted.ravel()[:, None] - values) ** 2
        eighths = values[np.argmin(lost + bits, axis=1)].reshape(wanted.shape)
    return _scaled(block, eighths)


def with_one_scale(block: Block) -> Block:
    """One scale for all rows but those coded as differences, which have one as well."""
    means, alike = _row_means(block), block.scales >= DIFFERENCE
    both = [_eighths_of(means[kind].mean() if kind.any() else 0.0) for kind in (alike, ~alike)]
    return _scaled(block, np.rint(np.where(alike, *both)))


def has_even_rows(block: Block) -> bool:
    """Whether rows' mean magnitudes differ about as little as those of one Gaussian would by chance."""
    chance = 8 * np.log2(np.e) * CHANCE / np.sqrt(max(1, block.columns))
    spread = _eighths_of(_row_means(block)).std() if block.scales.size else 0.0
    return bool(spread < 1.3 * chance and not (block.scales >= DIFFERENCE).any())


def _row_means(block: Block) -> np.ndarray:  # (tensors, rows)
    """Mean magnitudes; if steps are known, as large as they would be without."""
    if block.symbols.size == 0:
        return np.zeros(block.scales.shape)
    if not block.steps.any():
        return mean_sizes(block.residuals, block.columns)
    relative = block.steps - _offsets(block)[0].astype(np.int16).repeat(block.columns)
    return mean_sizes(block.residuals * np.exp2(relative / np.float32(8)), block.columns)


def _offsets(block: Block) -> np.ndarray:  # (1, tensors) int64
    """What all steps of a tensor have in common, in steps of 64 eighths, or small ones would have different scales."""
    if block.symbols.size == 0:
        return np.zeros((1, len(block.scales)), np.int64)
    offsets: np.ndarray = 64 * np.rint(block.steps[:1, :: block.columns] / 64).astype(np.int64)
    return offsets


def _eighths_of(means: np.ndarray | float) -> np.ndarray:
    """8·log2 of twice the mean magnitude, relative to where columns start."""
    return 8 * np.log2(np.maximum(means, 2.0**-7) * 512 / FIRST_MEAN)


def _scaled(block: Block, eighths: np.ndarray) -> Block:
    scales = np.clip(eighths + FLAT_SCALE, 0, 127).astype(np.int64) + _offsets(block).T & 127
    return replace(block, scales=scales.astype(np.uint8) | (block.scales & DIFFERENCE))


def _sample_bits(blocks: Sequence[Block]) -> float:
    """Bits of a sample, tables and row scales included, for all symbols."""
    num_symbols = sum(block.num_symbols for block in blocks)
    step = 1 + num_symbols // SAMPLE_SYMBOLS
    sample = [
        replace(
            b,
            symbols=b.symbols[::step],
            residuals=b.residuals[::step],
            scales=b.scales[:, ::step],
            steps=b.steps[::step],
        )
        for b in blocks
    ]
    counts = histogram_of(sample, [levels_of(block) for block in sample])
    sampled = sum(block.num_symbols for block in sample)
    scales = np.concatenate([block.scales.ravel() for block in blocks])
    tables = group_cost(counts, classes_of(counts))
    return tables * num_symbols / max(1, sampled) + len(scales) * entropy(np.bincount(scales))
