"""Bytes per tensor of an artifact: the file's size, attributed to its tensors to the last byte.

Codecs compress many tensors as one unit, so a tensor's bytes are an attribution by the cost of coding its values: in a
unit coded by rANS, -log2 of every symbol's frequency in its own context, escapes included; in any other, -log2 of every
byte's frequency in the whole unit. Symbols, factors and row shifts of a tensor count together. The *container* is what
belongs to no tensor: the manifest and the coder's tables and states. The table adds up to the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pgolf_post.pack import decode
from pgolf_post.pack.artifact import DecodedArtifact, read_artifact
from pgolf_post.pack.coder import contexts
from pgolf_post.pack.coder.contexts import Block
from pgolf_post.pack.coder.frequency_tables import ESCAPE_BITS, TOTAL, frequencies
from pgolf_post.pack.coder.row_shifts import with_stored_residuals
from pgolf_post.pack.container import CODER, FACTORS, INT8, PASSTHROUGH, SYMBOLS, Key, block_of, split_role
from pgolf_post.quantize.tensor import QuantizedModel

CONTAINER = "container"
ROW_SHIFTS: Key = (CODER, 3, INT8)
Parts = dict[Key, list[tuple[str, np.ndarray]]]  # per unit: the tensors it serves, with their values, in stored order


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of a tensor, of all tensors of a role, or of the container."""

    name: str
    role: str
    num_weights: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """None where there are no weights."""
        return 8 * self.stored_bytes / self.num_weights if self.num_weights else None


def tensor_table(path: Path) -> list[TensorBytes]:
    """Return every tensor of an artifact in name order, then the container. Raises NotFoundError, DamagedFileError."""
    # the streams by key, and the tensors that each serves
    artifact = read_artifact(path)
    data = path.read_bytes()
    _, *units = decode.read_units(memoryview(data))
    streams = dict(zip(sorted(decode.lay_out(artifact.manifest)[0]), units, strict=True))
    parts = parts_of(artifact.manifest["tensors"], artifact.model)
    if ROW_SHIFTS in streams:
        parts[ROW_SHIFTS] = row_shifts(artifact.manifest["tensors"], _raw(streams[ROW_SHIFTS], 1 << 27))

    # share each unit's bytes out to its tensors
    owned = dict.fromkeys([*artifact.model.quantized, *artifact.model.passthrough], 0)
    for key, (codec_id, stream) in streams.items():
        if key in parts:
            is_rans = codec_id in decode.RANS
            costs = rans_costs(key, parts, artifact, streams) if is_rans else byte_costs(parts[key])
            shares = share_out(len(stream) + decode.FRAME.size, costs)
            for (name, _), share in zip(parts[key], shares, strict=True):
                owned[name] += share

    # what no tensor owns is the container's
    sizes = {name: tensor.symbols.size for name, tensor in artifact.model.quantized.items()}
    sizes |= {name: array.size for name, array in artifact.model.passthrough.items()}
    rows = [TensorBytes(name, split_role(name)[0], sizes[name], owned[name]) for name in sorted(owned)]
    return [*rows, TensorBytes(CONTAINER, CONTAINER, 0, len(data) - sum(owned.values()))]


def role_table(rows: Sequence[TensorBytes]) -> list[TensorBytes]:
    """Return the bytes of each role, the largest first."""
    roles: dict[str, tuple[int, int]] = {}
    for row in rows:
        weights, stored = roles.get(row.role, (0, 0))
        roles[row.role] = (weights + row.num_weights, stored + row.stored_bytes)
    return sorted((TensorBytes(role, role, *sums) for role, sums in roles.items()), key=lambda row: -row.stored_bytes)


def share_out(total: int, costs: Sequence[float]) -> list[int]:
    """Return integers in proportion to the costs that add up to the total: floors, then the largest remainders."""
    whole = sum(costs)
    exact = [total * cost / whole for cost in costs] if whole > 0 else [total / len(costs)] * len(costs)
    shares = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def parts_of(table: Sequence[Any], model: QuantizedModel) -> Parts:
    """Return every unit's tensors and values, by the artifact's tensor table."""
    parts: Parts = {}
    for name, role, _, _, dtype, *more in table:
        if not more:
            parts.setdefault((PASSTHROUGH, 0, dtype), []).append((name, model.passthrough[name]))
            continue
        tensor = model.quantized[name]
        for (axis, form, *_), factor in zip(more[2:], tensor.factors, strict=True):
            parts.setdefault((FACTORS, axis, form), []).append((name, factor.values))
        parts.setdefault((SYMBOLS, role, dtype), []).append((name, tensor.symbols))
    return parts


