"""Tables of a count for people: its bytes in all, and an artifact's bytes by unit, role and tensor."""

from __future__ import annotations

from collections.abc import Sequence

from pgolf_post.base import progress
from pgolf_post.pack.report.size import SizeReport, UnitBytes
from pgolf_post.pack.report.tensor_bytes import TensorBytes
from pgolf_post.pack.script import MINIFIER_MISSING, has_minifier


def show_report(report: SizeReport) -> None:
    """Print the byte table: artifact, each code file, total, budget, headroom."""
    rows = [(f"artifact  {report.artifact.path}", f"{report.artifact_bytes:,}")]
    rows += [(f"code  {file.path}", f"{file.num_bytes:,}") for file in report.code]
    rows += [("total, strict", f"{report.strict_total_bytes:,}")]
    rows += [("total, convention (code minified and wrapped)", f"{report.convention_total_bytes:,}")]
    rows += [("budget", f"{report.budget_bytes:,}")]
    rows += [("headroom", f"{report.headroom_bytes:,}")]
    progress.print_table("Size", ("part", "bytes"), rows)
    if report.code and not has_minifier():
        progress.say(MINIFIER_MISSING)
    if not report.code:
        progress.say("code is counted as 0 bytes because no --code file was given")


def show_units(rows: Sequence[UnitBytes]) -> None:
    """Print what was compressed together, and how well."""
    progress.print_table(
        "Artifact by unit",
        ("unit", "codec", "weights", "bytes", "bits/weight"),
        [(row.role, row.codec, f"{row.num_weights:,}", f"{row.stored_bytes:,}", _bits(row)) for row in rows],
    )


def show_tensors(title: str, rows: Sequence[TensorBytes]) -> None:
    """Print where the artifact's bytes went, symbols, factors and row shifts together."""
    total = sum(row.stored_bytes for row in rows)
    table = [
        (row.name, f"{row.num_weights:,}", f"{row.stored_bytes:,}", f"{row.stored_bytes / total:.2%}", _bits(row))
        for row in rows
    ]
    progress.print_table(title, ("tensor" if "tensor" in title else "role", "weights", "bytes", "share", "bits"), table)


def _bits(row: UnitBytes | TensorBytes) -> str:
    return "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
