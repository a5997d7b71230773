"""`pgolf-post pack-code train_gpt.py`: the self-extracting file that the convention counts."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.base.paths import absent, require_another
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option


@click.command("pack-code")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write to this file.  [default: SCRIPT's name with .packed.py]"
)
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Run both forms beside a copy of this file, and compare their output; repeatable.",
)
@json_option
def command(
    script: Path, arguments: tuple[str, ...], out: Path | None, beside: tuple[Path, ...], as_json: bool
) -> None:
    """Minify and compress SCRIPT into a file that unpacks itself, and count that file.

    \b
    pgolf-post pack-code train_gpt.py
    pgolf-post pack-code train_gpt.py --beside artifact.pgolf --beside tokens.bin -- artifact.pgolf tokens.bin

    With --beside, script and packed script are run with ARGUMENTS, each in an empty folder beside those files, and must
    print the same: exit code 4 if not. Without it, the packed script is run up to its payload, which is compiled only.
    A script whose source is read while it runs (@triton.jit, torch.jit.script, inspect) keeps it readable.
    """
    from pgolf_post.base.storage import atomic_file
    from pgolf_post.errors import NotFoundError, SettingsError
    from pgolf_post.pack.payload import read_script
    from pgolf_post.pack.script import (
        MINIFIER_MISSING,
        check_same_output,
        check_unpacks,
        has_minifier,
        local_imports,
        pack_source,
    )

    source = read_script(script)
    out = out or script.with_suffix(".packed.py")
    require_another(out, script)
    packed = pack_source(source)
    for path in beside:
        if not path.is_file():
            raise NotFoundError(absent(path))
    check_unpacks(packed)
    output = check_same_output(script.read_bytes(), packed.data, beside, arguments) if beside else None
    with atomic_file(out) as temporary:
        temporary.write_bytes(packed.data)
    rows = [(str(script), f"{script.stat().st_size:,}"), (f"{out}  ({packed.codec})", f"{len(packed.data):,}")]
    print_table("Code", ("file", "bytes"), rows)
    if packed.reader:
        say(f"{packed.reader} reads the script's source, which is kept readable: {packed.keeping_bytes:+,} bytes")
    if not has_minifier():
        say(MINIFIER_MISSING)
    try:
        for path in local_imports(script):
            say(f"{script} imports {path}, which is part of the submission and not in the packed file")
    except SettingsError as error:  # the packed file is whole; what else belongs to the submission is not known
        say(f"what else belongs to the submission is not known: {error}")
    if output is not None:
        say(f"run in an empty folder: both print {output.strip()[:200]!r}")
    if as_json:
        answer = {
            "script": str(script),
            "out": str(out),
            "source_bytes": script.stat().st_size,
            "minified": packed.minified,
        }
        print_json(
            {
                **answer,
                "code_bytes": len(packed.data),
                "codec": packed.codec,
                "keeping_bytes": packed.keeping_bytes,
                "checked": output is not None,
            }
        )
