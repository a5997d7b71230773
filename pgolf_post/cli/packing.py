"""Options that commands share which pack, count and score: codec, counted code, budget, scoring what was packed."""

from __future__ import annotations

from pathlib import Path

import click

from pgolf_post.pack.codecs import CHOICES
from pgolf_post.pack.size import BUDGET_BYTES

codec_option = click.option("--codec", default="rans", show_default=True, help=f"One of {', '.join(CHOICES)}.")
code_option = click.option(
    "--code", multiple=True, type=click.Path(path_type=Path), help="A counted code file or folder; repeatable."
)
budget_option = click.option(
    "--budget", default=BUDGET_BYTES, show_default=True, type=click.IntRange(min=0), help="Limit in bytes."
)
eval_option = click.option("--eval", "evaluate", is_flag=True, help="Score what the artifact decodes to.")
eval_tokens_option = click.option(
    "--eval-tokens", type=click.IntRange(min=2), help="Score only the first so many validation tokens."
)
