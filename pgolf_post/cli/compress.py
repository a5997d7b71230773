"""`pgolf-post compress ARTIFACT`: the same symbols under every codec, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgolf_post.base.progress import print_json, print_table, progress_bar, say
from pgolf_post.cli.common import json_option

if TYPE_CHECKING:
    from pgolf_post.pack.report.compare import Comparison


@click.command("compress")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--codecs", "names", default="all", show_default=True, help="Comma-separated codecs, or all.")
@json_option
def command(artifact: Path, names: str, as_json: bool) -> None:
    """Pack the model of ARTIFACT again by every codec: bytes, bits/weight, seconds, bytes by role, gap to the entropy.

    \b
    pgolf-post compress artifact.pgolf
    pgolf-post compress artifact.pgolf --codecs brotli,rans,lrzip --json

    Codecs marked * are yardsticks: the decoder that ships does not know them. The artifact itself is left as it is.
    """
    from pgolf_post.pack.artifact import find_artifact, read_artifact
    from pgolf_post.pack.report.compare import check_names, compare

    wanted = check_names([name.strip() for name in names.split(",")])
    model = read_artifact(find_artifact(artifact)).model
    with progress_bar("compressing", len(wanted)) as advance:
        found = compare(model, wanted, lambda name: advance(1, note=name))
    show(found)
    if as_json:
        print_json({**asdict(found), "rows": [asdict(row) for row in found.rows]})


def show(found: Comparison) -> None:
    """The table, the bytes by role, the entropies, and the codecs that have no row."""
    rows = []
    for row in found.rows:
        bits = 8 * row.artifact_bytes / found.num_weights if found.num_weights else 0.0
        gap = row.symbol_bytes / found.context_bytes - 1 if found.context_bytes else 0.0
        seconds = (f"{row.encode_seconds:.2f}", f"{row.decode_seconds:.2f}")
        name = row.codec + ("" if row.ships else " *")
        rows.append((name, f"{row.artifact_bytes:,}", f"{bits:.4f}", f"{row.symbol_bytes:,}", f"{gap:+.2%}", *seconds))
    header = ("codec", "artifact bytes", "bits/weight", "symbol bytes", "over entropy", "encode s", "decode s")
    print_table(f"{found.num_weights:,} weights by every codec", header, rows)
    roles = sorted({role for row in found.rows for role in row.role_bytes})
    table = [(role, *(f"{row.role_bytes.get(role, 0):,}" for row in found.rows)) for role in roles]
    print_table("Symbol bytes by role", ("role", *(row.codec for row in found.rows)), table)
    say(
        f"entropy of the symbols: {found.order0_bytes:,.0f} bytes by role, {found.context_bytes:,.0f} in rANS' contexts"
    )
    say("* not decodable by the decoder that ships; the rest of the artifact counted as rans stores it")
    for codec, reason in found.missing.items():
        say(f"no row for {codec}: {reason}")
