"""Repack: the weights of a foreign artifact in our container, to see what other codecs make of the same symbols.

One file per format, one row of `ARTIFACT_FORMATS`. Symbols, scales and kept tensors come over as they are, so the
float32 weights are bit for bit those that the script multiplies out, before it casts them to its modules' types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pgolf_post.base.storage import sha256_file
from pgolf_post.errors import MismatchError, VerificationError
from pgolf_post.importers import int8_rows, weights_and_meta
from pgolf_post.importers.artifact_file import read_dictionary
from pgolf_post.pack.artifact import unpack
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.tensor import QuantizedModel


class ArtifactFormat(NamedTuple):
    """One layout of the dictionary in a compressed artifact."""

    recognises: Callable[[Mapping[str, Any]], bool]
    to_quantized: Callable[[Mapping[str, Any], Path], QuantizedModel]  # MismatchError for parts that do not fit
    source: str


ARTIFACT_FORMATS: dict[str, ArtifactFormat] = {
    # name: ArtifactFormat(recognises, to quantized, source)
    "int8": ArtifactFormat(
        int8_rows.recognises, int8_rows.to_quantized, "openai/parameter-golf: the baseline's final_model.int8.ptz"
    ),
    "w+m": ArtifactFormat(
        weights_and_meta.recognises, weights_and_meta.to_quantized,
        "openai/parameter-golf: final_model.int6.ptz and its kin, flat and banked lines",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ForeignArtifact:
    """A foreign artifact file as symbols and factors."""

    format: str
    file_bytes: int
    model: QuantizedModel


def read_foreign_artifact(path: Path) -> ForeignArtifact:
    """Read a compressed artifact of a public script. Raises NotFoundError, DamagedFileError, MismatchError."""
    stored = read_dictionary(path)
    for name, form in ARTIFACT_FORMATS.items():
        if form.recognises(stored):
            model = form.to_quantized(stored, path)
            lineage = {**model.lineage, "source": {"format": name, "sha256": sha256_file(path)[:16]}}
            return ForeignArtifact(name, path.stat().st_size, replace(model, lineage=lineage))
    keys = ", ".join(sorted(map(str, stored))[:8])
    raise MismatchError(f"{path}: an unknown kind of artifact; its keys: {keys}. Known: {', '.join(ARTIFACT_FORMATS)}")


def repack(foreign: ForeignArtifact, codec: str = "rans") -> bytes:
    """Return the bytes of our artifact, decoded again and compared with the weights of the foreign one.

    Raises SettingsError for an unknown codec, VerificationError if a weight differs, and what `pack` raises.
    """
    data = pack(foreign.model, PackSettings(codec=codec))
    decoded, expected = unpack(data).tensors, foreign.model.tensors()
    differing = [name for name in expected if decoded[name].tobytes() != expected[name].tobytes()]
    if differing or decoded.keys() != expected.keys():
        raise VerificationError(f"repacked weights differ from the artifact's: {', '.join(differing)}")
    return data
