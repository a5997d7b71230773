"""Predict the bytes of an artifact without packing it, for sweeps and for fitting step sizes to a budget.

The contexts of a column depend on its own symbols and on the row shifts alone. So each tensor's contexts are counted
on a sample of its columns, frequency tables are fitted to the counts of a role, and the bits of the sample are scaled
up to all columns, corrected by how the others differ in log2 of their mean magnitude (a factor of 2 is one bit per
symbol). Factors, passthrough and the manifest are really compressed: fp16 noise is cheap to compress and hard to
predict.

A `SizePredictor` remembers what it counted, by content. A model that differs from an earlier one in a few tensors then
costs a hash of its symbols and the counting of those tensors. Whoever predicts a series of models owns one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np

from pgolf_post.pack import codecs, decode
from pgolf_post.pack.coder import contexts, rans
from pgolf_post.pack.coder.contexts import ENTRIES, LEVELS, Block
from pgolf_post.pack.coder.frequency_tables import ESCAPE_BITS, classes_of, entropy, table_bits, tables_of
from pgolf_post.pack.coder.row_shifts import (
    has_even_rows,
    with_chain,
    with_one_shift,
    with_residuals,
    with_shift_per_row,
)
from pgolf_post.pack.container import SYMBOLS, Key, Layout, block_of, manifest_bytes
from pgolf_post.pack.packable import check_packable
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor

SAMPLE_SYMBOLS = 1 << 15  # of a tensor, in whole columns
ROW_SAMPLE_COLUMNS = 512  # of a tensor, from which its row shifts are chosen
LEAST_SIZE = 0.3  # mean magnitudes below it cost about as little as this
CODER = 1.0005  # bits of rANS relative to the entropy, measured: frequencies are rounded
FITTED_BITS = 0.36  # saved by an entry of a table on its own sample only: 1/(2 ln 2), less what merging takes back
REMEMBERED = 2048  # tensors, roles and units, the last used ones; a tensor takes about 20 KB
ANY_SHA256 = sha256(b"any").hexdigest()  # stands in the manifest for the real one, which compresses no better

T = TypeVar("T")


@dataclass(frozen=True)
class SampleCounts:
    """Counts of symbols in their contexts, from a sample of a tensor's columns."""

    cells: np.ndarray  # (n,) int32 of the flattened histogram (LEVELS, 2, ENTRIES), those that occur
    counts: np.ndarray  # (n,) int32 how often
    row_shifts: np.ndarray  # (rows,) uint8
    num_symbols: int  # of the whole tensor
    log_size: float  # mean log2 magnitude of the tensor's columns, less that of the sampled ones


class SizePredictor:
    """Predicts packed sizes, and remembers what it counted of the last models. For one thread."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self.remembered = remembered  # the most entries kept between two predictions
        self._memory: OrderedDict[Hashable, object] = OrderedDict()

    def predict_bytes(self, model: QuantizedModel) -> int:
        """Return the expected bytes of `pack(model)` with codec rans. Raises what `pack` raises for a bad model."""
        check_packable(model)
        layout = Layout(model)
        roles = [layout.coded[key] for key in sorted(layout.units) if key[0] == SYMBOLS and layout.fits_rans(key)]
        others = [key for key in layout.units if key[0] != SYMBOLS or not layout.fits_rans(key)]

        # compress all that rANS does not code, the manifest with shapes of about the right length
        lengths = [self._unit_length(layout, key) for key in others]
        if roles:
            layout.rans = [[100, 4], [len(roles), LEVELS], [100, ENTRIES]]
        manifest = manifest_bytes(model, layout, ANY_SHA256)
        lengths.append(self._remember(("manifest", manifest), lambda: len(codecs.compress(manifest, codecs.BEST)[1])))

        # add the frames, and the predicted bytes of symbols and of the coder's own four units
        num_units = len(lengths) + len(roles) + (4 if roles else 0)
        fixed = len(decode.MAGIC) + num_units * decode.FRAME.size + sum(lengths)
        predicted = round(fixed + self._coded_bytes(roles)) if roles else fixed
        while len(self._memory) > self.remembered:
            self._memory.popitem(last=False)
        return predicted

    def _remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for this key before, else make it now."""
        if key not in self._memory:
            self._memory[key] = make()
        self._memory.move_to_end(key)
        return self._memory[key]  # type: ignore[return-value]

    def _unit_length(self, layout: Layout, key: Key) -> int:
        """Return the bytes of a unit that rANS does not code."""
        digest = sha256(layout.raw(key)).digest()
        return self._remember(("unit", key[2], digest), lambda: len(layout.compressed(key, codecs.BEST)[1]))

    def _coded_bytes(self, roles: Sequence[Sequence[QuantizedTensor]]) -> float:
        """Return the bytes of all units of symbols and of the coder's own."""
        digests = [[_digest(tensor) for tensor in tensors] for tensors in roles]
        self._count_new([tensor for tensors in roles for tensor in tensors], [one for some in digests for one in some])
        bits = sum(self._remember(("role", *some), partial(self._bits_of, some)) for some in digests)
        return bits / 8 + 4 * rans.lane_count(sum(_size(tensor) for tensors in roles for tensor in tensors))

    def _bits_of(self, digests: Sequence[Hashable]) -> float:
        return _role_bits([self._memory[digest] for digest in digests])  # type: ignore[misc]

    def _count_new(self, tensors: Sequence[QuantizedTensor], digests: Sequence[tuple[Hashable, ...]]) -> None:
        """Count the tensors that are not remembered, those of one shape and trellis side by side."""
        new: dict[Hashable, dict[Hashable, QuantizedTensor]] = {}
        for tensor, digest in zip(tensors, digests, strict=True):
            if digest in self._memory:
                self._memory.move_to_end(digest)
            else:
                new.setdefault((tensor.symbols.shape, tensor.trellis, tensor.symbols.dtype), {})[digest] = tensor
        for same in new.values():
            self._memory.update(zip(same, _count(list(same.values())), strict=True))


