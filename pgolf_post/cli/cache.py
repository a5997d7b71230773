"""`pgolf-post cache`: the results kept beside the checkpoints, whether they are intact, and how to delete them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, print_table, progress_bar, say
from pgolf_post.cli.common import json_option, quiet_option, threads_option

if TYPE_CHECKING:
    from pgolf_post.cache import CacheEntry

root_option = click.option(
    "--root",
    default="checkpoints",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder that holds the runs.",
)
stage_option = click.option(
    "--stage", "stages", multiple=True, help="Only results of this stage (stats, artifact …); repeatable."
)


@click.group("cache")
def command() -> None:
    """List, verify or prune derived results: statistics, generated text, artifacts, scores."""


@command.command("list")
@root_option
@stage_option
@json_option
def list_command(root: Path, stages: tuple[str, ...], as_json: bool) -> None:
    """List every derived result: bytes, age in days, state, checkpoint, and the settings that made it."""
    from pgolf_post.cache import list_entries

    entries = [entry for entry in list_entries(root) if not stages or entry.stage in stages]
    _show(f"{len(entries)} results, {sum(entry.num_bytes for entry in entries):,} bytes", entries, root)
    if as_json:
        print_json({"entries": [entry.facts() for entry in entries], "bytes": sum(e.num_bytes for e in entries)})


@command.command("verify")
@root_option
@stage_option
@threads_option
@quiet_option
@json_option
def verify_command(root: Path, stages: tuple[str, ...], as_json: bool) -> None:
    """Recompute every checksum. Exit code 4 if one is not as recorded; such a result is never used."""
    from pgolf_post.cache import list_entries, verify_entry
    from pgolf_post.errors import PgolfError, VerificationError

    entries = [entry for entry in list_entries(root) if entry.state in ("complete", "orphan")]
    entries = [entry for entry in entries if not stages or entry.stage in stages]
    damaged: list[str] = []
    with progress_bar("verifying", len(entries), "entries") as advance:
        for entry in entries:
            try:
                verify_entry(entry)
            except PgolfError as error:
                damaged.append(str(entry.path))
                say(str(error))
            advance(1, note=entry.path.name)
    say(f"{len(entries) - len(damaged)} results are intact, {len(damaged)} damaged")
    if as_json:
        print_json({"verified": len(entries), "damaged": damaged})
    if damaged:
        raise VerificationError(
            f"{len(damaged)} damaged results: {', '.join(damaged)}",
            hint="no action is needed: a command that needs one of them recomputes it and says so",
        )


@command.command("prune")
@root_option
@stage_option
@click.option(
    "--older-than",
    type=FiniteFloat(min=0),
    metavar="DAYS",
    help="Only results at least this many days old.",
)
@click.option("--orphans", is_flag=True, help="Only results whose checkpoint is gone or holds other weights.")
@click.option("--yes", is_flag=True, help="Delete; without it, only list what would be deleted.")
@json_option
def prune_command(
    root: Path, stages: tuple[str, ...], older_than: float | None, orphans: bool, yes: bool, as_json: bool
) -> None:
    """Delete derived results; without --yes, list what would be deleted.

    \b
    pgolf-post cache prune --yes                                 # what killed processes left behind
    pgolf-post cache prune --stage stats --older-than 7 --yes    # and statistics that are a week old
    pgolf-post cache prune --orphans --yes                       # and results whose weights are gone

    Everything that is deleted can be made again from its checkpoint.
    """
    from pgolf_post.cache import choose, list_entries, remove

    chosen = choose(list_entries(root), stages, older_than, orphans)
    num_bytes = sum(entry.num_bytes for entry in chosen)
    _show(f"{'deleting' if yes else 'would delete'} {len(chosen)} results, {num_bytes:,} bytes", chosen, root)
    if yes:
        remove(chosen)
    elif chosen:
        say("nothing was deleted; --yes deletes")
    if as_json:
        print_json({"entries": [entry.facts() for entry in chosen], "bytes": num_bytes, "deleted": yes})


def _show(title: str, entries: list[CacheEntry], root: Path) -> None:
    from pgolf_post.cache import HEADER, dated_ahead

    print_table(title, HEADER, [entry.cells(root) for entry in entries])
    if ahead := dated_ahead(entries):
        say(ahead)
