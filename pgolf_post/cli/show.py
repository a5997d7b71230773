"""`pgolf-post show [PATH]`: what is this, where did it come from, what can be done next."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option


@click.command("show")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@json_option
def command(path: Path | None, as_json: bool) -> None:
    """Explain PATH: a checkpoint, a run, a derived folder, an artifact or a data folder.

    With PATH left out: the newest final checkpoint.
    """
    from pgolf_post.base.paths import followed
    from pgolf_post.checkpoint import default_checkpoint
    from pgolf_post.describe import describe

    path = path or default_checkpoint().path
    description = describe(followed(path))
    print_table(f"{description.what}  {path}", ("", "value"), description.rows)
    for line in description.next_commands:
        say(f"next: {line}")
    if as_json:
        print_json({"path": str(path), "what": description.what, **description.facts})
