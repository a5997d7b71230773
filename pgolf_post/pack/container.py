"""The artifact file: a quantized model in as few bytes as possible, which `pack/decode.py` turns back into it.

This file is counted against the 16,000,000 bytes, so the layout serves the codecs. Symbols of the same matrix
in every block (a *role*: all q, all mlp.fc …) have nearly one distribution and share one unit, hence one compressed
stream; so do all factors of one axis and type, and all passed-through tensors of one type.

    file       "PGLF", version 2, units to the end of the file; everything little-endian
    unit       codec u8, stored bytes u32, CRC32 u32 of those five bytes and the stored ones, stored bytes
    manifest   the first unit: JSON with config, lineage, symbols_sha256 and
      tensors  one entry each: [name, role, table, shape, dtype] of a passed-through tensor, and of a quantized one
               [name, role, table, shape, dtype, [rows, columns], trellis, factor, …]. Roles are numbered; table is the
               number of the role's context table, counted from 1, or 0 if rANS does not code it; trellis is [] or
               [lane_rows, h0 >> 1, h1 >> 1]; a factor is [axis, dtype, repeat, length]: axis 0 tensor, 1 row, 2 column,
               3 group, each value serving `repeat` weights in row-major order (0 for a column's)
      rans     [] or the shapes of states, classes and weights; codec 7 is rANS, 4 and 5 its older kinds
    the rest   in order of their keys (section, label, dtype): factors (0, axis, ·), passthrough (1, 0, ·), the coder's
               states, classes, weights and row shifts (2, 0 to 3, ·), symbols (3, role, ·)

dtype 0 is int8, 1 int16, 2 float16, 3 bfloat16's bits, 4 float32 (which only foreign artifacts have). The bytes of a
wider number differ in kind (sign and exponent against mantissa noise), so all low bytes of a unit come first, then all
high bytes, except under codec 6, an lzma that knows them apart; rANS units hold words of their own. A weight is its
symbol (or the trellis' grid point) times its factors.

The same model and settings always give the same bytes, for one version of the codec libraries: no clock, no random
state, sorted keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any
from zlib import crc32

import numpy as np
from pydantic import field_validator

from pgolf_post.base.threads import num_threads
from pgolf_post.errors import MismatchError, PgolfError, SettingsError
from pgolf_post.pack import codecs, decode
from pgolf_post.pack.coder import rans
from pgolf_post.pack.coder.contexts import Block, make_block
from pgolf_post.pack.packable import check_packable
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS, Trellis
from pgolf_post.quantize.tensor import Axis, QuantizedModel, QuantizedTensor
from pgolf_post.settings import Settings, canonical_json

AXES: tuple[Axis, ...] = ("tensor", "row", "column", "group")
INT8, INT16, FLOAT16, BFLOAT16, FLOAT32 = range(5)
FACTORS, PASSTHROUGH, CODER, SYMBOLS = range(4)  # sections
BLOCK_INDEX = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")  # no leading zeros: the number must give back the text

Key = tuple[int, int, int]  # section, label, dtype
Units = dict[Key, list[np.ndarray]]
TensorEntry = list[Any]  # [name, role, table, shape, dtype, ...]


class PackSettings(Settings):
    """Settings of packing: how a quantized model becomes bytes."""

    codec: str = codecs.RANS

    @field_validator("codec")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return codecs.check_codec(name)
        except SettingsError as error:
            raise ValueError(str(error)) from None


DEFAULT_SETTINGS = PackSettings()


def pack(
    model: QuantizedModel,
    settings: PackSettings = DEFAULT_SETTINGS,
    on_unit: Callable[[], object] | None = None,
) -> bytes:
    """Return the artifact of `model`. `on_unit` is called after each of its `count_units(model)` units is compressed.

        >>> pg.pack(pg.quantize(view, stats, pg.read_plan("rtn")))[:4]

    Raises MismatchError for what the format cannot hold, NumericsError for NaN or infinity, PgolfError over its limits.
    """
    return frame_units(pack_units(model, settings, on_unit))


def frame_units(units: Sequence[tuple[int, bytes]]) -> bytes:
    """Return the file of (codec id, stream) units."""
    return decode.MAGIC + b"".join(frame_unit(*unit) for unit in units)


def frame_unit(codec_id: int, stream: bytes) -> bytes:
    """Return one unit as stored: codec id, length, CRC32 of those and the stream, the stream."""
    checked = decode.FRAME.pack(codec_id, len(stream), 0)[:-4]
    return checked + crc32(stream, crc32(checked)).to_bytes(4, "little") + stream


def pack_units(
    model: QuantizedModel, settings: PackSettings = DEFAULT_SETTINGS, on_unit: Callable[[], object] | None = None
) -> list[tuple[int, bytes]]:
    """Return (codec id, stream) of every unit in file order."""
    check_packable(model)
    layout = Layout(model)

    # compress by the byte codecs, in threads: they release the interpreter lock
    announce = on_unit or (lambda: None)
    keys = sorted(layout.units)
    side_codec = codecs.BEST if settings.codec == codecs.RANS else settings.codec
    jobs = {key: side_codec for key in keys if key[0] != SYMBOLS or settings.codec != codecs.RANS}
    streams: dict[Key, tuple[int, bytes]] = {}
    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        for key, stream in pool.map(lambda job: (job[0], layout.compressed(*job)), jobs.items()):
            streams[key] = stream
            announce()

    # symbols by rANS; then the manifest, which names their tables
    if settings.codec in (codecs.RANS, codecs.BEST):
        code_symbols(layout, streams)
    for _ in range(len(keys) - len(jobs) + 1):
        announce()
    manifest = manifest_bytes(model, layout)
    return [codecs.compress(manifest, codecs.BEST)] + [streams[key] for key in sorted(streams)]


def count_units(model: QuantizedModel) -> int:
    """Return how many units announce that they are compressed: all but the coder's own."""
    return len(Layout(model).units) + 1


