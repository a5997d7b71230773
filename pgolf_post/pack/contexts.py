"""What the entropy coder knows before it reads a symbol: integers made of symbols that the decoder has already.

A symbol n is about as large as its column's earlier ones, as the other symbols of its row, and as its step is small.
Each symbol has a *scale* in eighths of an octave: its row's stored one less the integer factors of its weight, which
the decoder has read before (modulo 128, so that what a tensor's factors have in common costs nothing). Stored scales
are one for a whole role where that is enough, or one per row where they pay, no more precise than they pay. Each
column keeps a running integer mean, over 128 rows, of the magnitudes |2n + z| (z is the trellis bit, 0 without a
trellis), every one divided by its scale. Then

    level = log2(mean) + scale, in eighths of an octave

predicts the next magnitude. Rows that nearly repeat another, as the embeddings of tokens that never occur do, are coded
as the difference from the last row that was coded so, and the rest is about the difference. (Artifacts of two older
kinds, QUICK and STEADY, ignore factors and have means of other lengths; QUICK takes differences from the row before.)

Levels are merged into classes, and roles into groups that share their classes, for as long as tables saved are worth
more than the bits lost; class and trellis bit name the frequency table.

Frequencies are stored as one byte v per entry, meaning the weight 2^(v/8) (0: absent), which costs 0.0005 bit per
symbol; entry 0 is the escape, after which the symbol is stored raw. All of this is integer arithmetic, the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pgolf_post.compiled import use_compiled
from pgolf_post.pack.decode import MANTISSAS, RANS
from pgolf_post.quantize.trellis import Trellis, next_states

LEVELS = 256
ENTRIES = 256  # of a histogram: the escape, then -127 .. 127
CENTRE = 128
FLAT_SCALE = 64  # scale 0 as stored
DIFFERENCE = 128  # flag of a row that is coded as the difference from another
CLOSE = 0.8  # mean size of that difference, relative to the row's own, below which it is
FIRST_MEAN = 1024
QUICK, STEADY, INFORMED = RANS  # kinds of block, by codec id
TOTAL = 4096  # of a table's frequencies
ENTRY_BITS, TABLE_BITS = 4.5, 12.0  # what a table costs in the artifact, measured
ESCAPE_BITS = 16.0
CHANCE = 0.755  # standard deviation of a Gaussian's magnitudes, relative to their mean
SAMPLE_SYMBOLS = 1 << 20  # on which row scales are tried
ROUNDS, LOST_BITS = 12, 0.005  # a scale wrong by x eighths costs LOST_BITS·x² bits per symbol

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
    from pgolf_post.pack import kernels

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


# row scales


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


# classes and groups


def entropy(counts: np.ndarray) -> float:
    """Order-0 entropy of a histogram, bits per symbol."""
    present = counts[counts > 0] / max(1, counts.sum())
    return float(-(present * np.log2(present)).sum())


def table_bits(counts: np.ndarray) -> np.ndarray:  # (…, 2, ENTRIES) → (…,)
    """Bits of symbols coded by their own two tables, and of those tables."""
    totals = counts.sum(axis=-1)
    logs = np.log2(np.maximum(counts, 1))
    bits = totals * np.log2(np.maximum(totals, 1)) - (counts * logs).sum(axis=-1)
    bits = bits + ENTRY_BITS * (counts > 0).sum(axis=-1) + TABLE_BITS * (totals > 0)
    summed: np.ndarray = bits.sum(axis=-1)
    return summed


def classes_of(counts: np.ndarray) -> np.ndarray:  # (LEVELS, 2, ENTRIES) → (LEVELS,) class numbers, rising
    """Merge neighbouring levels, the best pair first, until no merge saves anything."""
    used = np.flatnonzero(counts.any(axis=(1, 2)))
    if len(used) == 0:
        return np.zeros(LEVELS, np.int16)
    starts, tables = list(used), list(counts[used])
    single, merged = table_bits(counts[used]), table_bits(counts[used[:-1]] + counts[used[1:]])
    bits, gains = single.tolist(), (single[:-1] + single[1:] - merged).tolist()
    while gains and max(gains) > 0:
        i = int(np.argmax(gains))
        tables[i : i + 2] = [tables[i] + tables[i + 1]]
        bits[i : i + 2] = [float(table_bits(tables[i]))]
        del starts[i + 1], gains[i]
        for j in (i - 1, i):
            if 0 <= j < len(gains):
                gains[j] = bits[j] + bits[j + 1] - float(table_bits(tables[j] + tables[j + 1]))
    return np.maximum(np.searchsorted(starts, np.arange(LEVELS), "right") - 1, 0).astype(np.int16)


def tables_of(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:  # → (classes, 2, ENTRIES)
    """Histograms of classes."""
    merged = np.zeros((int(classes.max()) + 1, *counts.shape[1:]), np.int64)
    np.add.at(merged, classes, counts)
    return merged


def group_cost(counts: np.ndarray, classes: np.ndarray) -> float:
    """Bits of a group's symbols and tables."""
    return float(table_bits(tables_of(counts, classes)).sum())


