"""The bytes of an artifact without packing it, for sweeps and for fitting step sizes to a budget.

A column's contexts depend on nothing but itself and its rows' scales, so the entropy coder's model is fitted to a
sample of columns. What the model needs for the sample is scaled up, corrected by how the columns left out differ in
log2 of their mean magnitude, which moves bits one to one. Factors and passthrough are compressed as they will be,
because fp16 noise is cheap to compress and hard to predict. Nothing is coded, so the time grows with rows, not with
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgolf_post.pack import codecs, decode, rans
from pgolf_post.pack.container import SYMBOLS, Layout, manifest_bytes
from pgolf_post.pack.contexts import Block, make_block
from pgolf_post.pack.packable import check_packable
from pgolf_post.quantize.tensor import QuantizedModel

SAMPLE_SYMBOLS = 1 << 20
LEAST_SIZE = 0.3  # mean magnitudes below it cost about as little as this


def predict_bytes(model: QuantizedModel) -> int:
    """Expected bytes of `pack(model)` with codec rans. Raises what `pack` raises for a model it cannot hold."""
    check_packable(model)
    layout = Layout(model)
    roles = [layout.blocks(key) for key in sorted(layout.units) if key[0] == SYMBOLS and layout.fits_rans(key)]
    others = [key for key in layout.units if key[0] != SYMBOLS or not layout.fits_rans(key)]
    streams = [layout.compressed(key, codecs.BEST)[1] for key in others]
    streams.append(codecs.compress(manifest_bytes(model, layout), codecs.BEST)[1])
    num_units = len(streams) + len(roles) + (4 if roles else 0)
    fixed = len(decode.MAGIC) + num_units * decode.FRAME.size + sum(map(len, streams))
    return round(fixed + _coded_bytes(roles)) if roles else fixed


def _coded_bytes(roles: Sequence[Sequence[Block]]) -> float:
    """Bytes of all units of symbols and of the coder's own."""
    num_symbols = sum(block.num_symbols for blocks in roles for block in blocks)
    step = max(1, num_symbols // SAMPLE_SYMBOLS)
    samples = [[_every(block, step) for block in blocks] for blocks in roles]
    scaled, model = rans.fit(samples)
    bits = 0.0
    for blocks, sample, coded_bits in zip(roles, samples, model.coded_bits, strict=True):
        total, sampled = (sum(block.num_symbols for block in part) for part in (blocks, sample))
        bits += total * (coded_bits / max(1, sampled) + _mean_log_size(blocks) - _mean_log_size(sample))
    own = [model.weights, model.classes, np.concatenate([b.scales.ravel() for blocks in scaled for b in blocks])]
    side = sum(len(codecs.compress(array.tobytes(), "brotli")[1]) for array in own)
    return bits / 8 + side + 4 * rans.lane_count(num_symbols)


def _every(block: Block, step: int) -> Block:
    """Every `step`-th column of each tensor."""
    tensors = np.split(block.symbols, len(block.scales), axis=1)
    kept = slice((step // 2) % max(1, block.columns), None, step)
    steps = np.split(block.steps, len(tensors), axis=1)
    return make_block([t[:, kept] for t in tensors], block.trellis, [part[:, kept] for part in steps])


def _mean_log_size(blocks: Sequence[Block]) -> float:
    """log2 of the columns' mean magnitudes, averaged over symbols."""
    logs = [
        np.log2(np.maximum(np.abs(b.symbols).mean(axis=0, dtype=np.float64), LEAST_SIZE))
        for b in blocks
        if b.num_symbols
    ]
    weights = [len(block.symbols) for block in blocks if block.num_symbols]
    total = sum(len(log) * rows for log, rows in zip(logs, weights, strict=True))
    return sum(float(log.sum()) * rows for log, rows in zip(logs, weights, strict=True)) / max(1, total)
