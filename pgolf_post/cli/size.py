"""`pgolf-post size`: count an artifact and its code against the budget; exit 3 when over."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.base import progress
from pgolf_post.cli.common import json_option, quiet_option, threads_option
from pgolf_post.cli.foreign_files import kind_of, require_ours
from pgolf_post.cli.packing import budget_option, code_option
from pgolf_post.errors import MismatchError
from pgolf_post.pack.artifact import ArtifactFacts, find_artifact, is_artifact, read_facts
from pgolf_post.pack.report.picture import draw_size, require_plots
from pgolf_post.pack.report.size import SizeReport, count, unit_table
from pgolf_post.pack.report.size_tables import show_report, show_tensors, show_units
from pgolf_post.pack.report.tensor_bytes import TensorBytes, role_table, tensor_table


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
    help="Count the real files (strict), or the code after minifying and wrapping (convention).",
)
@click.option("--tensors", "by_tensor", is_flag=True, help="List the bytes of every tensor, too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the bytes into this .svg, .png or .pdf file.")
@threads_option
@quiet_option
@json_option
def command(
    artifact: Path, code: tuple[Path, ...], budget: int, counted: str, by_tensor: bool, plot: Path | None, as_json: bool
) -> None:
    """Count ARTIFACT (any file, or a folder with artifact.pgolf) and the code against the budget; exit 3 when over.

    \b
    pgolf-post size artifact.pgolf --code train_gpt.py
    pgolf-post size artifact.pgolf --tensors --plot bytes.png     # what every tensor costs; needs the extra `plots`

    The bytes of compressed units are attributed to tensors by the cost of coding their values; they add up to the file.
    """
    path = find_artifact(artifact)
    report = count(path, code, budget, counted == "convention")
    ours = is_artifact(path)
    if ours:
        require_ours(path)
    else:
        progress.say(f"{path} is {kind_of(path).words}: counted as it is, not decoded")
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


def _require_drawable(path: Path, plot: Path, ours: bool) -> None:
    """Raise what `draw_size` would, before anything is printed."""
    require_plots(plot)
    if not ours:
        raise MismatchError(f"{path} is no artifact of ours: there are no tensors to draw", hint="pgolf-post repack")


def table_json(rows: list[TensorBytes]) -> dict[str, list[dict[str, str | int]]]:
    """Return the bytes by role and by tensor; nothing for files that are not ours."""
    tables = {"roles": role_table(rows), "tensors": rows} if rows else {}
    return {
        name: [{"name": row.name, "weights": row.num_weights, "bytes": row.stored_bytes} for row in table]
        for name, table in tables.items()
    }


def report_json(report: SizeReport, facts: ArtifactFacts | None) -> dict[str, str | int]:
    """Return the count as JSON; `symbols_sha256` is there for our own artifacts only."""
    answer: dict[str, str | int] = {
        "artifact": str(report.artifact.path),
        **report.facts(),
        "strict_total_bytes": report.strict_total_bytes,
        "convention_total_bytes": report.convention_total_bytes,
    }
    if facts is not None:
        answer["symbols_sha256"] = facts.manifest["symbols_sha256"]
    return answer
