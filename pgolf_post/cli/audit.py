"""`pgolf-post audit`: is this score legal? The challenge's rules, run as tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import checkpoint_argument, data_option, json_option, weights_option
from pgolf_post.cli.scoring import open_scored, parse_protocol, protocol_options


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
    help="Number of tokens that are changed, one at a time.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed by which the changed tokens are drawn.",
)
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    data_dir: Path | None,
    tokens: int | None,
    samples: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Run the challenge's rules as tests on CHECKPOINT (or an artifact) under a protocol.

    \b
    pgolf-post audit ARTIFACT --protocol sliding
    pgolf-post audit CKPT --protocol ttt --ttt lora --tokens 3000

    The protocol scores an excerpt repeatedly, each time with one token changed: what was scored before it must stay
    the same bit for bit, also where weights learn. Bytes and documents are counted on the whole split. The exit code is
    4 if a test fails.
    """
    from pgolf_post.families import get_family, load_module
    from pgolf_post.score.audit.behaviour import audit, document_excerpt, excerpt_tokens
    from pgolf_post.score.audit.causality import Audited
    from pgolf_post.score.audit.findings import require_passed
    from pgolf_post.score.audit.text import audit_text
    from pgolf_post.score.phase_times import PhaseTimes
    from pgolf_post.score.protocols import folder_text
    from pgolf_post.score.report import AUDIT_HEADER, audit_rows

    started = time.perf_counter()
    opened = open_scored(checkpoint, weights, data_dir, PhaseTimes())
    protocol = parse_protocol(options, opened.config, "audit")
    module = load_module(opened.config, {name: x.clone() for name, x in opened.tensors.items()}, opened.name)
    whole = folder_text(opened.data, protocol.model_copy(update={"max_tokens": None}))
    excerpt = document_excerpt(whole[0], tokens or excerpt_tokens(protocol))
    say(f"excerpt: {len(excerpt):,} tokens of {len(whole[0]):,}, scored {samples + 3} times")
    isolates = bool(opened.config["model"].get("isolate_documents"))
    audited = Audited.of(module, get_family(opened.config["family"]), isolates, protocol)
    findings = [*audit(audited, excerpt, samples, seed), *audit_text(opened.data, protocol.split, *whole)]
    print_table(f"{opened.name}, {protocol.protocol}", AUDIT_HEADER, audit_rows(findings))
    if as_json:
        passed = all(finding.passed is not False for finding in findings)
        seconds = round(time.perf_counter() - started, 3)
        named = {"path": str(checkpoint or opened.name), "protocol": protocol.model_dump(mode="json")}
        tests = [finding.facts() for finding in findings]
        print_json({**named, "passed": passed, "tests": tests, "excerpt_tokens": len(excerpt), "seconds": seconds})
    require_passed(findings, opened.name)
