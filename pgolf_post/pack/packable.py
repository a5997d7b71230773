"""Checks of what an artifact can hold: every offender of a model is named before anything is compressed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pgolf_post.errors import MismatchError, NumericsError, PgolfError
from pgolf_post.pack import decode
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS
from pgolf_post.quantize.tensor import LOW_RANK, QuantizedModel, QuantizedTensor, ScaleFactor

MAX_TENSOR_BYTES = decode.MAX_BYTES - (1 << 20)  # the rest is for the coder's own units


def check_packable(model: QuantizedModel) -> None:
    """Refuse what the format cannot hold, listing every offender. Raises MismatchError, NumericsError, PgolfError."""
    problems = [*_table_problems(model)]
    for name, tensor in model.quantized.items():
        problems += _tensor_problems(name, tensor)
    for name, array in model.passthrough.items():
        if not is_kind(array, "f2", "u2", "f4"):
            expected = "float16, float32, or uint16 for bfloat16"
            problems.append(f"{name}: passthrough dtype {array.dtype}, expected {expected}")
    problems += _low_rank_problems(model)
    if problems:
        raise MismatchError("this model cannot be packed: " + "; ".join(problems))
    floats = {f"{name} {f.axis} factor": f.values for name, t in model.quantized.items() for f in t.factors}
    broken = [name for name, array in {**floats, **model.passthrough}.items() if not is_finite(array)]
    if broken:
        raise NumericsError(f"NaN or infinity in floats: {', '.join(broken)}")
    check_limits(model)


def check_limits(model: QuantizedModel) -> None:
    """Raise PgolfError for a model larger than the decoder accepts: 2 or 4 bytes a number, 256 a row."""
    arrays = [f.values for t in model.quantized.values() for f in t.factors] + list(model.passthrough.values())
    matrices = [tensor.symbols for tensor in model.quantized.values()]
    size = sum(max(2, array.itemsize) * array.size for array in arrays + matrices) + sum(
        256 * len(matrix) for matrix in matrices
    )
    if size > MAX_TENSOR_BYTES:
        raise PgolfError(f"the tensors have {size:,} bytes before compression; the limit is {MAX_TENSOR_BYTES:,}")


def _table_problems(model: QuantizedModel) -> Iterable[str]:
    names = [*model.quantized, *model.passthrough]
    for name in sorted(model.quantized.keys() & model.passthrough.keys()):
        yield f"{name}: both quantized and passed through"
    shapes = [t.shape for t in model.quantized.values()] + [a.shape for a in model.passthrough.values()]
    if any(length > MAX_TENSOR_BYTES for shape in shapes for length in shape):
        yield f"a tensor is longer than {MAX_TENSOR_BYTES:,} in one dimension"
    for name in names:
        if "*" in name or not name.isascii():
            yield f"{name!r}: a tensor name must be ASCII and without '*'"


def _tensor_problems(name: str, tensor: QuantizedTensor) -> Iterable[str]:
    symbols = tensor.symbols
    if tensor.name != name:
        yield f"{name}: holds a tensor named {tensor.name}"
    if symbols.ndim != 2 or not is_kind(symbols, "i1", "i2"):
        yield f"{name}: symbols are {symbols.dtype} {symbols.shape}, expected int8 or int16 (rows, columns)"
        return
    if symbols.size != int(np.prod(tensor.shape, dtype=np.int64)):
        yield f"{name}: symbols {symbols.shape} do not make a tensor of {tensor.shape}"
    if tensor.trellis and (tensor.trellis.states not in POLYNOMIALS or tensor.trellis.lane_rows < 0):
        known = ", ".join(map(str, POLYNOMIALS))
        yield f"{name}: {tensor.trellis}, expected one of {known} states and lanes of rows, or 0 for diagonals"
    for factor in tensor.factors:
        yield from _factor_problems(name, factor, *symbols.shape)


def _factor_problems(name: str, factor: ScaleFactor, rows: int, columns: int) -> Iterable[str]:
    if factor.axis == "group" and factor.group_size < 1:
        yield f"{name}: groups of {factor.group_size} weights"
        return
    lengths = {"tensor": 1, "row": rows, "column": columns, "group": -(-rows * columns // max(1, factor.group_size))}
    expected = (lengths[factor.axis],)
    if factor.values.shape != expected or not is_kind(factor.values, "i1", "i2", "f2", "f4"):
        actual = f"{factor.values.dtype} {factor.values.shape}"
        yield f"{name}: {factor.axis} factor is {actual}, expected float16, float32, int8 or int16 {expected}"


def _low_rank_problems(model: QuantizedModel) -> Iterable[str]:
    shapes = {name: array.shape for name, array in model.passthrough.items()}
    shapes |= {name: tensor.shape for name, tensor in model.quantized.items()}
    left, right = LOW_RANK
    for name in sorted(name[: -len(left)] for name in shapes if name.endswith(left)):
        parts = [shapes.get(part) for part in (name + left, name + right, name)]
        if None in parts or any(len(part or ()) != 2 for part in parts):
            yield f"{name}{left}: needs matrices {name}{right} and {name}"
        elif (parts[0][0], parts[1][1]) != parts[2] or parts[0][1] != parts[1][0]:  # type: ignore[index]
            yield f"{name}: {parts[0]} @ {parts[1]} does not make {parts[2]}"
    for name in sorted(name for name in shapes if name.endswith(right)):
        if name.removesuffix(right) + left not in shapes:
            yield f"{name}: its other half {name.removesuffix(right)}{left} is missing"


def is_kind(array: np.ndarray, *kinds: str) -> bool:
    """Return whether an array is of one of these kinds, such as "i1", whatever its byte order."""
    return f"{array.dtype.kind}{array.dtype.itemsize}" in kinds


def is_finite(array: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite; uint16 holds bfloat16."""
    if array.dtype.kind == "u":
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())
