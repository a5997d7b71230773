"""`pgolf-post export`: a native checkpoint → a public script's state dict."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.base.progress import print_json
from pgolf_post.cli.common import (
    checkpoint_argument,
    find_checkpoint,
    json_option,
    load_view,
    quiet_option,
    threads_option,
    weights_option,
)
from pgolf_post.importers import FORMATS


@click.command("export")
@checkpoint_argument
@weights_option
@click.option("--format", "form", required=True, type=click.Choice(list(FORMATS)), help="The script's format.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Write to this .pt or .safetensors file.")
@threads_option
@quiet_option
@json_option
def command(checkpoint: Path | None, weights: str | None, form: str, out: Path, as_json: bool) -> None:
    """Write CHECKPOINT's weights as a bare state dict in a public script's names, every tensor identical."""
    from pgolf_post.importers.importing import export_view

    view = load_view(find_checkpoint(checkpoint), weights)
    export_view(view, form, out)
    if as_json:
        print_json({"path": str(out), "format": form, "checkpoint_id": view.id})
