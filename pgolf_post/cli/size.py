"""`pgolf-post size`: count an artifact and its code against the budget; exit 3 when over."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.base import progress
from pgolf_post.cli.common import json_option
from pgolf_post.cli.packing import budget_option, code_option
from pgolf_post.errors import MismatchError
from pgolf_post.pack.artifact import ArtifactFacts, find_artifact, is_artifact, read_facts
from pgolf_post.pack.report.picture import draw_size, require_plots
from pgolf_post.pack.report.size import SizeReport, UnitBytes, count, unit_table
from pgolf_post.pack.report.tensor_bytes import TensorBytes, role_table, tensor_table
from pgolf_post.pack.script import MINIFIER_MISSING, has_minifier


@click.command("size")
@click.argument("artifact", type=click.Path(path_type=Path))
@code_option
@budget_option
@click.option(
    "--count",
    "counted",
    type=click.Choice(["strict", "convention"]),
    default="strict",
    show_default=True,
    help="Real files as they lie on disk, or the code after minifying and wrapping.",
)
@click.option("--tensors", "by_tensor", is_flag=True, help="Also the bytes of every tensor.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the bytes: an .svg, .png or .pdf file to write.")
@json_option
def command(
    artifact: Path, code: tuple[Path, ...], budget: int, counted: str, by_tensor: bool, plot: Path | None, as_json: bool
) -> None:
    """Count ARTIFACT (any file, or a folder with artifact.pgolf) and the code against the budget; exit 3 when over.

    \b
    pgolf-post size artifact.pgolf --code train_gpt.py
    pgolf-post size artifact.pgolf --tensors --plot bytes.png     # what every tensor costs; needs the extra `plots`

    A tensor's bytes are its units' real ones, shared out by what coding its values costs; they add up to the file.
    """
    path = find_artifact(artifact)
    report = count(path, code, budget, counted == "convention")
    ours = is_artifact(path)
    if plot is not None:
        _require_drawable(path, plot, ours)
    facts, rows = (read_facts(path), tensor_table(path)) if ours else (None, [])
    show_report(report)
    if facts is not None:
        show_units(unit_table(facts))
        show_tensors("Artifact by role", role_table(rows))
    if by_tensor:
        show_tensors("Artifact by tensor", rows)
    if plot is not None:
        draw_size(report, rows, plot)
        progress.say(f"wrote {plot}")
    if as_json:
        progress.print_json({**report_json(report, facts), **table_json(rows)})
    report.require_within_budget()


def show_report(report: SizeReport) -> None:
    """The byte table: artifact, each code file, total, budget, headroom."""
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


def _require_drawable(path: Path, plot: Path, ours: bool) -> None:
    """Before anything is printed: raise what `draw_size` would."""
    require_plots(plot)
    if not ours:
        raise MismatchError(f"{path} is no artifact of ours: there are no tensors to draw", hint="pgolf-post repack")


def show_units(rows: list[UnitBytes]) -> None:
    """What was compressed together, and how well."""
    progress.print_table(
        "Artifact by unit",
        ("unit", "codec", "weights", "bytes", "bits/weight"),
        [(row.role, row.codec, f"{row.num_weights:,}", f"{row.stored_bytes:,}", _bits(row)) for row in rows],
    )


def show_tensors(title: str, rows: list[TensorBytes]) -> None:
    """Where the artifact's bytes went, symbols, scales and row scales together."""
    total = sum(row.stored_bytes for row in rows)
    table = [
        (row.name, f"{row.num_weights:,}", f"{row.stored_bytes:,}", f"{row.stored_bytes / total:.2%}", _bits(row))
        for row in rows
    ]
    progress.print_table(title, ("tensor" if "tensor" in title else "role", "weights", "bytes", "share", "bits"), table)


def table_json(rows: list[TensorBytes]) -> dict[str, list[dict[str, str | int]]]:
    """The bytes by role and by tensor; nothing for files that are not ours."""
    tables = {"roles": role_table(rows), "tensors": rows} if rows else {}
    return {
        name: [{"name": row.name, "weights": row.num_weights, "bytes": row.stored_bytes} for row in table]
        for name, table in tables.items()
    }


def _bits(row: UnitBytes | TensorBytes) -> str:
    return "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"


def report_json(report: SizeReport, facts: ArtifactFacts | None) -> dict[str, str | int]:
    """The machine's answer; `symbols_sha256` is there for our own artifacts only."""
    answer: dict[str, str | int] = {
        "artifact": str(report.artifact.path),
        **report.facts(),
        "strict_total_bytes": report.strict_total_bytes,
        "convention_total_bytes": report.convention_total_bytes,
    }
    if facts is not None:
        answer["symbols_sha256"] = facts.manifest["symbols_sha256"]
    return answer
