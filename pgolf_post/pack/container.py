"""The artifact file: a quantized model as the fewest bytes that `pack/decode.py` turns back into it.

What is counted against the 16,000,000 bytes is this file, so the layout serves the codecs. Symbols of the same matrix
in every block (a *role*: all q, all mlp.fc …) have nearly one distribution and share one unit, hence one compressed
stream; so do all factors of one axis and type, and all passed-through tensors of one type.

    file       "PGLF", version 2, units to the end of the file; everything little-endian
    unit       codec u8, stored bytes u32, CRC32 u32 of those five bytes and the stored ones, stored bytes
    manifest   the first unit: JSON with config, lineage, symbols_sha256 and
      tensors  one row each: [name, role, table, shape, dtype] of a passed-through tensor, and of a quantized one
               [name, role, table, shape, dtype, [rows, columns], trellis, factor, …]. Roles are numbered; table is the
               number of the role's context table, counted from 1, or 0 if rANS does not code it; trellis is [] or
               [lane_rows, h0 >> 1, h1 >> 1]; a factor is [axis, dtype, repeat, length]: axis 0 tensor, 1 row, 2 column,
               3 group, each value serving `repeat` weights in row-major order (0 for a column's)
      rans     [] or the shapes of states, classes and weights
    the rest   in order of their keys (section, label, dtype): factors (0, axis, ·), passthrough (1, 0, ·), the coder's
               states, classes, weights and row scales (2, 0 to 3, ·), symbols (3, role, ·)

dtype 0 is int8, 1 int16, 2 float16, 3 bfloat16's bits. The two bytes of a 16-bit number differ in kind (sign and
exponent against mantissa noise), so all low bytes of a unit come first, then all high bytes; rANS units hold words of
their own. A weight is its symbol (or the trellis' grid point) times its factors.

The same model and settings always give the same bytes, for one version of the codec libraries: no clock, no random
state, sorted keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from pydantic import field_validator

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.pack import codecs, decode, rans
from pgolf_post.pack.contexts import Block, make_block
from pgolf_post.quantize.tensor import LOW_RANK, Axis, Factor, QuantizedModel, QuantizedTensor
from pgolf_post.quantize.trellis import POLYNOMIALS, Trellis
from pgolf_post.settings import Settings, canonical_json
from pgolf_post.storage import atomic_file

ARTIFACT_FILE = "artifact.pgolf"
AXES: tuple[Axis, ...] = ("tensor", "row", "column", "group")
INT8, INT16, FLOAT16, BFLOAT16 = range(4)
FACTORS, PASSTHROUGH, CODER, SYMBOLS = range(4)  # sections
SECTION_NAMES = ("factors", "passthrough", "coder", "symbols")
CODER_NAMES = ("lane states", "context classes", "frequency tables", "row scales")
PASSTHROUGH_NAMES = {FLOAT16: "float16", BFLOAT16: "bfloat16"}
MAX_TENSOR_BYTES = decode.MAX_BYTES - (1 << 20)  # the rest is for the coder's own units
BLOCK_INDEX = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")  # no leading zeros: the number must give back the text

Key = tuple[int, int, int]  # section, label, dtype
Units = dict[Key, list[np.ndarray]]
TableRow = list[Any]  # [name, role, table, shape, dtype, ...]


class PackSettings(Settings):
    """How a quantized model becomes bytes."""

    codec: str = "rans"

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

    kind: str  # manifest, factors, passthrough, coder or symbols
    label: str  # role of a symbols unit, axis of factors …; empty for the manifest
    codec: str
    stored_bytes: int
    raw_bytes: int
    num_values: int  # weights, factors or passthrough values; 0 for the manifest and the coder's own


@dataclass(frozen=True)
class ArtifactFacts:
    """What a verified artifact says about itself."""

    manifest: Mapping[str, Any]  # config, lineage, symbols_sha256 and the tensor table
    units: tuple[UnitFacts, ...]  # in file order


@dataclass(frozen=True)
class Artifact:
    """A decoded file."""

    manifest: Mapping[str, Any]
    model: QuantizedModel  # as packed, its tensors' facts empty
    tensors: Mapping[str, np.ndarray]  # float32, as the decoder that ships made them

    @property
    def symbols(self) -> dict[str, np.ndarray]:
        """Symbols of the quantized tensors, (rows, columns) each."""
        return {name: tensor.symbols for name, tensor in self.model.quantized.items()}


def pack(
    model: QuantizedModel,
    settings: PackSettings = DEFAULT_SETTINGS,
    on_unit: Callable[[], object] | None = None,
) -> bytes:
    """The artifact of `model`. `on_unit` is called after each of its `count_units(model)` units is compressed.

    Raises MismatchError for what the format cannot hold, NumericsError for NaN or infinity, PgolfError over its limits.
    """
    return frame_units(pack_units(model, settings, on_unit))


def frame_units(units: Sequence[tuple[int, bytes]]) -> bytes:
    """A file of (codec id, stream) units."""
    return decode.MAGIC + b"".join(frame_unit(*unit) for unit in units)


def frame_unit(codec_id: int, stream: bytes) -> bytes:
    """One unit as stored: codec id, length, CRC32 of those and the stream, the stream."""
    checked = decode.FRAME.pack(codec_id, len(stream), 0)[:-4]
    return checked + crc32(stream, crc32(checked)).to_bytes(4, "little") + stream


def pack_units(
    model: QuantizedModel, settings: PackSettings = DEFAULT_SETTINGS, on_unit: Callable[[], object] | None = None
) -> list[tuple[int, bytes]]:
    """(codec id, stream) of every unit in file order."""
    check_packable(model)
    layout = Layout(model)
    announce = on_unit or (lambda: None)
    keys = sorted(layout.units)
    side_codec = codecs.BEST if settings.codec == codecs.RANS else settings.codec
    jobs = {key: side_codec for key in keys if key[0] != SYMBOLS or settings.codec != codecs.RANS}
    streams: dict[Key, tuple[int, bytes]] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # the codecs release the interpreter lock
        for key, stream in pool.map(lambda job: (job[0], codecs.compress(layout.raw(job[0]), job[1])), jobs.items()):
            streams[key] = stream
            announce()
    if settings.codec in (codecs.RANS, codecs.BEST):
        code_symbols(layout, streams)
    for _ in range(len(keys) - len(jobs) + 1):
        announce()
    manifest = manifest_bytes(model, layout)
    return [codecs.compress(manifest, codecs.BEST)] + [streams[key] for key in sorted(streams)]


def count_units(model: QuantizedModel) -> int:
    """How many units' compression is announced: all but the coder's own."""
    return len(Layout(model).units) + 1


def code_symbols(layout: Layout, streams: dict[Key, tuple[int, bytes]]) -> None:
    """Code symbol units by rANS where that makes the artifact smaller; `streams` holds the alternatives, if any.

    A unit that rANS cannot take and that has no stream yet gets the best of the byte codecs.
    """
    units = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    keys = [key for key in units if layout.fits_rans(key)]
    for key in units:
        if key not in keys and key not in streams:
            streams[key] = codecs.compress(layout.raw(key), codecs.BEST)
    coded, expected_bits = _coded(layout, keys)
    better = [key for key in keys if key not in streams or expected_bits[key] < 8 * len(streams[key][1])]
    if better != keys:
        coded, _ = _coded(layout, better)
    if coded is None:
        return
    ours = dict(zip(better, ((codecs.RANS_ID, stream) for stream in coded.streams), strict=True))
    own = layout.coder_units(coded)
    ours |= {key: codecs.compress(to_planes(arrays, key[2]), codecs.BEST) for key, arrays in own.items()}
    stored_bytes = sum(len(stream) + decode.FRAME.size for _, stream in ours.values())
    if any(key not in streams for key in better) or stored_bytes < sum(len(streams[key][1]) for key in better):
        streams.update(ours)
        layout.use_tables(better, coded, own)


def _coded(layout: Layout, keys: Sequence[Key]) -> tuple[rans.Coded | None, dict[Key, float]]:
    """Units coded together, and the bits expected of each, its row scales included."""
    if not keys:
        return None, {}
    coded = rans.encode([layout.blocks(key) for key in keys])
    return coded, dict(zip(keys, coded.unit_bits, strict=True))


class Layout:
    """The tensor table of a model, and the arrays of each unit in the order in which the decoder reads them."""

    def __init__(self, model: QuantizedModel) -> None:
        self.units: Units = {}
        self.trellises: dict[Key, list[Trellis | None]] = {}
        self.table: list[TableRow] = []
        self.rans: list[list[int]] = []
        self.roles = sorted({split_role(name)[0] for name in model.quantized})
        for name in sorted(model.quantized, key=lambda name: _table_order(name, model.quantized[name].symbols)):
            self._add_quantized(name, self.roles.index(split_role(name)[0]), model.quantized[name])
        for name in sorted(model.passthrough, key=lambda name: _table_order(name, model.passthrough[name])):
            array = model.passthrough[name]
            self.units.setdefault((PASSTHROUGH, 0, dtype_of(array)), []).append(array)
            self.table.append([name, 0, 0, list(array.shape), dtype_of(array)])

    def _add_quantized(self, name: str, role: int, tensor: QuantizedTensor) -> None:
        rows, columns = tensor.symbols.shape
        factors = []
        for factor in tensor.factors:
            axis, form = AXES.index(factor.axis), dtype_of(factor.values)
            repeat = (rows * columns, columns, 0, factor.group_size)[axis]
            factors.append([axis, form, repeat, factor.values.size])
            self.units.setdefault((FACTORS, axis, form), []).append(factor.values)
        key = (SYMBOLS, role, dtype_of(tensor.symbols))
        self.units.setdefault(key, []).append(tensor.symbols)
        self.trellises.setdefault(key, []).append(tensor.trellis)
        more = [[rows, columns], stored_trellis(tensor.trellis), *factors]
        self.table.append([name, role, 0, list(tensor.shape), key[2], *more])

    def raw(self, key: Key) -> bytes:
        """A unit's bytes before compression."""
        return to_planes(self.units[key], key[2])

    def blocks(self, key: Key) -> list[Block]:
        """A unit of symbols as the entropy coder takes it."""
        parts = zip(self.units[key], self.trellises[key], strict=True)
        grouped = groupby(parts, key=lambda part: (part[0].shape, part[1]))
        return [make_block([array for array, _ in same], trellis) for (_, trellis), same in grouped]

    def fits_rans(self, key: Key) -> bool:
        """Whether no row of a unit is wider than the decoder allows, and there is anything to code."""
        widths = [block.symbols.shape[1] for block in self.blocks(key)]
        return max(widths) <= decode.MAX_WIDTH and any(array.size for array in self.units[key])

    def coder_units(self, coded: rans.Coded) -> Units:
        """What the decoder needs beside the streams."""
        states = coded.states.astype("<u4").view(np.int8).reshape(-1, 4)
        own = {0: [states], 1: [coded.model.classes], 2: [coded.model.weights.view(np.int8)]}
        own[3] = [scales.view(np.int8) for scales in coded.scales]
        return {(CODER, label, INT8): arrays for label, arrays in own.items()}

    def use_tables(self, keys: Sequence[Key], coded: rans.Coded, own: Units) -> None:
        """Name the tables of rANS-coded units, and take up the coder's own."""
        for row in self.table:
            key = (SYMBOLS, row[1], row[4])
            if len(row) > 5 and key in keys:
                row[2] = 1 + coded.model.group_of[keys.index(key)]
        self.rans = [list(own[CODER, label, INT8][0].shape) for label in range(3)]
        self.units.update(own)


