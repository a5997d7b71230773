"""Frequency tables: which contexts share one, and how it is stored.

Levels are merged into classes, and roles into groups that share their classes, for as long as tables saved are worth
more than the bits lost; class and trellis bit name the frequency table.

Frequencies are stored as one byte v per entry, meaning the weight 2^(v/8) (0: absent), which costs 0.0005 bit per
symbol; entry 0 is the escape, after which the symbol is stored raw. All of this is integer arithmetic, the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgolf_post.pack.coder.contexts import CENTRE, ENTRIES, LEVELS
from pgolf_post.pack.decode import MANTISSAS

TOTAL = 4096  # of a table's frequencies
ENTRY_BITS, TABLE_BITS = 4.5, 12.0  # what a table costs in the artifact, measured
ESCAPE_BITS = 16.0


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
    single, both = table_bits(counts[used]), table_bits(counts[used[:-1]] + counts[used[1:]])
    bits, merged = single.tolist(), both.tolist()  # of each class, of it and the next in one
    gains = (single[:-1] + single[1:] - both).tolist()
    while gains and (most := max(gains)) > 0:
        i = gains.index(most)
        tables[i : i + 2], bits[i : i + 2] = [tables[i] + tables[i + 1]], [merged[i]]
        del starts[i + 1], gains[i], merged[i]
        beside = range(max(i - 1, 0), min(i + 1, len(gains)))
        if beside:
            found = table_bits(np.stack([tables[j] + tables[j + 1] for j in beside])).tolist()
            for j, together in zip(beside, found, strict=True):
                merged[j], gains[j] = together, bits[j] + bits[j + 1] - together
    return np.maximum(np.searchsorted(starts, np.arange(LEVELS), "right") - 1, 0).astype(np.int16)


def tables_of(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:  # → (classes, 2, ENTRIES)
    """Histograms of classes, whose numbers never fall from one level to the next; those of other numbers are empty."""
    merged = np.zeros((int(classes.max()) + 1, *counts.shape[1:]), np.int64)
    starts = np.flatnonzero(np.diff(classes, prepend=int(classes[0]) - 1))
    merged[classes[starts]] = np.add.reduceat(counts, starts, axis=0)
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


@dataclass(frozen=True)
class Model:
    """Everything the coder needs to know about contexts."""

    group_of: tuple[int, ...]  # per role, which row of `classes`
    classes: np.ndarray  # (groups, LEVELS) int8: level → class, numbered through all groups
    weights: np.ndarray  # (2·classes, width) uint8: context 2·class + trellis bit → stored weights
    entropy_bits: tuple[float, ...]  # per role: empirical entropy of its symbols in their contexts, tables not counted
    coded_bits: tuple[float, ...]  # per role: bits by the stored tables, escapes included


def fit_tables(histograms: Sequence[np.ndarray]) -> Model:  # per role (LEVELS, 2, ENTRIES)
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
    """Return the decoder's frequencies of stored weights: the floor of the cumulative share, differenced."""
    values = weights.astype(np.int64)
    ends = ((values > 0) * MANTISSAS[values & 7] << (values >> 3)).cumsum(axis=1)
    shares: np.ndarray = np.diff(TOTAL * ends // ends[:, -1:], axis=1, prepend=0)
    return shares
