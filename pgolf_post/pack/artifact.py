"""Artifacts on disk: written in one rename, and read back by the shipped decoder alone.

The format is that of container.py. Reading verifies the whole file: checksums, sizes, the sha256 of the symbols.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.base.paths import absent
from pgolf_post.base.storage import atomic_file
from pgolf_post.errors import DamagedFileError, NotFoundError, VerificationError
from pgolf_post.pack import codecs, decode
from pgolf_post.pack.container import AXES, BFLOAT16, CODER, FACTORS, FLOAT16, FLOAT32, PASSTHROUGH, Key, split_role
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS, Trellis
from pgolf_post.quantize.tensor import QuantizedModel, QuantizedTensor, ScaleFactor, symbols_sha256

ARTIFACT_FILE = "artifact.pgolf"
WRITE_AGAIN = "write it again with pgolf-post requant from the checkpoint it came from"
SECTION_NAMES = ("factors", "passthrough", "coder", "symbols")
CODER_NAMES = ("lane states", "context classes", "frequency tables", "row shifts")
PASSTHROUGH_NAMES = {FLOAT16: "float16", BFLOAT16: "bfloat16", FLOAT32: "float32"}


@dataclass(frozen=True)
class UnitFacts:
    """The cost of one unit of an artifact. Header and frames are included: units add up to the file."""

    kind: str  # manifest, factors, passthrough, coder or symbols
    label: str  # role of a symbols unit, axis of factors …; empty for the manifest
    codec: str
    stored_bytes: int
    raw_bytes: int
    num_values: int  # weights, factors or passthrough values; 0 for the manifest and the coder's own units


@dataclass(frozen=True)
class ArtifactFacts:
    """The manifest of a verified artifact and the cost of its units."""

    manifest: Mapping[str, Any]  # config, lineage, symbols_sha256 and the tensor table
    units: tuple[UnitFacts, ...]  # in file order


@dataclass(frozen=True)
class DecodedArtifact:
    """An artifact file as the shipped decoder reads it."""

    manifest: Mapping[str, Any]
    model: QuantizedModel  # as packed, its tensors' facts empty
    tensors: Mapping[str, np.ndarray]  # float32, the model's weights

    @property
    def symbols(self) -> dict[str, np.ndarray]:
        """The symbols of each quantized tensor, (rows, columns)."""
        return {name: tensor.symbols for name, tensor in self.model.quantized.items()}


def write_artifact(path: Path, data: bytes) -> None:
    """Write an artifact in one rename: `path` holds the old file or the whole new one. Raises PgolfError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_verified(path: Path, data: bytes, packed_sha256: str) -> DecodedArtifact:
    """Write an artifact and read it back, so that only what was decoded from disk is reported.

    Raises PgolfError, and VerificationError if the symbols read are not those whose sha256 was packed.
    """
    write_artifact(path, data)
    decoded = read_artifact(path)
    decoded_sha256 = symbols_sha256(decoded.symbols)
    if decoded_sha256 != packed_sha256:
        raise VerificationError(f"decoded symbols {decoded_sha256[:12]} are not the packed {packed_sha256[:12]}")
    return decoded


def find_artifact(path: Path) -> Path:
    """Return `path` if it is a file, or the artifact in it if it is a derived artifact folder. Raises NotFoundError."""
    file = path / ARTIFACT_FILE if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(absent(file, "artifact"), hint="pgolf-post requant writes one")
    return file


def is_artifact(path: Path) -> bool:
    """Return whether a file is, or by its suffix claims to be, one of our artifacts. Raises OSError."""
    with path.open("rb") as file:
        return path.suffix == ".pgolf" or file.read(4) == decode.MAGIC[:4]


def read_artifact(path: Path | str) -> DecodedArtifact:
    """Decode and verify a file with the shipped decoder.

        >>> pg.read_artifact("artifact.pgolf").manifest["config"]["family"]

    Raises NotFoundError, or DamagedFileError naming the file.
    """
    path = Path(path)
    return _decode_file(path, _read_bytes(path))


def unpack(data: bytes) -> DecodedArtifact:
    """Decode an artifact's bytes.

        >>> pg.unpack(pg.pack(model)).tensors["tok_emb.weight"].shape

    Raises DamagedFileError for bytes that are no artifact, or not as they were written.
    """
    try:
        manifest, tensors, packed = decode.decode(data)
    except decode.ArtifactError as error:
        raise DamagedFileError(str(error), hint=WRITE_AGAIN) from error
    passthrough = {name: array for name, (array, *more) in packed.items() if not more}
    quantized = {name: _tensor(name, symbols, *more) for name, (symbols, *more) in packed.items() if more}
    return DecodedArtifact(
        manifest, QuantizedModel(manifest["config"], manifest["lineage"], quantized, passthrough), tensors
    )


def _tensor(
    name: str,
    symbols: np.ndarray,
    stored: list[int],
    _table: int,
    factors: list[Any],
    _row_shifts: Any,
    shape: list[int],
) -> QuantizedTensor:
    """Return a tensor from the parts that `decode.lay_out` keeps of it."""
    trellis = None
    if stored:
        states = {tuple(h >> 1 for h in both): states for states, both in POLYNOMIALS.items()}
        trellis = Trellis(states[tuple(stored[1:])], stored[0])
    stored_factors = [
        ScaleFactor(AXES[axis], values, repeat if axis == 3 else 0) for axis, repeat, (values,) in factors
    ]
    return QuantizedTensor(name, symbols, tuple(stored_factors), tuple(shape), trellis)


def read_facts(path: Path) -> ArtifactFacts:
    """Return a verified file's manifest and the cost of every unit. Raises NotFoundError, DamagedFileError."""
    data = _read_bytes(path)
    manifest = _decode_file(path, data).manifest

    # the manifest, with the file's head
    first, *units = decode.read_units(memoryview(data))
    frame = decode.FRAME.size
    raw = len(decode.inflate(first[0], first[1], decode.MAX_MANIFEST))
    head = len(first[1]) + frame + len(decode.MAGIC)
    facts = [UnitFacts("manifest", "", codecs.codec_name(first[0]), head, raw, 0)]

    # the other units, in the order of their keys
    roles = {entry[1]: split_role(entry[0])[0] for entry in manifest["tensors"] if len(entry) > 5}
    for (key, parts), (codec_id, stored) in zip(sorted(decode.lay_out(manifest)[0].items()), units, strict=True):
        values = sum(int(np.prod(part[0], dtype=np.int64)) for part in parts)
        raw_bytes, num_values = values * decode.DTYPES[key[2]].itemsize, 0 if key[0] == CODER else values
        codec = codecs.codec_name(codec_id)
        label = label_of(key, roles)
        facts.append(UnitFacts(SECTION_NAMES[key[0]], label, codec, len(stored) + frame, raw_bytes, num_values))
    return ArtifactFacts(manifest, tuple(facts))


def label_of(key: Key, roles: Mapping[int, str]) -> str:
    """Return what a unit holds, in words for a table."""
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
        raise NotFoundError(absent(path, "artifact"), hint="pgolf-post requant writes one") from None


def _decode_file(path: Path, data: bytes) -> DecodedArtifact:
    try:
        return unpack(data)
    except DamagedFileError as error:
        raise DamagedFileError(f"{path}: {error}", hint=error.hint) from error