def to_planes(arrays: Sequence[np.ndarray], dtype: int) -> bytes:
    """Arrays one after another: all low bytes of 16-bit numbers, then all high bytes."""
    stored = decode.DTYPES[dtype]
    whole = b"".join(np.ascontiguousarray(array, stored).tobytes() for array in arrays)
    return b"".join(whole[plane :: stored.itemsize] for plane in range(stored.itemsize))


def _table_order(name: str, array: np.ndarray) -> tuple[str, int, int]:
    role, block = split_role(name)
    return role, dtype_of(array), block or 0


def dtype_of(array: np.ndarray) -> int:
    """The format's number of an array's type."""
    return {"i1": INT8, "i2": INT16, "f2": FLOAT16, "u2": BFLOAT16}[f"{array.dtype.kind}{array.dtype.itemsize}"]


def stored_trellis(trellis: Trellis | None) -> list[int]:
    """[lane_rows, h0 >> 1, h1 >> 1], or []."""
    return [trellis.lane_rows, *(h >> 1 for h in POLYNOMIALS[trellis.states])] if trellis else []


def split_role(name: str) -> tuple[str, int | None]:
    """(role, block index): `blocks.3.attn.q.weight` is block 3 of `blocks.*.attn.q.weight`; no index gives None."""
    found = BLOCK_INDEX.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}*{name[found.end() :]}", int(found.group())


