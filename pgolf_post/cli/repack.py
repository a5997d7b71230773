"""`pgolf-post repack FILE`: a foreign artifact's own weights under our codecs, bytes before and after."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pgolf_post.base.progress import print_json, print_table, progress_bar, say
from pgolf_post.cli.common import json_option, quiet_option, threads_option
from pgolf_post.pack.codecs import CHOICES


@click.command("repack")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the artifact to this file.  [default: only count it]"
)
@click.option(
    "--codec", type=click.Choice(CHOICES), default="best", show_default=True, help="The codec of the artifact."
)
@threads_option
@quiet_option
@json_option
def command(file: Path, out: Path | None, codec: str, as_json: bool) -> None:
    """Read FILE, a compressed artifact of a public script, and pack the same weights as ours: bytes before and after.

    \b
    pgolf-post repack final_model.int8.ptz
    pgolf-post repack final_model.int6.ptz --out artifact.pgolf     # then: pgolf-post export-decoder

    Known are the baseline's int8 rows and {w, m} dictionaries (int6, gates, LQER), under zlib, lzma, brotli or zstd,
    with or without byte shuffle. Every weight is compared bit for bit, in float32, before the script's own cast;
    tensors keep the script's names. Nothing in FILE is run.
    """
    from pgolf_post.base.paths import require_another
    from pgolf_post.importers.repack import read_foreign_artifact, repack
    from pgolf_post.pack.artifact import write_artifact

    started = time.perf_counter()
    if out is not None:
        require_another(out, file)
    foreign = read_foreign_artifact(file)
    with progress_bar("repacking", 1, "artifacts") as advance:
        data = repack(foreign, codec)
        advance(1)
    if out is not None:
        write_artifact(out, data)
    saved, model = foreign.file_bytes - len(data), foreign.model
    rows = [(f"before  {file} ({foreign.format})", f"{foreign.file_bytes:,}")]
    rows += [(f"after  {out or 'not written'} ({codec})", f"{len(data):,}")]
    rows += [("saved", f"{saved:,}"), ("of the file", f"{saved / foreign.file_bytes:.2%}")]
    print_table("Identical weights, other bytes", ("artifact", "bytes"), rows)
    say(
        f"{len(model.quantized)} quantized and {len(model.passthrough)} kept tensors, every weight the same bit for bit"
    )
    if out is None:
        say("next: --out artifact.pgolf writes it; pgolf-post export-decoder writes what reads it")
    if as_json:
        answer = {"file": str(file), "format": foreign.format, "codec": codec, "out": str(out) if out else None}
        sizes = {"before_bytes": foreign.file_bytes, "artifact_bytes": len(data), "saved_bytes": saved}
        seconds = round(time.perf_counter() - started, 3)
        print_json({**answer, **sizes, "symbols_sha256": model.symbols_sha256(), "seconds": seconds})
