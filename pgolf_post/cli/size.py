"""`pgolf-post size`: count an artifact and its code against the budget; exit 3 when over."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post import progress
from pgolf_post.pack.artifact import ArtifactFacts, find_artifact, is_artifact, read_facts
from pgolf_post.pack.script import MINIFIER_MISSING, has_minifier
from pgolf_post.pack.size import BUDGET_BYTES, RoleBytes, SizeReport, count, role_table


@click.command("size")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--code", multiple=True, type=click.Path(path_type=Path), help="A code file or folder; repeatable.")
@click.option("--budget", default=BUDGET_BYTES, show_default=True, type=click.IntRange(min=0), help="Limit in bytes.")
@click.option(
    "--count",
    "counted",
    type=click.Choice(["strict", "convention"]),
    default="strict",
    show_default=True,
    help="Real files as they lie on disk, or the code after minifying and wrapping.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
def command(artifact: Path, code: tuple[Path, ...], budget: int, counted: str, as_json: bool) -> None:
    """Count ARTIFACT (any file, or a folder with artifact.pgolf) and the code against the budget; exit 3 when over."""
    path = find_artifact(artifact)
    report = count(path, code, budget, counted == "convention")
    facts = read_facts(path) if is_artifact(path) else None
    show_report(report)
    if facts is not None:
        show_roles(role_table(facts))
    if as_json:
        progress.print_json(report_json(report, facts))
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


def show_roles(rows: list[RoleBytes]) -> None:
    """Where the artifact's bytes went."""
    progress.print_table(
        "Artifact by role",
        ("role", "codec", "weights", "bytes", "bits/weight"),
        [(row.role, row.codec, f"{row.num_weights:,}", f"{row.stored_bytes:,}", _bits(row)) for row in rows],
    )


def _bits(row: RoleBytes) -> str:
    return "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"


def report_json(report: SizeReport, facts: ArtifactFacts | None) -> dict[str, str | int]:
    """The machine's answer; `symbols_sha256` is there for our own artifacts only."""
    answer: dict[str, str | int] = {
        "artifact": str(report.artifact.path),
        "artifact_bytes": report.artifact_bytes,
        "code_bytes": report.code_bytes,
        "total_bytes": report.total_bytes,
        "strict_total_bytes": report.strict_total_bytes,
        "convention_total_bytes": report.convention_total_bytes,
        "budget_bytes": report.budget_bytes,
        "headroom_bytes": report.headroom_bytes,
    }
    if facts is not None:
        answer["symbols_sha256"] = facts.manifest["symbols_sha256"]
    return answer