def manifest_bytes(model: QuantizedModel, layout: Layout) -> bytes:
    """Compact JSON of everything that is not a tensor."""
    tree = {
        "config": dict(model.config),
        "lineage": dict(model.lineage),
        "rans": layout.rans,
        "symbols_sha256": model.symbols_sha256(),
        "tensors": layout.table,
    }
    try:
        manifest = canonical_json(tree)
    except (TypeError, ValueError) as error:
        raise MismatchError(f"config and lineage must be plain JSON values: {error}") from None
    if len(manifest) > decode.MAX_MANIFEST:
        raise PgolfError(f"the manifest has {len(manifest):,} bytes; the limit is {decode.MAX_MANIFEST:,}")
    return manifest


# what the format holds


def check_packable(model: QuantizedModel) -> None:
    """Refuse what the format cannot hold, listing every offender. Raises MismatchError, NumericsError, PgolfError."""
    problems = [*_table_problems(model)]
    for name, tensor in model.quantized.items():
        problems += _tensor_problems(name, tensor)
    for name, array in model.passthrough.items():
        if not is_kind(array, "f2", "u2"):
            problems.append(f"{name}: passthrough dtype {array.dtype}, expected float16, or uint16 for bfloat16")
    problems += _low_rank_problems(model)
    if problems:
        raise MismatchError("this model cannot be packed: " + "; ".join(problems))
    floats = {f"{name} {f.axis} factor": f.values for name, t in model.quantized.items() for f in t.factors}
    broken = [name for name, array in {**floats, **model.passthrough}.items() if not is_finite(array)]
    if broken:
        raise NumericsError(f"NaN or infinity in 16-bit floats: {', '.join(broken)}")
    check_limits(model)