def group_roles(histograms: Sequence[np.ndarray]) -> list[list[int]]:
    """Roles that share classes: pairs of groups are merged, the best first, until no merge saves anything."""
    groups = [[number] for number in range(len(histograms))]
    counts = list(histograms)
    costs = [group_cost(c, classes_of(c)) for c in counts]
    known: dict[tuple[int, int], float] = {}

    def gain(i: int, j: int) -> float:
        key = (id(counts[i]), id(counts[j]))
        if key not in known:
            both = counts[i] + counts[j]
            known[key] = costs[i] + costs[j] - group_cost(both, classes_of(both))
        return known[key]

    kept = list(counts)  # ids stay unique while their arrays live
    while len(groups) > 1:
        best, i, j = max((gain(i, j), i, j) for i in range(len(groups)) for j in range(i))
        if best <= 0:
            break
        counts[j] = counts[i] + counts[j]
        kept.append(counts[j])
        groups[j] += groups[i]
        costs[j] = group_cost(counts[j], classes_of(counts[j]))
        del groups[i], counts[i], costs[i]
    return groups


# frequency tables


@dataclass(frozen=True)
class Model:
    """Everything the coder needs to know about contexts."""

    group_of: tuple[int, ...]  # per role, which row of `classes`
    classes: np.ndarray  # (groups, LEVELS) int8: level → class, numbered through all groups
    weights: np.ndarray  # (2·classes, width) uint8: context 2·class + trellis bit → stored weights
    entropy_bits: tuple[float, ...]  # per role: empirical entropy of its symbols in their contexts, tables not counted
    coded_bits: tuple[float, ...]  # per role: bits by the stored tables, escapes included


def fit(histograms: Sequence[np.ndarray]) -> Model:  # per role (LEVELS, 2, ENTRIES)
    """Classes, groups and tables for these symbols."""
    groups = group_roles(histograms)
    group_of = [next(g for g, roles in enumerate(groups) if role in roles) for role in range(len(histograms))]
    rows: list[np.ndarray] = []
    tables: list[np.ndarray] = []
    for roles in groups:
        counts = sum((histograms[role] for role in roles), np.zeros((LEVELS, 2, ENTRIES), np.int64))
        classes = classes_of(counts)
        rows.append(classes + sum(map(len, tables)))
        tables.append(tables_of(counts, classes))
    counts = np.concatenate(tables).reshape(-1, ENTRIES)
    weights = weights_of(counts)
    entropies, coded = [], []
    for histogram, group in zip(histograms, group_of, strict=True):
        own = tables_of(histogram, rows[group]).reshape(-1, ENTRIES)
        entropies.append(cross_bits(own, counts[: len(own)]))
        coded.append(cross_bits(own, _expand(frequencies(weights))[: len(own)]))
    return Model(tuple(group_of), np.array(rows, np.int8).reshape(-1, LEVELS), weights, tuple(entropies), tuple(coded))


def cross_bits(counts: np.ndarray, model: np.ndarray) -> float:  # both (contexts, ENTRIES)
    """Bits of `counts` coded with probabilities ∝ `model`; what the model lacks is escaped."""
    known = np.where(model > 0, counts, 0)
    escaped = counts.sum(axis=1) - known.sum(axis=1)
    known[:, 0] += escaped
    shares = np.maximum(model, 1e-9) / np.maximum(model.sum(axis=1, keepdims=True), 1)
    return float(-(known * np.log2(shares)).sum() + ESCAPE_BITS * (escaped.sum() + counts[:, 0].sum()))


def _expand(freqs: np.ndarray) -> np.ndarray:  # (contexts, width) → (contexts, ENTRIES)
    """Frequencies at the entries of a histogram."""
    whole = np.zeros((len(freqs), ENTRIES), np.int64)
    reach = freqs.shape[1] // 2 - 1
    whole[:, 0] = freqs[:, 0]
    whole[:, CENTRE - reach : CENTRE + reach + 1] = freqs[:, 1:]
    return whole


def weights_of(counts: np.ndarray) -> np.ndarray:  # (contexts, ENTRIES) → (contexts, width) uint8
    """The stored weights of every context, cut to the symbols that occur outside the escape."""
    rows = [_weights_of_row(row) for row in counts]
    weights = np.array(rows, np.uint8).reshape(-1, ENTRIES)
    occurring = np.flatnonzero(weights[:, 1:].any(axis=0)) + 1
    reach = int(np.abs(occurring - CENTRE).max()) if len(occurring) else 0
    kept = slice(CENTRE - reach, CENTRE + reach + 1)
    return np.concatenate([weights[:, :1], weights[:, kept]], axis=1)


def _weights_of_row(counts: np.ndarray) -> np.ndarray:  # (ENTRIES,) → (ENTRIES,) uint8
    total = max(1, int(counts.sum()))
    rare = (counts > 0) & (counts * ESCAPE_BITS < total * np.log2(TOTAL / (TOTAL - 1)) + ENTRY_BITS)
    rare[0] = False
    kept = np.where(rare, 0, counts)
    kept[0] += counts[rare].sum()
    if not kept.any():
        kept[0] = 1
    weights = np.rint(8 * np.log2(np.maximum(kept, 1) / total * (1 << 15))).astype(np.int64)
    weights = np.where(kept > 0, np.maximum(weights, 1), 0)
    while (missing := (kept > 0) & (frequencies(weights[None])[0] == 0)).any():
        weights[missing] += 1
    return weights


def frequencies(weights: np.ndarray) -> np.ndarray:  # (contexts, width) → int64, each row summing to TOTAL
    """What the decoder makes of stored weights: the floor of the cumulative share, differenced."""
    values = weights.astype(np.int64)
    ends = ((values > 0) * MANTISSAS[values & 7] << (values >> 3)).cumsum(axis=1)
    shares: np.ndarray = np.diff(TOTAL * ends // ends[:, -1:], axis=1, prepend=0)
    return shares