def _size(tensor: QuantizedTensor) -> int:
    return int(tensor.symbols.size)


def _digest(tensor: QuantizedTensor) -> tuple[Hashable, ...]:
    """Return a key of everything that a tensor's coded size depends on."""
    digest = sha256(np.ascontiguousarray(tensor.symbols).data)
    for factor in tensor.factors:
        if factor.is_exponent:
            digest.update(f"{factor.axis}{factor.group_size}".encode() + factor.values.tobytes())
    return ("tensor", tensor.symbols.shape, tensor.symbols.dtype.str, tensor.trellis, digest.digest())


def _count(tensors: Sequence[QuantizedTensor]) -> list[SampleCounts]:
    """Count equal-shaped tensors side by side, each on its own sample."""
    samples = [_sample(_thin(tensor)) for tensor in tensors]
    levels, odds = contexts.levels_of(contexts.side_by_side(samples))
    counted = []
    for number, (tensor, sample) in enumerate(zip(tensors, samples, strict=True)):
        part = slice(number * sample.columns, (number + 1) * sample.columns)
        counts = contexts.histogram(sample, levels[:, part], odds[:, part]).ravel()
        cells = np.flatnonzero(counts)
        drift = _mean_log_size(tensor.symbols) - _mean_log_size(sample.symbols)
        occurring = (cells.astype(np.int32), counts[cells].astype(np.int32))
        counted.append(SampleCounts(*occurring, sample.row_shifts[0], _size(tensor), drift))
    return counted


def _thin(tensor: QuantizedTensor) -> Block:
    """Return a tensor's block with at most ROW_SAMPLE_COLUMNS of its columns."""
    block = block_of([tensor])
    step = -(-max(1, block.columns) // ROW_SAMPLE_COLUMNS)
    return block.picked(columns=slice(None, None, step))


def _sample(block: Block) -> Block:
    """Return some columns of a block, with row shifts chosen on all of them."""
    chained = with_chain(with_residuals(block))
    shifted = (with_one_shift if has_even_rows(chained) else with_shift_per_row)(chained)
    step = max(1, block.num_symbols // SAMPLE_SYMBOLS)
    kept = slice((step // 2) % max(1, block.columns), None, step)
    return shifted.picked(columns=kept)


def _role_bits(counted: Sequence[SampleCounts]) -> float:
    """Return the bits of a role's symbols, tables and row shifts."""
    # the role's histogram, scaled up from the samples
    counts = np.zeros(LEVELS * 2 * ENTRIES, np.int64)
    for one in counted:
        counts[one.cells] += one.counts
    total = sum(one.num_symbols for one in counted)
    sampled_from = total / max(1, counts.sum())  # symbols per sampled symbol
    whole = np.rint(sampled_from * counts).astype(np.int64).reshape(LEVELS, 2, ENTRIES)

    # tables fitted to it, less what they owe to having been fitted on a sample
    tables = tables_of(whole, classes_of(whole))
    fitted = FITTED_BITS * (sampled_from - 1) * np.count_nonzero(tables)

    # escapes, columns that were not sampled, row shifts
    escaped = ESCAPE_BITS * whole[:, :, 0].sum()
    moved = sum(one.num_symbols * one.log_size for one in counted)
    rows = np.concatenate([one.row_shifts for one in counted])
    side = len(rows) * entropy(np.bincount(rows))
    return float(CODER * (table_bits(tables).sum() + fitted + moved) + escaped + side)


def _mean_log_size(symbols: np.ndarray) -> float:
    """Return the mean over columns of log2 of their mean magnitude."""
    if symbols.size == 0:
        return 0.0
    return float(np.log2(np.maximum(np.abs(symbols).mean(axis=0, dtype=np.float32), LEAST_SIZE)).mean())
