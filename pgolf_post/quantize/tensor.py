"""The nouns between quantizing and packing: integer symbols with the scales that give them meaning, never bytes.

A quantized weight is `w_ij ≈ row_scale_i · n_ij`. The scales are fp16 because that is what the artifact stores:
a quantizer rounds its scales first and its symbols against the rounded scales, so that decoding loses nothing more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized matrix."""

    name: str
    symbols: np.ndarray  # (out, in) int8, in -(2^(bits-1)-1) .. 2^(bits-1)-1
    row_scales: np.ndarray  # (out,) float16, positive
    bits: int
    facts: Mapping[str, Any] = field(default_factory=dict)  # method, entropy_bits, damp_frac, error …

    def dequantize(self) -> np.ndarray:  # (out, in) float32
        """The weights the decoder will produce, bit for bit."""
        return self.symbols.astype(np.float32) * self.row_scales.astype(np.float32)[:, None]


@dataclass(frozen=True)
class QuantizedModel:
    """All tensors of a model after quantization, and what is needed to rebuild and trace it."""

    config: Mapping[str, Any]  # the checkpoint's config.json: family, model, graph, tokenizer, data
    lineage: Mapping[str, Any]  # checkpoint_id, view, stats_id, settings
    quantized: Mapping[str, QuantizedTensor]
    passthrough: Mapping[str, np.ndarray]  # float16, any shape

    def symbols_sha256(self) -> str:
        """Hex sha256 over the symbols of all quantized tensors in name order: what a NO-OP is judged by."""
        return symbols_sha256({name: tensor.symbols for name, tensor in self.quantized.items()})

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor as float32, as a decoder must reproduce it."""
        restored = {name: array.astype(np.float32) for name, array in self.passthrough.items()}
        restored.update({name: tensor.dequantize() for name, tensor in self.quantized.items()})
        return restored


def symbols_sha256(symbols: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 of int8 symbol arrays in name order, names and shapes included."""
    digest = hashlib.sha256()
    for name in sorted(symbols):
        array = np.ascontiguousarray(symbols[name], dtype=np.int8)
        digest.update(f"{name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
