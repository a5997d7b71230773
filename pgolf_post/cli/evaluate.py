"""`pgolf-post eval`: bits per byte of a checkpoint or of what an artifact decodes to, by any protocol."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    derived_option,
    dollars_option,
    fresh_option,
    json_option,
    quiet_option,
    threads_option,
    weights_option,
)
from pgolf_post.cli.scoring import (
    breakdown_facts,
    breakdown_option,
    open_scored,
    parse_protocol,
    protocol_options,
)

if TYPE_CHECKING:
    from pgolf_post.score.breakdown.sums import Breakdown


@click.command("eval")
@checkpoint_argument
@weights_option
@data_option
@derived_option
@protocol_options
@breakdown_option
@click.option("--compile", "compiled", is_flag=True, help="Compile the model with torch.compile first; not for ttt.")
@click.option(
    "--time-budget",
    type=FiniteFloat(min=0, min_open=True),
    help="Warn at 80 % of this many seconds; at 100 % stop and keep what was done.",
)
@fresh_option
@dollars_option
@threads_option
@quiet_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    data_dir: Path | None,
    compiled: bool,
    kinds: tuple[str, ...],
    time_budget: float | None,
    fresh: bool,
    dollars_per_hour: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score CHECKPOINT, which may also be an artifact file or the folder that holds one.

    \b
    pgolf-post eval CKPT                                        the challenge's plain windows
    pgolf-post eval CKPT --protocol sliding --stride 64
    pgolf-post eval CKPT --protocol ttt --ttt record-1855 --seq-len 512 --set "phases=[44,88]"
    pgolf-post eval CKPT --breakdown token-class,repeat         where the nats lie; also: all
    torchrun --standalone --nproc_per_node=8 -m pgolf_post eval CKPT --protocol sliding

    Sums by document are kept beside what was scored, so that `compare` can pair two scores by document. Ctrl-C and an
    exhausted --time-budget keep what was done; the same command goes on from there.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.ledger.recording import record
    from pgolf_post.score.phase_times import PhaseTimes
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.report import SCORE_HEADER, learning_facts, score_rows
    from pgolf_post.score.session import Session

    started = time.perf_counter()
    ranks = Ranks.join()
    try:
        session = Session(PhaseTimes(time_budget), ranks)
        opened = open_scored(checkpoint, weights, data_dir, session.clock)
        protocol = parse_protocol(options, opened.config, "eval")
        session.description = f"scoring ({protocol.protocol})"
        score = opened.score(protocol, fresh, session, ModelPool(compiled), bool(kinds))
    finally:
        ranks.leave()
    if not ranks.is_main:
        return
    print_table(opened.name, SCORE_HEADER, score_rows(score.facts, score.cached))
    if kinds:
        _print_breakdown(score.breakdown, kinds)
    seconds = round(time.perf_counter() - started, 3)
    record(score.folder, dollars_per_hour=dollars_per_hour, seconds=seconds)
    if as_json:
        sums = {key: score.facts[key] for key in ("bpb", "nats", "tokens", "bytes", "documents")}
        phases = {key: value for key, value in score.facts.items() if key.endswith("_seconds")}
        named = {"path": str(checkpoint or opened.name), "protocol": protocol.model_dump(mode="json")}
        learned = learning_facts(score.facts)
        by_bin = {"breakdown": breakdown_facts(score.breakdown, kinds)} if kinds else {}
        print_json({**named, **sums, **learned, **by_bin, **phases, "cached": score.cached, "seconds": seconds})


def _print_breakdown(breakdown: Breakdown, kinds: tuple[str, ...]) -> None:
    from pgolf_post.score.breakdown.kinds import KINDS
    from pgolf_post.score.breakdown.report import BINS_HEADER, bin_rows, summary_line

    for kind in kinds:
        print_table(f"by {KINDS[kind].title}", BINS_HEADER, bin_rows(breakdown.kinds[kind].of_bins(), kind))
    say(summary_line(breakdown))
