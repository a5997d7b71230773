"""`pgolf-post export-decoder`: the decoder as a snippet for a single-file script."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pgolf_post.base.progress import print_json, say
from pgolf_post.cli.common import json_option


@click.command("export-decoder")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file.  [default: stdout]")
@json_option
def command(out: Path | None, as_json: bool) -> None:
    """Write `decode(bytes) -> dict of float32 arrays` for your own script, and say what it costs.

    \b
    pgolf-post export-decoder --out decoder.py        # then paste it, or import it

    It needs numpy and brotli and leaves out the defences against damaged files; `pgolf_post/pack/decode.py` has them.
    """
    from pgolf_post.base.storage import atomic_file
    from pgolf_post.pack.script import MINIFIER_MISSING, pack_source
    from pgolf_post.pack.snippet import decoder_snippet

    snippet = decoder_snippet()
    packed = pack_source(snippet, keep_names=["decode"])
    if out is None and not as_json:
        sys.stdout.write(snippet)
    elif out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(snippet, "utf-8")
    say(f"decoder: {len(snippet.encode()):,} bytes, {len(packed.data):,} after pack-code")
    if not packed.minified:
        say(MINIFIER_MISSING)
    if as_json:
        facts = {"code_bytes": len(snippet.encode()), "packed_bytes": len(packed.data), "minified": packed.minified}
        print_json({"out": str(out) if out else None, **facts})
