"""The {w, m} artifacts of the flat and banked lines (`final_model.int6.ptz`): GPTQ symbols in int8, scales in float16.

    w   NAME                                  kept as it is
        NAME.q, NAME.scale                    symbols, one scale per row
        NAME.gq, NAME.gs                      the same for attention gates
        NAME.lqA, .lqAs, .lqB, .lqBs          low-rank correction: factors, scales by row or by rank
        NAME.lqA_a, .lqAs_a, .lqB_a, .lqBs_a  asymmetric: A with one scale, B with one per 64 (or n) of its values
    m   NAME → how it was stored, in words

The correction's factors come over bit for bit; their product is a matrix product of the machine that decodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf_post.errors import MismatchError
from pgolf_post.importers.artifact_file import TABLES, factor, integers, kept, matrix, tensors_of
from pgolf_post.quantize.tensor import LOW_RANK, Axis, QuantizedModel, QuantizedTensor, ScaleFactor

SYMMETRIC = (".lqA", ".lqAs", ".lqB", ".lqBs")
ASYMMETRIC = (".lqA_a", ".lqAs_a", ".lqB_a", ".lqBs_a")
PAIRS = ((".q", ".scale"), (".gq", ".gs"))
SUFFIXES = ("", *PAIRS[0], *PAIRS[1], *SYMMETRIC, *ASYMMETRIC)
GROUP = 64


def recognises(stored: Mapping[str, Any]) -> bool:
    """Return whether a dictionary has tensors under "w" and words about them under "m"."""
    return set(stored) == {"w", "m"}


def to_quantized(stored: Mapping[str, Any], path: Path) -> QuantizedModel:
    """Return symbols, scales, corrections and kept tensors; every tensor of the file is used, once.

    Raises MismatchError listing tensors that "m" does not explain, or that do not belong together.
    """
    tensors, words = tensors_of(stored, "w", path), stored["m"]
    if not isinstance(words, Mapping) or not all(isinstance(name, str) for name in words):
        raise MismatchError(f"{path}: 'm' is a {type(words).__name__}, expected a dictionary of words by tensor name")
    quantized: dict[str, QuantizedTensor] = {}
    rest = {}
    for name, how in words.items():
        parts = {suffix: tensors.pop(f"{name}{suffix}") for suffix in SUFFIXES if f"{name}{suffix}" in tensors}
        pair = next((pair for pair in PAIRS if set(pair) <= parts.keys()), None)
        lqer = next((form for form in (SYMMETRIC, ASYMMETRIC) if set(form) <= parts.keys()), ())
        if set(parts) == {""}:
            rest[name] = kept(name, parts[""], path)
        elif pair and set(parts) == {*pair, *lqer} and bool(lqer) == ("lqer" in str(how)):
            quantized[name] = matrix(name, parts[pair[0]], parts[pair[1]], path)
            for factors in _correction(name, [parts[suffix] for suffix in lqer], bool(lqer == ASYMMETRIC), path):
                quantized[factors.name] = factors
        else:
            held = ", ".join(f"{name}{suffix}" for suffix in parts) or "nothing"
            raise MismatchError(f"{path}: {name} is said to be {str(how)[:60]!r}, but there is {held}")
    if tensors:
        raise MismatchError(f"{path}: tensors that 'm' does not explain: {', '.join(sorted(tensors)[:8])}")
    tables = [name for name in TABLES if name in words]  # in bfloat16 once loaded; all else of a script is float32
    return QuantizedModel({}, {"casts": {"bfloat16": tables}} if tables else {}, quantized, rest)


def _correction(name: str, parts: list[Tensor], asymmetric: bool, path: Path) -> list[QuantizedTensor]:
    """Return A (out, rank) and B (rank, in) as two quantized tensors; nothing without parts."""
    if not parts:
        return []
    a, a_scale, b, b_scale = parts
    sides = ((a, a_scale, ""), (b, b_scale, "group" if asymmetric else ""))
    factors = []
    for suffix, (symbols, scale, axis) in zip(LOW_RANK, sides, strict=True):
        if symbols.ndim != 2:
            raise MismatchError(f"{path}: {name}{suffix} is {tuple(symbols.shape)}, expected a matrix")
        grid = _grid(f"{name}{suffix}", symbols, scale, axis, path)
        rows = integers(name + suffix, symbols, symbols.shape[0], path)
        factors.append(QuantizedTensor(name + suffix, rows, (grid,), tuple(symbols.shape)))
    return factors


def _grid(name: str, symbols: Tensor, scale: Tensor, axis: str, path: Path) -> ScaleFactor:
    """Return a correction's scales; their number says which axis they belong to."""
    num_scales, (rows, columns) = scale.numel(), symbols.shape
    if axis == "group" and num_scales == -(-symbols.numel() // GROUP) > 1:
        return factor(name, "group", scale, path, GROUP)
    axes: dict[int, Axis] = (
        {1: "tensor", rows: "row"} if axis == "group" else {1: "tensor", columns: "column", rows: "row"}
    )
    divides = num_scales > 0 and symbols.numel() % num_scales == 0
    if axis == "group" and num_scales not in axes and divides:  # LQER_ASYM_GROUP is a setting of the scripts
        return factor(name, "group", scale, path, symbols.numel() // num_scales)
    if num_scales not in axes:
        raise MismatchError(f"{path}: {name} has {num_scales} scales for {rows} × {columns} symbols")
    return factor(name, axes[num_scales], scale, path)
