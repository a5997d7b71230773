"""The bytes of a packed script, part by part.

A compressor shares what parts have in common, so parts have no bytes of their own. The cost of a part is what the
packed file loses without it; what no part alone accounts for is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgolf_post.submit.amalgamate import Amalgam
from pgolf_post.submit.packed import packed

GROUPS = (  # prefix of a module, what it is called; first match wins
    ("pgolf_post.pack", "decoder and packer"),
    ("pgolf_post.score.ttt", "test-time training"),
    ("pgolf_post.score", "scoring"),
    ("pgolf_post.data", "text and bytes"),
    ("pgolf_post.quantize", "quantization"),
    ("pgolf_post.calibrate", "calibration"),
    ("pgolf_post.submit", "the program itself"),
    ("pgolf_post", "ground"),
)
MODEL = "model"


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one group of definitions."""

    name: str
    source_bytes: int
    packed_bytes: int  # that the packed file loses without it


def explain(amalgam: Amalgam) -> list[PartBytes]:
    """Return what each group of definitions costs in the packed file, the largest first; what they share last."""
    whole = len(packed(amalgam.source).data)
    rows = []
    for group in dict.fromkeys(group_of(part.module) for part in amalgam.parts):
        own = [part for part in amalgam.parts if group_of(part.module) == group]
        rest = Amalgam(amalgam.imports, tuple(p for p in amalgam.parts if p not in own), amalgam.start)
        source = sum(len(part.source.encode()) for part in own)
        rows.append(PartBytes(group, source, whole - len(packed(rest.source).data)))
    rows.sort(key=lambda row: -row.packed_bytes)
    shared = whole - sum(row.packed_bytes for row in rows)
    total = len(amalgam.source.encode())
    return [*rows, PartBytes("imports, wrapper, shared", total - sum(r.source_bytes for r in rows), shared)]


def group_of(module: str) -> str:
    """Return the group that a module's definitions are counted in."""
    return next((name for prefix, name in GROUPS if f"{module}.".startswith(f"{prefix}.")), MODEL)
