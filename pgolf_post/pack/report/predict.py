"""The bytes of an artifact without packing it, for sweeps and for fitting step sizes to a budget.

A column's contexts depend on nothing but itself and its rows' scales, so each tensor's contexts are counted on a sample
of its columns, tables are fitted to a role's counts, and what they need for the sample is scaled up, corrected by how
the columns left out differ in log2 of their mean magnitude, which moves bits one to one. Factors, passthrough and the
manifest are compressed as they will be, because fp16 noise is cheap to compress and hard to predict.

Everything found is remembered by content: a model that differs from an earlier one in a few tensors costs a hash of its
symbols and the counting of those tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np

from pgolf_post.pack import codecs, decode
from pgolf_post.pack.coder import contexts, rans
from pgolf_post.pack.coder.contexts import ENTRIES, LEVELS, Block
from pgolf_post.pack.coder.frequency_tables import ESCAPE_BITS, classes_of, entropy, table_bits, tables_of
from pgolf_post.pack.coder.row_shifts import has_even_rows, with_chain, with_one_scale, with_residuals, with_row_scales
from pgolf_post.pack.container import SYMBOLS, Key, Layout, block_of, manifest_bytes
from pgolf_post.pack.packable import check_packable
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor

SAMPLE_SYMBOLS = 1 << 15  # of a tensor, in whole columns
ROW_SAMPLE_COLUMNS = 512  # that a row's scale is taken from
LEAST_SIZE = 0.3  # mean magnitudes below it cost about as little as this
CODER = 1.0005  # what rANS takes relative to the entropy, measured: frequencies are rounded
FITTED_BITS = 0.36  # that an entry of a table saves on its own sample only: 1/(2 ln 2), less what merging takes back
REMEMBERED = 2048  # tensors, roles and units, the last used ones; a tensor takes about 20 KB
SHA256_STANDS_FOR = sha256(b"any").hexdigest()  # in the manifest: a real one takes longer and compresses no better

Found = TypeVar("Found")
_memory: OrderedDict[Hashable, object] = OrderedDict()


@dataclass(frozen=True)
class Counted:
    """What a tensor's sample says."""

    cells: np.ndarray  # (n,) int32 of the flattened histogram (LEVELS, 2, ENTRIES), those that occur
    counts: np.ndarray  # (n,) int32 how often
    scales: np.ndarray  # (rows,) uint8
    num_symbols: int  # of the whole tensor
    log_size: float  # mean log2 magnitude of the columns left out, relative to the sample's


def predict_bytes(model: QuantizedModel) -> int:
    """Expected bytes of `pack(model)` with codec rans. Raises what `pack` raises for a model it cannot hold."""
    check_packable(model)
    layout = Layout(model)
    roles = [layout.coded[key] for key in sorted(layout.units) if key[0] == SYMBOLS and layout.fits_rans(key)]
    others = [key for key in layout.units if key[0] != SYMBOLS or not layout.fits_rans(key)]
    lengths = [_unit_length(layout, key) for key in others]
    if roles:
        layout.rans = [[100, 4], [len(roles), LEVELS], [100, ENTRIES]]  # as long as the real ones, about
    manifest = manifest_bytes(model, layout, SHA256_STANDS_FOR)
    lengths.append(_remembered(("manifest", manifest), lambda: len(codecs.compress(manifest, codecs.BEST)[1])))
    num_units = len(lengths) + len(roles) + (4 if roles else 0)
    fixed = len(decode.MAGIC) + num_units * decode.FRAME.size + sum(lengths)
    predicted = round(fixed + _coded_bytes(roles)) if roles else fixed
    while len(_memory) > REMEMBERED:
        _memory.popitem(last=False)
    return predicted


def forget() -> None:
    """Drop everything remembered."""
    _memory.clear()


def _remembered(key: Hashable, find: Callable[[], Found]) -> Found:
    """What was found for this key before, else what `find` finds now."""
    if key not in _memory:
        _memory[key] = find()
    _memory.move_to_end(key)
    return _memory[key]  # type: ignore[return-value]


def _size(tensor: QuantizedTensor) -> int:
    return int(tensor.symbols.size)


def _unit_length(layout: Layout, key: Key) -> int:
    """Bytes of a unit that rANS does not code."""
    digest = sha256(layout.raw(key)).digest()
    return _remembered(("unit", key[2], digest), lambda: len(layout.compressed(key, codecs.BEST)[1]))