def code_symbols(layout: Layout, streams: dict[Key, tuple[int, bytes]]) -> None:
    """Code symbol units by rANS where that makes the artifact smaller; `streams` holds the alternatives, if any.

    A unit that rANS cannot take and that has no stream yet gets the best of the byte codecs.
    """
    # units whose rows are too wide for rANS
    units = [key for key in sorted(layout.units) if key[0] == SYMBOLS]
    keys = [key for key in units if layout.fits_rans(key)]
    for key in units:
        if key not in keys and key not in streams:
            streams[key] = layout.compressed(key, codecs.BEST)

    # code all others together, then once more without those that a byte codec makes smaller
    coded, expected_bits = _coded(layout, keys)
    better = [key for key in keys if key not in streams or expected_bits[key] < 8 * len(streams[key][1])]
    if better != keys:
        coded, _ = _coded(layout, better)
    if coded is None:
        return

    # keep rANS if it is smaller with its own tables and states, or if a unit has nothing else
    ours = dict(zip(better, ((codecs.RANS_ID, stream) for stream in coded.streams), strict=True))
    own = layout.coder_units(coded)
    ours |= {key: codecs.compress(to_planes(arrays, key[2]), codecs.BEST) for key, arrays in own.items()}
    stored_bytes = sum(len(stream) + decode.FRAME.size for _, stream in ours.values())
    if any(key not in streams for key in better) or stored_bytes < sum(len(streams[key][1]) for key in better):
        streams.update(ours)
        layout.use_tables(better, coded, own)


def _coded(layout: Layout, keys: Sequence[Key]) -> tuple[rans.Coded | None, dict[Key, float]]:
    """Return units coded together, and the expected bits of each, its row shifts included."""
    if not keys:
        return None, {}
    coded = rans.encode([layout.blocks(key) for key in keys])
    return coded, dict(zip(keys, coded.unit_bits, strict=True))


