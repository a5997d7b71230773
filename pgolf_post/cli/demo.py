"""`pgolf-post demo`: the whole pipeline on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from pgolf_post.cli.common import json_option, quiet_option, threads_option


@click.command("demo")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder that will hold data/ and checkpoints/.  [default: here]",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the training recipe. Repeatable."
)
@threads_option
@quiet_option
@json_option
def command(root: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Text → tokens → training → statistics → four quantizers at one byte count. Needs no network and no GPU.

    Two to four minutes on two idle CPU cores, half of them training. A second table has three λ and an SWA blend.
    It ends by writing report.html, a page of figures about the run.
    """
    from pgolf_post.base.progress import print_json
    from pgolf_post.demo.pipeline import Demo
    from pgolf_post.demo.report import show
    from pgolf_post.ledger.disk import scan
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    answer = Demo(root, overrides).run()
    seconds = time.perf_counter() - started
    show(answer, seconds)
    checkpoints = root / "checkpoints"
    record(rows=lambda: scan(checkpoints), root=checkpoints, seconds=seconds)
    page = write_page(root, Path(answer["checkpoint"]).parent)
    if as_json:
        print_json({**answer, "report": str(page), "seconds": round(seconds, 3)})


def write_page(root: Path, run: Path) -> Path:
    """Write the page about a run of the demo, say where it is, and return its path."""
    from pgolf_post.base.progress import say
    from pgolf_post.pack.report.size import BUDGET_BYTES
    from pgolf_post.report.page.render import write_report
    from pgolf_post.report.subject import find_subject

    page, checkpoints = root / "report.html", root / "checkpoints"
    subject = find_subject([run], checkpoints, BUDGET_BYTES)
    write_report(subject, page, f"pgolf-post report {run.name} --root {checkpoints} --out {page}")
    say(f"to look at: {page.resolve().as_uri()}")
    return page
