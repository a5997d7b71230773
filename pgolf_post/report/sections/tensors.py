"""Bytes of an artifact: a treemap of roles and tensors, for the best artifact that fits.

Sharing a file's bytes out to its tensors decodes it, which takes long for a large model; so the table is kept under
`derived/bytes` beside the artifact, by the file's content, and the next report reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import hushed
from pgolf_post.base.storage import read_json, sha256_file, write_json
from pgolf_post.derived import Stage
from pgolf_post.errors import PgolfError
from pgolf_post.pack.artifact import find_artifact
from pgolf_post.pack.report.tensor_bytes import CONTAINER, TensorBytes, role_table, tensor_table
from pgolf_post.report.blocks import Cell, Figure, Section, Table, label, number
from pgolf_post.report.points import main_text
from pgolf_post.report.subject import Subject

BYTES = Stage("bytes", 1, "tensors.json")
HEADER = ("tensor", "role", "weights", "bytes", "share", "bits per weight")
WHOLE = "artifact"


def tensors(subject: Subject) -> Section | None:
    """Return the section of one artifact's bytes: of the lowest bits per byte that fits, else of the newest."""
    chosen = chosen_artifact(subject)
    if chosen is None:
        return None
    name, path = chosen
    try:
        rows = kept_table(path)
    except PgolfError as error:
        return Section(
            "bytes", "Where the bytes went", [Table(f"{name} cannot be read", ("error",), [(Cell(str(error)),)])]
        )
    figure = _figure(name, rows)
    return Section("bytes", "Where the bytes went", [figure], "Compressed units are shared out by the cost of coding.")


def kept_table(path: Path) -> list[TensorBytes]:
    """Return an artifact's bytes by tensor, from the cache or counted now; kept where the folder can be written.

    Raises NotFoundError, DamagedFileError.
    """
    derived = path.absolute().parents[2]
    folder = BYTES.folder(derived, BYTES.id([sha256_file(path)], {}))
    with hushed():
        meta = BYTES.intact_meta(folder)
    if meta is not None:
        return [TensorBytes(**row) for row in read_json(folder / BYTES.payload)["tensors"]]
    rows = tensor_table(path)

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / BYTES.payload, {"tensors": [asdict(row) for row in rows]})
        return {"artifact": path.parent.name}

    with suppress(PgolfError):  # a folder that cannot be written: the next report counts again
        BYTES.store(folder, {}, make)
    return rows


def chosen_artifact(subject: Subject) -> tuple[str, Path] | None:
    """Return the name and the file of the best artifact that is here and fits the budget, else of the newest."""
    points = subject.points
    fits = [point for point in main_text(points) if point.num_bytes <= subject.budget_bytes]
    newest = sorted(points, key=lambda point: point.row.created, reverse=True)
    for point in [*fits, *newest]:  # the best come first
        row_id = str(point.row.result.get("artifact_id", point.row.id))
        entry = subject.entries.get(row_id)
        if entry is not None:
            try:
                return point.row.name or point.row.id[:12], find_artifact(entry.path)
            except PgolfError:
                continue  # its file is gone
    return None


def _figure(name: str, rows: list[TensorBytes]) -> Figure:
    total = sum(row.stored_bytes for row in rows)
    roles = role_table(rows)
    ids = [WHOLE, *(f"role {role.role}" for role in roles)]
    shown = [(WHOLE, "", total, None), *((role.role, WHOLE, role.stored_bytes, role.bits_per_weight) for role in roles)]
    for row in rows:
        if row.role != CONTAINER:
            ids.append(row.name)
            shown.append((row.name, f"role {row.role}", row.stored_bytes, row.bits_per_weight))
    trace: dict[str, Any] = {
        "type": "treemap",
        "branchvalues": "total",
        "ids": [label(one) for one in ids],
        "labels": [label(text) for text, _, _, _ in shown],
        "parents": [label(parent) for _, parent, _, _ in shown],
        "values": [size for _, _, size, _ in shown],
        "text": [
            f"{size:,} bytes, {size / total:.1%}" + ("" if bits is None else f", {bits:.2f} bits per weight")
            for _, _, size, bits in shown
        ],
        "hovertemplate": "%{label}<br>%{text}<extra></extra>",
        "textinfo": "label+percent root",
        "pathbar": {"visible": True},
    }
    table = [
        (
            Cell(row.name),
            Cell(row.role),
            number(row.num_weights),
            number(row.stored_bytes),
            number(100 * row.stored_bytes / total, ".2f", " %"),
            number(row.bits_per_weight, ".3f"),
        )
        for row in sorted(rows, key=lambda row: -row.stored_bytes)
    ]
    first = roles[0]
    summary = (
        f"{name}: {total:,} bytes, of which {first.role} takes {first.stored_bytes / total:.0%} "
        f"in {sum(row.role == first.role for row in rows)} tensors."
    )
    return Figure(
        f"Bytes of {name}",
        summary,
        [trace],
        {"margin": {"l": 4, "r": 4, "t": 8, "b": 4}},
        Table("Bytes by tensor", HEADER, table),
        480,
    )