class Layout:
    """The tensor table of a model, and the arrays of each unit in the order in which the decoder reads them."""

    def __init__(self, model: QuantizedModel) -> None:
        self.units: Units = {}
        self.coded: dict[Key, list[QuantizedTensor]] = {}  # whose symbols those of a unit are
        self.table: list[TensorEntry] = []
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
        self.coded.setdefault(key, []).append(tensor)
        more = [[rows, columns], stored_trellis(tensor.trellis), *factors]
        self.table.append([name, role, 0, list(tensor.shape), key[2], *more])

    def raw(self, key: Key) -> bytes:
        """Return a unit's bytes before compression."""
        return to_planes(self.units[key], key[2])

    def compressed(self, key: Key, codec: str) -> tuple[int, bytes]:
        """Return (codec id, stream) of a unit; "best" tries numbers of several bytes as they lie, too."""
        stream = codecs.compress(self.raw(key), codec)
        width_bytes = decode.DTYPES[key[2]].itemsize
        if codec != codecs.BEST or width_bytes == 1:
            return stream
        return min(
            stream, codecs.compress_words(to_bytes(self.units[key], key[2]), width_bytes), key=lambda s: len(s[1])
        )

    def blocks(self, key: Key) -> list[Block]:
        """Return a unit of symbols as the entropy coder takes it."""
        return [block_of(same) for same in self._side_by_side(key)]

    def fits_rans(self, key: Key) -> bool:
        """Return whether no row of a unit is wider than the decoder allows, and there is anything to code."""
        widths = [sum(tensor.symbols.shape[1] for tensor in same) for same in self._side_by_side(key)]
        return max(widths) <= decode.MAX_WIDTH and any(array.size for array in self.units[key])

    def _side_by_side(self, key: Key) -> list[list[QuantizedTensor]]:
        """Return the tensors of a unit, those of one shape and trellis together."""
        grouped = groupby(self.coded[key], key=lambda tensor: (tensor.symbols.shape, tensor.trellis))
        return [list(same) for _, same in grouped]

    def coder_units(self, coded: rans.Coded) -> Units:
        """Return what the decoder needs beside the streams."""
        states = coded.states.astype("<u4").view(np.int8).reshape(-1, 4)
        own = {0: [states], 1: [coded.model.classes], 2: [coded.model.weights.view(np.int8)]}
        own[3] = [shifts.view(np.int8) for shifts in coded.row_shifts]
        return {(CODER, label, INT8): arrays for label, arrays in own.items()}

    def use_tables(self, keys: Sequence[Key], coded: rans.Coded, own: Units) -> None:
        """Write the numbers of their context tables into the entries of rANS-coded units; add the coder's units."""
        for entry in self.table:
            key = (SYMBOLS, entry[1], entry[4])
            if len(entry) > 5 and key in keys:
                entry[2] = 1 + coded.model.group_of[keys.index(key)]
        self.rans = [list(own[CODER, label, INT8][0].shape) for label in range(3)]
        self.units.update(own)


def block_of(tensors: Sequence[QuantizedTensor]) -> Block:
    """Return tensors of one shape and trellis side by side, with what their integer factors say about their symbols."""
    return make_block([t.symbols for t in tensors], tensors[0].trellis, [integer_steps(tensor) for tensor in tensors])


def integer_steps(tensor: QuantizedTensor) -> np.ndarray:  # (rows, columns) int16
    """Return the sum of a tensor's integer factors, in eighths of an octave."""
    shape = tensor.symbols.shape
    return sum((f.spread(*shape) for f in tensor.factors if f.is_exponent), np.zeros(shape, np.int16))


def to_planes(arrays: Sequence[np.ndarray], dtype: int) -> bytes:
    """Return arrays one after another: all lowest bytes of wider numbers, then all next ones."""
    whole, width_bytes = to_bytes(arrays, dtype), decode.DTYPES[dtype].itemsize
    return b"".join(whole[plane::width_bytes] for plane in range(width_bytes))


def to_bytes(arrays: Sequence[np.ndarray], dtype: int) -> bytes:
    """Return arrays one after another, little-endian."""
    return b"".join(np.ascontiguousarray(array, decode.DTYPES[dtype]).tobytes() for array in arrays)


def _table_order(name: str, array: np.ndarray) -> tuple[str, int, int]:
    role, block = split_role(name)
    return role, dtype_of(array), block or 0


def dtype_of(array: np.ndarray) -> int:
    """Return the format's number of an array's type."""
    return {"i1": INT8, "i2": INT16, "f2": FLOAT16, "u2": BFLOAT16, "f4": FLOAT32}[
        f"{array.dtype.kind}{array.dtype.itemsize}"
    ]


def stored_trellis(trellis: Trellis | None) -> list[int]:
    """Return [lane_rows, h0 >> 1, h1 >> 1], or [] without a trellis."""
    return [trellis.lane_rows, *(h >> 1 for h in POLYNOMIALS[trellis.states])] if trellis else []


def split_role(name: str) -> tuple[str, int | None]:
    """Return (role, block index or None): `blocks.3.attn.q.weight` is block 3 of `blocks.*.attn.q.weight`."""
    index = BLOCK_INDEX.search(name)
    if index is None:
        return name, None
    return f"{name[: index.start()]}*{name[index.end() :]}", int(index.group())


def manifest_bytes(model: QuantizedModel, layout: Layout, symbols_sha256: str = "") -> bytes:
    """Return compact JSON of everything that is not a tensor. The sha256 is computed if it is not given."""
    tree = {
        "config": dict(model.config),
        "lineage": dict(model.lineage),
        "rans": layout.rans,
        "symbols_sha256": symbols_sha256 or model.symbols_sha256(),
        "tensors": layout.table,
    }
    try:
        manifest = canonical_json(tree)
    except (TypeError, ValueError) as error:
        raise MismatchError(f"config and lineage must be plain JSON values: {error}") from None
    if len(manifest) > decode.MAX_MANIFEST:
        raise PgolfError(f"the manifest has {len(manifest):,} bytes; the limit is {decode.MAX_MANIFEST:,}")
    return manifest
