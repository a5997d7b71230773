"""Decode a Parameter Golf artifact: one file, shipped with a submission; standard library, numpy and brotli only.

Format v1, little-endian. Header: "PGLF", version u8, unit count u16. Unit: codec u8, stored bytes u32, raw bytes u32,
CRC32 u32 of those 9 bytes and the stored bytes, stored bytes. Units: JSON manifest; int8 symbols, one unit per role
(the same matrix of every block); fp16 row scales; fp16 passthrough. fp16: all low bytes, then all high bytes. A weight
is its symbol times its row's scale.

Damaged or hostile bytes end in ArtifactError: sizes are checked against the tensor table before any array is made, and
no stream expands past its declared size.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
import sys
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import brotli
import numpy as np

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple]
MAGIC, VERSION = b"PGLF", 1
HEADER, FRAME = struct.Struct("<4sBH"), struct.Struct("<BIII")
MAX_TENSOR_BYTES = 1 << 27  # 16 MB of symbols at one bit each
MAX_TENSORS = 1 << 14
MAX_MANIFEST_BYTES = 1 << 20
LZMA: Any = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 24}]}
LIMIT = {"output_buffer_limit": 1 << 16} if hasattr(brotli.Decompressor, "can_accept_more_data") else {}
PIECE_BYTES = 4096 if LIMIT else 16  # brotli before 1.2 cannot limit its output


class ArtifactError(ValueError):
    """Not a whole, undamaged artifact of this format."""


class Artifact:
    """Arrays by tensor name, exactly as they were packed."""

    def __init__(self, manifest: dict[str, Any], symbols: Arrays, scales: Arrays, passthrough: Arrays) -> None:
        self.manifest = manifest  # config, lineage, symbols_sha256 and the tensor table
        self.symbols = symbols  # (out, in) int8
        self.scales = scales  # (out,) float16
        self.passthrough = passthrough  # float16

    @cached_property
    def tensors(self) -> Arrays:
        """Every tensor as float32."""
        tensors = {name: array.astype(np.float32) for name, array in self.passthrough.items()}
        for name, symbols in self.symbols.items():
            tensors[name] = symbols.astype(np.float32) * self.scales[name].astype(np.float32)[:, None]
        return tensors


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def decode(data: bytes) -> Artifact:
    """Decode and verify. Raises ArtifactError, and nothing else, whatever the bytes."""
    try:
        return _decode(memoryview(data))
    except Exception as error:  # hostile bytes break json, numpy and codecs in many ways
        raise ArtifactError(f"unreadable artifact: {error}") from error


def _decode(data: memoryview) -> Artifact:
    first, *units = read_units(data)
    manifest = read_manifest(first)
    roles = expand(manifest["quantized"])
    shapes, others = merge(roles), merge(expand(manifest["passthrough"]))
    merge([shapes, others])
    rows = {name: (out,) for name, (out, _) in shapes.items()}
    sizes = [*map(values, roles), 2 * values(rows), 2 * values(others)]
    need(sum(sizes) <= MAX_TENSOR_BYTES, f"declares {sum(sizes)} bytes of tensors, over {MAX_TENSOR_BYTES}")
    need([raw_bytes for _, _, raw_bytes in units] == sizes, "unit sizes differ from the table")
    *parts, scales, passthrough = (np.frombuffer(inflate(*unit), np.int8) for unit in units)
    symbols = merge([cut(part, role) for part, role in zip(parts, roles, strict=True)])
    need(symbols_sha256(symbols) == manifest["symbols_sha256"], "wrong sha256 of symbols")
    return Artifact(manifest, symbols, cut(from_planes(scales), rows), cut(from_planes(passthrough), others))


def read_units(data: memoryview) -> list[tuple]:
    """(codec, stored bytes, raw size) of every unit; checks lengths and checksums."""
    need(len(data) >= HEADER.size and data[:4] == MAGIC, "not a PGLF artifact")
    _, version, count = HEADER.unpack_from(data)
    need(version == VERSION, f"format version {version}, not {VERSION}")
    units, at = [], HEADER.size
    for number in range(count):
        start = at + FRAME.size
        need(start <= len(data), f"cut short at unit {number}")
        codec, stored_bytes, raw_bytes, crc = FRAME.unpack_from(data, at)
        end = start + stored_bytes
        need(end <= len(data), f"cut short in unit {number}")
        need(zlib.crc32(data[start:end], zlib.crc32(data[at : at + 9])) == crc, f"wrong CRC32 in unit {number}")
        units.append((codec, data[start:end], raw_bytes))
        at = end
    need(at == len(data), f"{len(data) - at} bytes after the last unit")
    return units


def read_manifest(unit: tuple) -> dict[str, Any]:
    need(unit[2] <= MAX_MANIFEST_BYTES, f"manifest of {unit[2]} bytes")
    return json.loads(bytes(inflate(*unit)))


def expand(table: list) -> list[Shapes]:
    """The shape of every tensor by name, one dict per role, in storage order.

    Row: [role, run, ...]; run: [first block, blocks, bits, *shape]; "*" in a role is the block number.
    """
    roles, left = [], MAX_TENSORS
    for role, *runs in table:
        shapes = {}
        for run in runs:
            need(all(type(n) is int and 0 <= n <= MAX_TENSOR_BYTES for n in run), f"impossible run in {role}")
            first, count, _, *shape = run
            left -= count
            need(left >= 0, f"more than {MAX_TENSORS} tensors")
            shapes.update(dict.fromkeys([role.replace("*", str(first + i)) for i in range(count)], tuple(shape)))
        roles.append(shapes)
    return roles


def merge(parts: list[dict]) -> dict:
    whole = dict(pair for part in parts for pair in part.items())
    need(len(whole) == sum(map(len, parts)), "a tensor is listed twice")
    return whole


def values(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def inflate(codec: int, stored: memoryview, raw_bytes: int) -> Any:
    """Decompress a unit to its declared size."""
    need(codec < 4, f"unknown codec {codec}")
    if codec == 0:
        raw: Any = stored
    elif codec == 1:
        raw = inflate_brotli(stored, raw_bytes)
    else:
        decoder: Any = zlib.decompressobj(-15) if codec == 3 else lzma.LZMADecompressor(**LZMA)
        raw = decoder.decompress(stored, raw_bytes + 1)
        need(decoder.eof and not decoder.unused_data, "a stream and its unit do not end together")
    need(len(raw) == raw_bytes, f"a unit does not hold its {raw_bytes} bytes")
    return raw


def inflate_brotli(stored: memoryview, raw_bytes: int) -> bytearray:
    decoder, raw = brotli.Decompressor(), bytearray()
    for start in range(0, len(stored), PIECE_BYTES):
        more = decoder.process(bytes(stored[start : start + PIECE_BYTES]), **LIMIT)
        while more:
            raw += more
            need(len(raw) <= raw_bytes, "a unit expands past its declared size")
            more = decoder.process(b"", **LIMIT)
    need(decoder.is_finished(), "cut short")
    return raw


def from_planes(planes: np.ndarray) -> np.ndarray:  # (2n,) bytes → (n,) float16
    return np.ascontiguousarray(planes.reshape(2, -1).T).view("<f2")[:, 0]


def cut(flat: np.ndarray, shapes: Shapes) -> Arrays:
    arrays, at = {}, 0
    for name, shape in shapes.items():
        start, at = at, at + math.prod(shape)
        arrays[name] = flat[start:at].reshape(shape)
    return arrays


def symbols_sha256(symbols: Arrays) -> str:
    """Hex sha256 in name order, with names and shapes."""
    digest = hashlib.sha256()
    for name in sorted(symbols):
        digest.update(f"{name}\0{symbols[name].shape}\0".encode() + symbols[name].tobytes())
    return digest.hexdigest()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python decode.py ARTIFACT")
    try:
        artifact = decode(Path(sys.argv[1]).read_bytes())
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
    for name, array in artifact.tensors.items():
        print(name, array.shape)
    print(artifact.manifest["symbols_sha256"])


if __name__ == "__main__":
    main()
