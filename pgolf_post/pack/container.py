"""The artifact file: a quantized model as the fewest bytes that `pack/decode.py` turns back into it.

What is counted against the 16,000,000 bytes is this file, so the layout serves the codecs. Symbols of the same matrix
in every block (a *role*: all q, all mlp.fc …) have nearly one distribution and share one unit, hence one compressed
stream. The two bytes of an fp16 differ in kind (sign and exponent against mantissa noise), so all low bytes come first,
then all high bytes. The tensor table names a role once, `blocks.*.attn.q.weight`, and lists runs of blocks; offsets
follow from the shapes.

The layout itself is described at the top of `pack/decode.py`, the only place that can read it. The same model and
settings always give the same bytes, for one version of the codec libraries: no clock, no random state, sorted keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from pydantic import field_validator

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.pack import codecs, decode
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor
from pgolf_post.settings import Settings, canonical_json
from pgolf_post.storage import atomic_file

ARTIFACT_FILE = "artifact.pgolf"
MANIFEST_CODEC = "brotli"  # JSON always compresses, whatever the tensors' codec
PASSTHROUGH_BITS = 16
BITS_RANGE = range(2, 9)
VALUE_BYTES = {"symbols": 1, "scales": 2, "passthrough": 2}  # of one value before compression
BLOCK_INDEX = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")  # no leading zeros: the number must give back the text

TableRow = list[Any]  # [role, [first block, blocks, bits, *shape], ...]


class PackSettings(Settings):
    """How a quantized model becomes bytes."""

    codec: str = "brotli"

    @field_validator("codec")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return codecs.check_codec(name)
        except SettingsError as error:
            raise ValueError(str(error)) from None


DEFAULT_SETTINGS = PackSettings()


@dataclass(frozen=True)
class UnitFacts:
    """What one unit of an artifact costs. Header and frames are included: units add up to the file."""

    kind: str  # manifest, symbols, scales or passthrough
    role: str  # of a symbols unit; else empty
    codec: str
    stored_bytes: int
    raw_bytes: int
    num_values: int  # weights, scales or passthrough values; 0 for the manifest


@dataclass(frozen=True)
class ArtifactFacts:
    """What a verified artifact says about itself."""

    manifest: Mapping[str, Any]  # config, lineage, symbols_sha256 and the tensor table
    units: tuple[UnitFacts, ...]  # in file order


def pack(
    model: QuantizedModel,
    settings: PackSettings = DEFAULT_SETTINGS,
    on_unit: Callable[[], object] | None = None,
) -> bytes:
    """The artifact of `model`. `on_unit` is called after each of its `count_units(model)` units is compressed.

    Raises MismatchError for what the format cannot hold, NumericsError for NaN or infinity, PgolfError over its limits.
    """
    check_packable(model)
    table, other_table = quantized_table(model), passthrough_table(model)
    manifest = _manifest_bytes(model, table, other_table)
    jobs = [(manifest, MANIFEST_CODEC)]
    jobs += [(raw, settings.codec) for raw in _tensor_units(model, table, other_table)]
    units = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # the codecs release the interpreter lock
        for unit in pool.map(lambda job: frame_unit(*job), jobs):
            units.append(unit)
            if on_unit is not None:
                on_unit()
    return decode.HEADER.pack(decode.MAGIC, decode.VERSION, len(units)) + b"".join(units)


def count_units(model: QuantizedModel) -> int:
    """How many units the artifact of `model` has: the manifest, one per role, row scales and passthrough."""
    return len({split_role(name)[0] for name in model.quantized}) + 3


def frame_unit(raw: bytes, codec: str) -> bytes:
    """One unit as stored: codec id, stored length, raw length, CRC32 of those three and the stream, the stream."""
    codec_id, stream = codecs.compress(raw, codec)
    checked = decode.FRAME.pack(codec_id, len(stream), len(raw), 0)[:-4]
    return checked + crc32(stream, crc32(checked)).to_bytes(4, "little") + stream


def split_role(name: str) -> tuple[str, int | None]:
    """(role, block index): `blocks.3.attn.q.weight` is block 3 of `blocks.*.attn.q.weight`; no index gives None."""
    found = BLOCK_INDEX.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}*{name[found.end() :]}", int(found.group())


def quantized_table(model: QuantizedModel) -> list[TableRow]:
    """The tensor table of the quantized matrices."""
    return _table({name: (int(tensor.bits), tensor.symbols.shape) for name, tensor in model.quantized.items()})


def passthrough_table(model: QuantizedModel) -> list[TableRow]:
    """The tensor table of the tensors kept in fp16."""
    return _table({name: (PASSTHROUGH_BITS, array.shape) for name, array in model.passthrough.items()})


def _table(tensors: Mapping[str, tuple[int, tuple[int, ...]]]) -> list[TableRow]:
    """Rows in role order; in a row, blocks that follow each other with equal bits and shape make one run."""
    rows: dict[str, TableRow] = {}
    for (role, index), (bits, shape) in sorted((_sort_key(name), kind) for name, kind in tensors.items()):
        runs = rows.setdefault(role, [role])
        last = runs[-1]
        if len(runs) > 1 and last[0] + last[1] == index and last[2:] == [bits, *shape]:
            last[1] += 1
        else:
            runs.append([index, 1, bits, *shape])
    return list(rows.values())


def _sort_key(name: str) -> tuple[str, int]:
    role, index = split_role(name)
    return role, index or 0


def _manifest_bytes(model: QuantizedModel, table: list[TableRow], other_table: list[TableRow]) -> bytes:
    """Compact JSON of everything that is not a tensor."""
    tree = {
        "config": dict(model.config),
        "lineage": dict(model.lineage),
        "passthrough": other_table,
        "quantized": table,
        "symbols_sha256": model.symbols_sha256(),
    }
    try:
        manifest = canonical_json(tree)
    except (TypeError, ValueError) as error:
        raise MismatchError(f"config and lineage must be plain JSON values: {error}") from None
    if len(manifest) > decode.MAX_MANIFEST_BYTES:
        raise PgolfError(f"the manifest has {len(manifest):,} bytes; the limit is {decode.MAX_MANIFEST_BYTES:,}")
    return manifest


def _tensor_units(model: QuantizedModel, table: list[TableRow], other_table: list[TableRow]) -> list[bytes]:
    """Raw bytes of the units after the manifest, in the order in which the decoder reads the table."""
    roles = [list(role) for role in decode.expand(table)]
    names = [name for role in roles for name in role]
    others = [name for role in decode.expand(other_table) for name in role]
    units = [b"".join(_row_major(model.quantized[name].symbols, "i1") for name in role) for role in roles]
    units.append(to_planes(b"".join(_row_major(model.quantized[name].row_scales, "<f2") for name in names)))
    units.append(to_planes(b"".join(_row_major(model.passthrough[name], "<f2") for name in others)))
    total = sum(map(len, units))
    if total > decode.MAX_TENSOR_BYTES:
        raise PgolfError(
            f"the tensors have {total:,} bytes before compression; the limit is {decode.MAX_TENSOR_BYTES:,}"
        )
    return units


def _row_major(array: np.ndarray, dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def to_planes(halves: bytes) -> bytes:  # n little-endian fp16 → n low bytes, then n high bytes
    """Separate the two bytes of every fp16; `decode.from_planes` is the inverse."""
    return halves[0::2] + halves[1::2]


def check_packable(model: QuantizedModel) -> None:
    """Refuse what the format cannot hold, listing every offender. Raises MismatchError, NumericsError, PgolfError."""
    problems = [*_table_problems(model)]
    for name, tensor in model.quantized.items():
        problems += _tensor_problems(name, tensor)
    for name, array in model.passthrough.items():
        if not _is_float16(array):
            problems.append(f"{name}: passthrough dtype {array.dtype}, expected float16")
    if problems:
        raise MismatchError("this model cannot be packed: " + "; ".join(problems))
    scales = {f"{name} row_scales": tensor.row_scales for name, tensor in model.quantized.items()}
    broken = [name for name, array in {**scales, **model.passthrough}.items() if not np.isfinite(array).all()]
    if broken:
        raise NumericsError(f"NaN or infinity in fp16 (largest value 65504): {', '.join(broken)}")


def _table_problems(model: QuantizedModel) -> Iterable[str]:
    names = [*model.quantized, *model.passthrough]
    if len(names) > decode.MAX_TENSORS:
        yield f"{len(names)} tensors; the limit is {decode.MAX_TENSORS}"
    for name in sorted(model.quantized.keys() & model.passthrough.keys()):
        yield f"{name}: both quantized and passed through"
    shapes = [t.symbols.shape for t in model.quantized.values()] + [a.shape for a in model.passthrough.values()]
    if any(length > decode.MAX_TENSOR_BYTES for shape in shapes for length in shape):
        yield f"a tensor is longer than {decode.MAX_TENSOR_BYTES:,} in one dimension"
    for name in names:
        if "*" in name or not name.isascii():
            yield f"{name!r}: a tensor name must be ASCII and without '*'"


def _tensor_problems(name: str, tensor: QuantizedTensor) -> Iterable[str]:
    symbols, scales = tensor.symbols, tensor.row_scales
    if tensor.name != name:
        yield f"{name}: holds a tensor named {tensor.name}"
    if symbols.ndim != 2 or symbols.dtype != np.int8:
        yield f"{name}: symbols are {symbols.dtype} {symbols.shape}, expected int8 (out, in)"
    elif scales.shape != symbols.shape[:1] or not _is_float16(scales):
        yield f"{name}: row_scales are {scales.dtype} {scales.shape}, expected float16 ({symbols.shape[0]},)"
    elif tensor.bits not in BITS_RANGE:
        yield f"{name}: {tensor.bits} bits, expected {BITS_RANGE[0]} to {BITS_RANGE[-1]}"
    elif symbols.size and (largest := int(np.abs(symbols.astype(np.int16)).max())) > 2 ** (tensor.bits - 1) - 1:
        yield f"{name}: symbol ±{largest} at {tensor.bits} bits, the limit is ±{2 ** (tensor.bits - 1) - 1}"


def _is_float16(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and array.dtype.itemsize == 2


def write_artifact(path: Path, data: bytes) -> None:
    """Write an artifact in one rename: `path` holds the old file or the whole new one. Raises PgolfError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def find_artifact(path: Path) -> Path:
    """`path` if it is a file, or the artifact inside it if it is a derived artifact folder. Raises NotFoundError."""
    found = path / ARTIFACT_FILE if path.is_dir() else path
    if not found.is_file():
        raise NotFoundError(f"no such artifact: {found}", hint="pgolf-post requant writes one")
    return found


