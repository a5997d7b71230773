"""Options and steps of commands that pack: codec, counted code, budget, scoring what was packed, recording it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.pack.codecs import CHOICES
from pgolf_post.pack.report.size import BUDGET_BYTES, SizeReport

if TYPE_CHECKING:
    from pgolf_post.artifacts import PackedArtifact
    from pgolf_post.data import DataFolder
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.protocols import Protocol

codec_option = click.option(
    "--codec",
    type=click.Choice(CHOICES),
    default="rans",
    show_default=True,
    help="How units are compressed: best tries every codec on every unit.",
)
code_option = click.option(
    "--code",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Count this code file or folder against the budget. Repeatable.",
)
budget_option = click.option(
    "--budget",
    default=BUDGET_BYTES,
    show_default=True,
    type=click.IntRange(min=0),
    help="Limit of code and artifact, in bytes.",
)
eval_option = click.option("--eval", "evaluate", is_flag=True, help="Score the weights that the artifact decodes to.")
eval_tokens_option = click.option(
    "--eval-tokens", type=click.IntRange(min=2), help="With --eval, score only the first so many validation tokens."
)


def refuse_idle_eval_tokens(evaluate: bool, eval_tokens: int | None) -> None:
    """Raise UsageError for --eval-tokens where nothing is scored."""
    if eval_tokens is not None and not evaluate:
        raise click.UsageError("--eval-tokens does nothing without --eval")


def count_and_score(
    artifact: PackedArtifact,
    budget: int,  # bytes of code and artifact
    code: Sequence[Path],
    data: DataFolder,
    protocol: Protocol | None,  # None: not scored
    fresh: bool,
    pool: ModelPool | None = None,
) -> tuple[SizeReport, dict[str, Any] | None]:
    """Return an artifact's bytes against a budget, and the score of the weights that it decodes to."""
    from pgolf_post.pack.report.size import count
    from pgolf_post.score.stage import score

    report = count(artifact.path, code, budget)
    return report, score(artifact, data, protocol, fresh=fresh, pool=pool).facts if protocol else None


def record_artifact(
    artifact: PackedArtifact,
    report: SizeReport,
    score: dict[str, Any] | None,
    stats: Path,  # the folder of the statistics it was made with
    dollars_per_hour: float | None,
    seconds: float,
) -> None:
    """Record an artifact, its statistics and its score in the ledger, with what was counted."""
    from pgolf_post.ledger.recording import record

    folders = [artifact.folder, stats, *([Path(score["folder"])] if score else [])]
    record(*folders, facts=report.facts(), dollars_per_hour=dollars_per_hour, seconds=seconds)
