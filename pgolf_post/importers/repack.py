"""A foreign artifact's very weights in our container: what its bytes would be with these codecs, nothing else changed.

One file per format, one row in `FORMATS`. Symbols, scales and kept tensors come over as they are, so the float32
weights are bit for bit those that the script multiplies out, before it casts them to the types of its own modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pgolf_post.base.storage import sha256_file
from pgolf_post.errors import MismatchError, VerificationError
from pgolf_post.importers import int8_rows, weights_and_meta
from pgolf_post.importers.artifact_file import read_dictionary
from pgolf_post.pack.artifact import unpack
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.tensor import QuantizedModel


class ArtifactFormat(Protocol):
    """What a format's module offers."""

    def recognises(self, stored: Mapping[str, Any]) -> bool:
        """Whether this dictionary is of the format."""

    def to_quantized(self, stored: Mapping[str, Any], path: Path) -> QuantizedModel:
        """The model. Raises MismatchError for parts that do not belong together."""


FORMATS: dict[str, ArtifactFormat] = {
    "int8": int8_rows,  # the official baseline
    "w+m": weights_and_meta,  # int6 and its kin, flat and banked lines
}


@dataclass(frozen=True)
class ForeignArtifact:
    """A foreign file as symbols and factors."""

    format: str
    file_bytes: int
    model: QuantizedModel


def read_foreign_artifact(path: Path) -> ForeignArtifact:
    """Read a compressed artifact of a public script. Raises NotFoundError, DamagedFileError, MismatchError."""
    stored = read_dictionary(path)
    for name, module in FORMATS.items():
        if module.recognises(stored):
            model = module.to_quantized(stored, path)
            lineage = {**model.lineage, "source": {"format": name, "sha256": sha256_file(path)[:16]}}
            return ForeignArtifact(name, path.stat().st_size, replace(model, lineage=lineage))
    keys = ", ".join(sorted(map(str, stored))[:8])
    raise MismatchError(f"{path}: an unknown kind of artifact; its keys: {keys}. Known: {', '.join(FORMATS)}")


def repack(foreign: ForeignArtifact, codec: str = "rans") -> bytes:
    """The bytes of our artifact, decoded again and compared with the weights of the foreign one.

    Raises SettingsError for an unknown codec, VerificationError if a weight differs, and what `pack` raises.
    """
    data = pack(foreign.model, PackSettings(codec=codec))
    decoded, expected = unpack(data).tensors, foreign.model.tensors()
    differing = [name for name in expected if decoded[name].tobytes() != expected[name].tobytes()]
    if differing or decoded.keys() != expected.keys():
        raise VerificationError(f"repacked weights differ from the artifact's: {', '.join(differing)}")
    return data