def is_artifact(path: Path) -> bool:
    """Whether a file is, or by its suffix claims to be, one of our artifacts. Raises OSError."""
    with path.open("rb") as file:
        return path.suffix == ".pgolf" or file.read(len(decode.MAGIC)) == decode.MAGIC


def read_artifact(path: Path) -> decode.Artifact:
    """Decode and verify a file with the decoder that ships. Raises NotFoundError, DamagedFileError naming the file."""
    return _decode_file(path, _read_bytes(path))


def read_facts(path: Path) -> ArtifactFacts:
    """The manifest and the cost of every unit; the whole file is verified. Raises NotFoundError, DamagedFileError."""
    data = _read_bytes(path)
    manifest = _decode_file(path, data).manifest
    roles = [row[0] for row in manifest["quantized"]]
    kinds = [("manifest", ""), *(("symbols", role) for role in roles), ("scales", ""), ("passthrough", "")]
    units = decode.read_units(memoryview(data))
    facts = [_unit_facts(*kind, *unit) for kind, unit in zip(kinds, units, strict=True)]
    return ArtifactFacts(manifest, tuple(facts))


def _unit_facts(kind: str, role: str, codec_id: int, stored: memoryview, raw_bytes: int) -> UnitFacts:
    framed_bytes = len(stored) + decode.FRAME.size + (decode.HEADER.size if kind == "manifest" else 0)
    num_values = raw_bytes // VALUE_BYTES[kind] if kind in VALUE_BYTES else 0
    return UnitFacts(kind, role, codecs.codec_name(codec_id), framed_bytes, raw_bytes, num_values)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(f"no such artifact: {path}", hint="pgolf-post requant writes one") from None


def _decode_file(path: Path, data: bytes) -> decode.Artifact:
    try:
        return decode.decode(data)
    except decode.ArtifactError as error:
        hint = "write it again with pgolf-post requant from the checkpoint it came from"
        raise DamagedFileError(f"{path}: {error}", hint=hint) from error
