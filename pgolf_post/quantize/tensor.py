"""The nouns between quantizing and packing: integer symbols, and the factors that give them meaning. Never bytes.

A quantized weight is a symbol (or the grid point that a trellis makes of it) times the product of its *factors*: one
number for the tensor, for each row, for each column, or for each group of consecutive weights. A factor is stored as
fp16, or as an integer v that means 2^(v/8); the integers of all factors are added before the one power is taken. A
quantizer rounds its factors first and its symbols against the rounded factors, so that decoding loses nothing more.

Two suffixes make one matrix of several: `NAME.lqA` (out, rank) and `NAME.lqB` (rank, in) are ordinary quantized tensors
whose product is added to NAME (LQER, arXiv 2402.02446).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pgolf_post.quantize.gptq.trellis import Trellis, grid_points

Axis = Literal["tensor", "row", "column", "group"]
LOW_RANK = (".lqA", ".lqB")
ROOTS = (2.0 ** (np.arange(8) / 8)).astype(np.float32)  # 2^(k/8), the mantissas of integer factors


@dataclass(frozen=True)
class ScaleFactor:
    """One stored number per tensor, row, column, or group of `group_size` weights in row-major order."""

    axis: Axis
    values: np.ndarray  # float16, or int8 / int16 eighths of an octave: tensor (1,), row (rows,), column (columns,)
    group_size: int = 0  # of axis "group", whose values are (ceil(rows·columns / group_size),)

    @property
    def is_exponent(self) -> bool:
        """Whether values v mean 2^(v/8)."""
        return self.values.dtype.kind == "i"

    def spread(self, rows: int, columns: int) -> np.ndarray:
        """Return the values, in their own dtype, in a shape that broadcasts to (rows, columns)."""
        if self.axis == "row":
            return self.values[:, None]
        if self.axis == "group":
            return self.values.repeat(self.group_size)[: rows * columns].reshape(rows, columns)
        return self.values[None, :]


def power_of_eighths(exponents: np.ndarray) -> np.ndarray:  # int, any shape → float32
    """Return 2^(v/8), from eight mantissas and a shift of the exponent: the same bits everywhere."""
    wide = exponents.astype(np.int32)
    scaled: np.ndarray = np.ldexp(ROOTS[wide & 7], wide >> 3)
    return scaled


def scale_of(factors: tuple[ScaleFactor, ...], rows: int, columns: int) -> np.ndarray:  # float32, broadcasts to both
    """Return the product of all factors: the step Δ of each weight."""
    scale = np.ones((1, 1), np.float32)
    exponents = np.zeros((1, 1), np.int32)
    for factor in factors:
        if factor.is_exponent:
            exponents = exponents + factor.spread(rows, columns).astype(np.int32)
        else:
            scale = scale * factor.spread(rows, columns).astype(np.float32)
    return scale * power_of_eighths(exponents)


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized tensor. A vector is one row; of more than two dimensions, all but the first are the columns."""

    name: str
    symbols: np.ndarray  # (rows, columns) int8 or int16
    factors: tuple[ScaleFactor, ...]
    shape: tuple[int, ...]  # of the tensor itself
    trellis: Trellis | None = None  # symbols m mean the grid points 2m + z0 of this trellis
    facts: Mapping[str, Any] = field(default_factory=dict)  # method, bits, entropy_bits, damp_used, error …

    def dequantize(self) -> np.ndarray:  # `shape` float32
        """Return the weights that the decoder will produce, bit for bit, low-rank corrections aside."""
        points = grid_points(self.symbols, self.trellis) if self.trellis else self.symbols
        restored: np.ndarray = points.astype(np.float32) * scale_of(self.factors, *self.symbols.shape)
        return restored.reshape(self.shape)


@dataclass(frozen=True)
class QuantizedModel:
    """A model after quantization: its tensors, and what is needed to rebuild and trace it."""

    config: Mapping[str, Any]  # the checkpoint's config.json: family, model, graph, tokenizer, data
    lineage: Mapping[str, Any]  # checkpoint_id, stats_id
    quantized: Mapping[str, QuantizedTensor]
    passthrough: Mapping[str, np.ndarray]  # float16, or uint16 holding the bits of bfloat16; any shape

    def symbols_sha256(self) -> str:
        """Return the hex sha256 of the symbols of all quantized tensors in name order; equal hashes mark a NO-OP."""
        return symbols_sha256({name: tensor.symbols for name, tensor in self.quantized.items()})

    def content_sha256(self) -> str:
        """Return the hex sha256 of all that decoding gives back: symbols, factors, trellises and floats."""
        digest = hashlib.sha256(self.symbols_sha256().encode())
        for name in sorted(self.quantized):
            tensor = self.quantized[name]
            digest.update(f"{name}\0{tensor.shape}\0{tensor.trellis}\0".encode())
            for factor in tensor.factors:
                digest.update(f"{factor.axis}\0{factor.group_size}\0{factor.values.dtype}\0".encode())
                digest.update(factor.values.tobytes())
        for name in sorted(self.passthrough):
            array = self.passthrough[name]
            digest.update(f"{name}\0{array.shape}\0{array.dtype}\0".encode() + array.tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, np.ndarray]:
        """Return every tensor of the model as float32, as a decoder must reproduce it."""
        restored = {name: widen(array) for name, array in self.passthrough.items()}
        restored.update({name: tensor.dequantize() for name, tensor in self.quantized.items()})
        return add_low_rank(restored)


def widen(array: np.ndarray) -> np.ndarray:  # float16, or uint16 bits of bfloat16 → float32
    """Return a passed-through tensor's values."""
    if array.dtype == np.uint16:
        return np.array(array.astype("<u4") << 16).view("<f4")  # of one number, too, which a shift unwraps
    return array.astype(np.float32)


def add_low_rank(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add every pair NAME.lqA @ NAME.lqB to NAME and drop the pair."""
    left, right = LOW_RANK
    for name in [name.removesuffix(left) for name in tensors if name.endswith(left)]:
        tensors[name] = tensors[name] + tensors.pop(name + left) @ tensors.pop(name + right)
    return tensors


def smallest_dtype(symbols: np.ndarray) -> np.ndarray:
    """Return the same integers as int8 if they fit, else as int16. Raises OverflowError beyond ±32,767."""
    largest = int(np.abs(symbols.astype(np.int64)).max()) if symbols.size else 0
    if largest > 32767:
        raise OverflowError(f"symbol ±{largest} does not fit in 16 bits")
    return np.ascontiguousarray(symbols, np.int8 if largest < 128 else np.int16)


def symbols_sha256(symbols: Mapping[str, np.ndarray]) -> str:
    """Return the hex sha256 of symbol arrays in name order as little-endian int16, names and shapes included."""
    digest = hashlib.sha256()
    for name in sorted(symbols):
        array = np.ascontiguousarray(symbols[name], dtype="<i2")
        digest.update(f"{name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
