"""`pgolf-post report`: runs, artifacts and sweeps as one HTML page that needs no network."""

from __future__ import annotations

import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgolf_post.base.progress import print_json, say
from pgolf_post.cli.common import json_option, quiet_option

if TYPE_CHECKING:
    from pgolf_post.report.subject import Subject


@click.command("report")
@click.argument("targets", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN | CHECKPOINT | SWEEP.toml]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="File that is written.",
)
@click.option(
    "--root",
    default="checkpoints",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder that holds the runs and the ledger.",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    default=16_000_000,
    show_default=True,
    help="Budget in bytes that artifacts are held against.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@click.option("--watch", is_flag=True, help="Serve the page on loopback, and reload it as rows arrive, until Ctrl-C.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="With --watch, port on 127.0.0.1; 0 takes a free one.",
)
@quiet_option
@json_option
def command(
    targets: tuple[Path, ...], out: Path, root: Path, budget: int, opens: bool, watch: bool, port: int, as_json: bool
) -> None:
    """Write one HTML page about runs, checkpoints or sweeps; about everything under --root if none is named.

    \b
    pgolf-post report                                       all that is recorded here
    pgolf-post report demo_001 --out demo.html --open       one run and all that was made of it
    pgolf-post report sweeps/sdclip_k.toml                  one sweep
    pgolf-post report --watch --open                        live, while a sweep or a training runs

    The file works without network, in light and dark, on a phone and in print, and each figure has a table of its
    numbers. Nothing is scored or trained for it: sections whose results are not on disk are left out. eval --breakdown,
    attribute, fit and audit make more of them.
    """
    from pgolf_post.provenance import command_line
    from pgolf_post.report.page.render import write_report
    from pgolf_post.report.subject import find_subject

    started = time.perf_counter()
    if watch:
        _serve(lambda: find_subject(targets, root, budget), port, opens)
        return
    subject = find_subject(targets, root, budget)
    num_bytes = write_report(subject, out, command_line())
    seconds = round(time.perf_counter() - started, 3)
    say(f"{out}: {num_bytes:,} bytes, {len(subject.rows):,} rows, in {seconds:.1f} s")
    if opens:
        webbrowser.open(out.resolve().as_uri())
    if as_json:
        print_json({"report": str(out), "report_bytes": num_bytes, "rows": len(subject.rows), "seconds": seconds})


def _serve(read: Callable[[], Subject], port: int, opens: bool) -> None:
    """Serve the page until Ctrl-C."""
    from pgolf_post.provenance import command_line
    from pgolf_post.report.page.render import render
    from pgolf_post.report.page.serve import Watched, server_of
    from pgolf_post.report.sections.table import sections_of

    def make(version: str) -> str:
        subject = read()
        return render(subject, sections_of(subject), command_line(), version)

    watched = Watched(read().root, make)
    watched.page()  # what cannot be read is said before anything is served
    with server_of(watched, port) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        say(f"{address}   Ctrl-C ends it")
        if opens:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")
