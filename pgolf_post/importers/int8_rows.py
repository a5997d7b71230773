"""The baseline's `final_model.int8.ptz`: zlib of int8 rows with a scale each, and everything small as it was.

__quant_format__    "int8_clean_per_row_v1"
quantized, scales   name → int8 tensor; its float16 scales, one per row, or one float32 scale in all
passthrough         name → float16, or float32 for control tensors
dtypes, passthrough_orig_dtypes
                    name → type that the script casts to after it has multiplied
qmeta               restates the scales
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.errors import MismatchError
from pgolf_post.importers.artifact_file import kept, matrix, tensors_of
from pgolf_post.quantize.tensor import QuantizedModel

FORMAT = "int8_clean_per_row_v1"
KEYS = {"quantized", "scales", "passthrough", "dtypes"}
OPTIONAL = {"__quant_format__", "qmeta", "passthrough_orig_dtypes"}


def recognises(stored: Mapping[str, Any]) -> bool:
    """Return whether a dictionary names a quantization format."""
    return "__quant_format__" in stored


def to_quantized(stored: Mapping[str, Any], path: Path) -> QuantizedModel:
    """Return symbols, scales and kept tensors; the lineage says what is cast to other types than float32.

    Raises MismatchError for other versions and for parts that do not belong together.
    """
    if stored["__quant_format__"] != FORMAT:
        raise MismatchError(f"{path}: __quant_format__ is {stored['__quant_format__']!r}, expected {FORMAT!r}")
    odd = [f"missing {key}" for key in sorted(KEYS - stored.keys())]
    types = [stored.get("dtypes"), stored.get("passthrough_orig_dtypes", {})]
    odd += [f"types in a {type(part).__name__}" for part in types if not isinstance(part, Mapping)]
    odd += [f"unknown {key}" for key in sorted(map(str, stored.keys() - KEYS - OPTIONAL))]
    symbols, scales, rest = (
        {} if odd else tensors_of(stored, key, path) for key in ("quantized", "scales", "passthrough")
    )
    odd += [f"{name} has symbols or scales alone" for name in sorted(symbols.keys() ^ scales.keys())]
    odd += [f"{name} is both quantized and kept" for name in sorted(symbols.keys() & rest.keys())]
    if odd:
        raise MismatchError(f"{path} is no whole artifact: {'; '.join(odd)}")
    casts = _casts({name: dtype for part in types for name, dtype in part.items()})
    quantized = {name: matrix(name, symbols[name], scales[name], path) for name in symbols}
    return QuantizedModel({}, {"casts": casts}, quantized, {name: kept(name, rest[name], path) for name in rest})


def _casts(dtypes: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Return type → tensors that the script casts to it last, float32 left out; our decoder leaves this to it."""
    casts: dict[str, list[str]] = {}
    for name, dtype in sorted((str(name), str(dtype).removeprefix("torch.")) for name, dtype in dtypes.items()):
        if dtype != "float32":
            casts.setdefault(dtype, []).append(name)
    return casts
