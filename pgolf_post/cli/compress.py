"""`pgolf-post compress ARTIFACT`: the same symbols under every codec, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from pgolf_post.base.progress import print_json, progress_bar
from pgolf_post.cli.common import json_option, quiet_option, threads_option


@click.command("compress")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--codecs", "names", default="all", show_default=True, help="Codecs to measure, with commas between them, or all."
)
@threads_option
@quiet_option
@json_option
def command(artifact: Path, names: str, as_json: bool) -> None:
    """Pack the model of ARTIFACT again by every codec: bytes, bits/weight, seconds, bytes by role, gap to the entropy.

    \b
    pgolf-post compress artifact.pgolf
    pgolf-post compress artifact.pgolf --codecs brotli,rans,lrzip --json

    Codecs marked * are yardsticks, which the shipped decoder does not know. The artifact itself is left as it is.
    """
    from pgolf_post.cli.foreign_files import require_ours
    from pgolf_post.pack.artifact import find_artifact, read_artifact
    from pgolf_post.pack.report.compare import check_names, compare, show

    wanted = check_names([name.strip() for name in names.split(",")])
    path = find_artifact(artifact)
    require_ours(path)
    model = read_artifact(path).model
    with progress_bar("compressing", len(wanted), "codecs") as advance:
        comparison = compare(model, wanted, lambda name: advance(1, note=name))
    show(comparison)
    if as_json:
        print_json(asdict(comparison))