def _coded_bytes(roles: Sequence[Sequence[QuantizedTensor]]) -> float:
    """Bytes of all units of symbols and of the coder's own."""
    digests = [[_digest(tensor) for tensor in tensors] for tensors in roles]
    _count_new([tensor for tensors in roles for tensor in tensors], [one for some in digests for one in some])
    bits = sum(_remembered(("role", *some), partial(_bits_of, some)) for some in digests)
    return bits / 8 + 4 * rans.lane_count(sum(_size(tensor) for tensors in roles for tensor in tensors))


def _bits_of(digests: Sequence[Hashable]) -> float:
    return _role_bits([_memory[digest] for digest in digests])  # type: ignore[misc]


def _digest(tensor: QuantizedTensor) -> tuple[Hashable, ...]:
    """What a tensor's coded size depends on."""
    digest = sha256(np.ascontiguousarray(tensor.symbols).data)
    for factor in tensor.factors:
        if factor.is_exponent:
            digest.update(f"{factor.axis}{factor.group_size}".encode() + factor.values.tobytes())
    return ("tensor", tensor.symbols.shape, tensor.symbols.dtype.str, tensor.trellis, digest.digest())


def _count_new(tensors: Sequence[QuantizedTensor], digests: Sequence[tuple[Hashable, ...]]) -> None:
    """Count what is not remembered, tensors of one shape and trellis side by side."""
    new: dict[Hashable, dict[Hashable, QuantizedTensor]] = {}
    for tensor, digest in zip(tensors, digests, strict=True):
        if digest in _memory:
            _memory.move_to_end(digest)
        else:
            new.setdefault((tensor.symbols.shape, tensor.trellis, tensor.symbols.dtype), {})[digest] = tensor
    for same in new.values():
        _memory.update(zip(same, _count(list(same.values())), strict=True))


def _count(tensors: Sequence[QuantizedTensor]) -> list[Counted]:
    """Counts of equal-shaped tensors."""
    samples = [_sample(_thin(tensor)) for tensor in tensors]
    levels, odds = contexts.levels_of(contexts.side_by_side(samples))
    found = []
    for number, (tensor, sample) in enumerate(zip(tensors, samples, strict=True)):
        part = slice(number * sample.columns, (number + 1) * sample.columns)
        counts = contexts.histogram(sample, levels[:, part], odds[:, part]).ravel()
        cells = np.flatnonzero(counts)
        drift = _mean_log_size(tensor.symbols) - _mean_log_size(sample.symbols)
        found.append(
            Counted(cells.astype(np.int32), counts[cells].astype(np.int32), sample.scales[0], _size(tensor), drift)
        )
    return found


def _thin(tensor: QuantizedTensor) -> Block:
    """A tensor's block of at most ROW_SAMPLE_COLUMNS columns."""
    block = block_of([tensor])
    step = -(-max(1, block.columns) // ROW_SAMPLE_COLUMNS)
    symbols = block.symbols[:, ::step]
    return replace(block, symbols=symbols, residuals=symbols, columns=symbols.shape[1], steps=block.steps[:, ::step])


def _sample(block: Block) -> Block:
    """Some columns of a block, with the row scales of all."""
    chained = with_chain(with_residuals(block))
    scaled = (with_one_scale if has_even_rows(chained) else with_row_scales)(chained)
    step = max(1, block.num_symbols // SAMPLE_SYMBOLS)
    kept = slice((step // 2) % max(1, block.columns), None, step)
    symbols, residuals, steps = (array[:, kept] for array in (scaled.symbols, scaled.residuals, scaled.steps))
    return replace(scaled, symbols=symbols, residuals=residuals, steps=steps, columns=symbols.shape[1])


def _role_bits(counted: Sequence[Counted]) -> float:
    """Bits of a role's symbols, tables and row scales."""
    counts = np.zeros(LEVELS * 2 * ENTRIES, np.int64)
    for one in counted:
        counts[one.cells] += one.counts
    total = sum(one.num_symbols for one in counted)
    scale = total / max(1, counts.sum())
    whole = np.rint(scale * counts).astype(np.int64).reshape(LEVELS, 2, ENTRIES)
    tables = tables_of(whole, classes_of(whole))
    fitted = FITTED_BITS * (scale - 1) * np.count_nonzero(tables)
    escaped = ESCAPE_BITS * whole[:, :, 0].sum()
    moved = sum(one.num_symbols * one.log_size for one in counted)
    rows = np.concatenate([one.scales for one in counted])
    side = len(rows) * entropy(np.bincount(rows))
    return float(CODER * (table_bits(tables).sum() + fitted + moved) + escaped + side)


def _mean_log_size(symbols: np.ndarray) -> float:
    """log2 of the columns' mean magnitudes, averaged."""
    if symbols.size == 0:
        return 0.0
    return float(np.log2(np.maximum(np.abs(symbols).mean(axis=0, dtype=np.float32), LEAST_SIZE)).mean())