def row_shifts(table: Sequence[Any], raw: bytes) -> list[tuple[str, np.ndarray]]:
    """Return every rANS-coded tensor with the shifts of its rows."""
    coded = [(name, more[0][0]) for name, _, group, _, _, *more in table if more and group]
    ends = np.cumsum([rows for _, rows in coded])[:-1]
    return [(name, part) for (name, _), part in zip(coded, np.split(np.frombuffer(raw, np.uint8), ends), strict=True)]


def _raw(unit: tuple[int, memoryview], limit: int) -> bytes:
    return bytes(decode.inflate(*unit, limit))


def byte_costs(parts: Sequence[tuple[str, np.ndarray]]) -> list[float]:
    """Return the bits of every tensor's bytes by their frequencies in the whole unit, each byte of a number alone."""
    planes = [
        np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).reshape(-1, array.itemsize) for _, array in parts
    ]
    bits = np.zeros(len(parts))
    for plane in range(planes[0].shape[1]):
        counts = np.stack([np.bincount(part[:, plane], minlength=256) for part in planes])  # (tensors, 256)
        total = counts.sum(axis=0)
        bits += counts @ -np.log2(np.maximum(total, 1) / max(1, total.sum()))
    return [float(cost) for cost in bits]


def rans_costs(
    key: Key, parts: Parts, artifact: DecodedArtifact, streams: dict[Key, tuple[int, memoryview]]
) -> list[float]:
    """Return the bits of every tensor's symbols by the tables that the artifact stores."""
    # the stored tables, as bits per entry
    shapes = artifact.manifest["rans"]
    classes, weights = (
        np.frombuffer(_raw(streams[CODER, label, INT8], 1 << 27), dtype).reshape(shapes[label])
        for label, dtype in ((1, np.int8), (2, np.uint8))
    )
    bits = -np.log2(np.maximum(frequencies(weights), 1e-9) / TOTAL)  # (contexts, width)

    # walk the tensors in the blocks that the coder made of them
    entries = {entry[0]: entry for entry in artifact.manifest["tensors"]}
    shifts = dict(parts[ROW_SHIFTS])
    costs: list[float] = []

    def kind_of(part: tuple[str, np.ndarray]) -> tuple[list[int], list[int], int]:
        _, _, table, _, _, shape, trellis, *_ = entries[part[0]]
        return shape, trellis, table

    for (_, _, group), same in groupby(parts[key], key=kind_of):
        names = [name for name, _ in same]
        tensors = [artifact.model.quantized[name] for name in names]
        stored = np.stack([shifts[name] for name in names])
        block = replace(block_of(tensors), row_shifts=stored, kind=streams[key][0])
        costs += _block_costs(with_stored_residuals(block), classes[group - 1], bits)
    return costs


def _block_costs(block: Block, classes: np.ndarray, bits: np.ndarray) -> list[float]:
    """Return the bits of every tensor of a block: its columns' symbols, escapes at 16 bits more."""
    levels, odds = contexts.levels_of(block)
    width = bits.shape[1]
    costs = np.zeros(block.symbols.shape[1])
    for row, residuals in enumerate(block.residuals):
        entries = residuals.astype(np.int64) + width // 2
        context = 2 * classes[levels[row]].astype(np.int64) + odds[row]
        inside = (entries > 0) & (entries < width)
        known = inside & (bits[context, np.where(inside, entries, 0)] < ESCAPE_BITS)
        costs += np.where(known, bits[context, np.where(known, entries, 0)], 0)
        costs += np.where(known, 0, bits[context, 0] + ESCAPE_BITS)
    return [float(part.sum()) for part in np.split(costs, len(block.row_shifts))]