def check_limits(model: QuantizedModel) -> None:
    """Raise PgolfError for a model that is larger than a decoder accepts: 2 bytes for a number, 256 for a row."""
    arrays = [f.values for t in model.quantized.values() for f in t.factors] + list(model.passthrough.values())
    matrices = [tensor.symbols for tensor in model.quantized.values()]
    size = sum(2 * array.size for array in arrays + matrices) + sum(256 * len(matrix) for matrix in matrices)
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
    if tensor.trellis and (tensor.trellis.states not in POLYNOMIALS or tensor.trellis.lane_rows < 1):
        known = ", ".join(map(str, POLYNOMIALS))
        yield f"{name}: {tensor.trellis}, expected one of {known} states and lanes of at least one row"
    for factor in tensor.factors:
        yield from _factor_problems(name, factor, *symbols.shape)


def _factor_problems(name: str, factor: Factor, rows: int, columns: int) -> Iterable[str]:
    if factor.axis == "group" and factor.group_size < 1:
        yield f"{name}: groups of {factor.group_size} weights"
        return
    lengths = {"tensor": 1, "row": rows, "column": columns, "group": -(-rows * columns // max(1, factor.group_size))}
    expected = (lengths[factor.axis],)
    if factor.values.shape != expected or not is_kind(factor.values, "i1", "i2", "f2"):
        found = f"{factor.values.dtype} {factor.values.shape}"
        yield f"{name}: {factor.axis} factor is {found}, expected float16, int8 or int16 {expected}"


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
    """Whether an array is of one of these kinds, such as "i1", whatever its byte order."""
    return f"{array.dtype.kind}{array.dtype.itemsize}" in kinds


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; uint16 holds bfloat16."""
    if array.dtype.kind == "u":
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())


# files


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
        return path.suffix == ".pgolf" or file.read(4) == decode.MAGIC[:4]


def read_artifact(path: Path) -> Artifact:
    """Decode and verify a file with the decoder that ships. Raises NotFoundError, DamagedFileError naming the file."""
    return _decode_file(path, _read_bytes(path))


def unpack(data: bytes) -> Artifact:
    """Decode an artifact's bytes. Raises decode.ArtifactError."""
    manifest, tensors, packed = decode.decode(data)
    passthrough = {name: array for name, array in packed.items() if not isinstance(array, tuple)}
    quantized = {name: _tensor(name, *parts) for name, parts in packed.items() if isinstance(parts, tuple)}
    return Artifact(manifest, QuantizedModel(manifest["config"], manifest["lineage"], quantized, passthrough), tensors)


def _tensor(name: str, symbols: np.ndarray, shape: list[int], stored: list[int], factors: list[Any]) -> QuantizedTensor:
    trellis = None
    if stored:
        states = {tuple(h >> 1 for h in both): states for states, both in POLYNOMIALS.items()}
        trellis = Trellis(states[tuple(stored[1:])], stored[0])
    made = [Factor(AXES[axis], values, repeat if axis == 3 else 0) for axis, repeat, values in factors]
    return QuantizedTensor(name, symbols, tuple(made), tuple(shape), trellis)


def read_facts(path: Path) -> ArtifactFacts:
    """The manifest and the cost of every unit; the whole file is verified. Raises NotFoundError, DamagedFileError."""
    data = _read_bytes(path)
    manifest = _decode_file(path, data).manifest
    first, *units = decode.read_units(memoryview(data))
    frame = decode.FRAME.size
    raw = len(decode.inflate(first[0], first[1], decode.MAX_MANIFEST))
    head = len(first[1]) + frame + len(decode.MAGIC)
    facts = [UnitFacts("manifest", "", codecs.codec_name(first[0]), head, raw, 0)]
    roles = {row[1]: split_role(row[0])[0] for row in manifest["tensors"] if len(row) > 5}
    for (key, parts), (codec_id, stored) in zip(decode.lay_out(manifest), units, strict=True):
        values = sum(int(np.prod(part[0], dtype=np.int64)) for part in parts)
        raw_bytes, num_values = values * decode.DTYPES[key[2]].itemsize, 0 if key[0] == CODER else values
        codec = codecs.codec_name(codec_id)
        label = label_of(key, roles)
        facts.append(UnitFacts(SECTION_NAMES[key[0]], label, codec, len(stored) + frame, raw_bytes, num_values))
    return ArtifactFacts(manifest, tuple(facts))


def label_of(key: Key, roles: Mapping[int, str]) -> str:
    """What a unit holds, for people."""
    section, label, dtype = key
    if section == FACTORS:
        return f"{AXES[label]} factors, {decode.DTYPES[dtype].name}"
    if section == PASSTHROUGH:
        return f"passthrough, {PASSTHROUGH_NAMES[dtype]}"
    return CODER_NAMES[label] if section == CODER else roles[label]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(f"no such artifact: {path}", hint="pgolf-post requant writes one") from None


def _decode_file(path: Path, data: bytes) -> Artifact:
    try:
        return unpack(data)
    except decode.ArtifactError as error:
        hint = "write it again with pgolf-post requant from the checkpoint it came from"
        raise DamagedFileError(f"{path}: {error}", hint=hint) from error
