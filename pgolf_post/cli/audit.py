"""`pgolf-post audit`: is this score legal? The challenge's rules, run as tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, print_table
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    json_option,
    quiet_option,
    threads_option,
    weights_option,
)
from pgolf_post.cli.scoring import Opened, open_scored, parse_protocol, protocol_options

if TYPE_CHECKING:
    from pgolf_post.ledger import Row
    from pgolf_post.score.audit.stage import Audit
    from pgolf_post.score.protocols import Protocol


@click.command("audit")
@checkpoint_argument
@weights_option
@data_option
@protocol_options
@click.option(
    "--tokens", type=click.IntRange(min=3), help="Length of the excerpt in tokens.  [default: as the protocol needs]"
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Number of tokens that are changed one at a time, and of suspects that are looked at again.",
)
@click.option(
    "--power",
    type=FiniteFloat(min=0, max=1, max_open=True),
    default=0.99,
    show_default=True,
    help="Probability with which a fault on one token in a hundred is to be found; more takes more runs.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed by which the changed tokens are drawn.",
)
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    data_dir: Path | None,
    tokens: int | None,
    samples: int,
    power: float,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the challenge's rules as tests on CHECKPOINT (or an artifact) under a protocol.

    \b
    pgolf-post audit ARTIFACT --protocol sliding
    pgolf-post audit CKPT --protocol ttt --ttt lora --tokens 3000

    The protocol scores an excerpt repeatedly, with one token changed or with many far apart: what was scored before
    must stay the same bit for bit, also where weights learn. The table says how surely a rare fault is found. Bytes and
    documents are counted on the whole split. The verdict becomes a row of the ledger. The exit code is 4 if a test
    fails.
    """
    from pgolf_post.score.audit.findings import require_passed
    from pgolf_post.score.audit.stage import audit_weights
    from pgolf_post.score.phase_times import PhaseTimes
    from pgolf_post.score.report import AUDIT_HEADER, audit_rows

    started = time.perf_counter()
    opened = open_scored(checkpoint, weights, data_dir, PhaseTimes())
    protocol = parse_protocol(options, opened.config, "audit")
    result = audit_weights(
        opened.name, opened.config, opened.tensors, opened.data, protocol, tokens, samples, seed, power
    )
    print_table(f"{opened.name}, {protocol.protocol}", AUDIT_HEADER, audit_rows(list(result.findings)))
    seconds = round(time.perf_counter() - started, 3)
    _record(opened, protocol, result, seconds)
    if as_json:
        named = {"path": str(checkpoint or opened.name), "protocol": protocol.model_dump(mode="json")}
        tests = [finding.facts() for finding in result.findings]
        print_json(
            {
                **named,
                "passed": result.passed,
                "tests": tests,
                "excerpt_tokens": result.excerpt_tokens,
                "seconds": seconds,
            }
        )
    require_passed(list(result.findings), opened.name)


def _record(opened: Opened, protocol: Protocol, result: Audit, seconds: float) -> None:
    """Write the verdict into the ledger, below what was audited, whether it passed or not."""
    from pgolf_post.base.storage import sha256_file
    from pgolf_post.ledger.comparison import audit_row
    from pgolf_post.ledger.disk import rows_at
    from pgolf_post.ledger.recording import record

    # the row above: of the artifact, or of the very weights that were audited
    scored, run = opened.scored, ""
    if isinstance(scored, Path):
        subject_id, folder = sha256_file(scored), scored.absolute().parent
        folders = [folder] if folder.parent.parent.name == "derived" else []
    else:
        subject_id, run, folders = scored.id, scored.checkpoint.path.parent.name, [scored.checkpoint.path]

    def rows() -> list[Row]:
        above = rows_at(folders[0])[-1] if isinstance(scored, Path) and folders else None
        parent, its_run = (above.id, above.run) if above else (subject_id, run)
        settings = {"protocol": protocol.model_dump(mode="json"), "data_manifest_sha256": opened.data.manifest_sha256}
        tests = [finding.facts() for finding in result.findings]
        name = f"{protocol.protocol} of {opened.name}"
        return [audit_row(name, settings, tests, result.excerpt_tokens, parent, its_run, seconds)]

    record(*folders, rows=rows, seconds=seconds)
