"""`pgolf-post eval`: bits per byte of a checkpoint or of what an artifact decodes to, by any protocol."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    dollars_option,
    fresh_option,
    json_option,
    weights_option,
)
from pgolf_post.cli.scoring import open_subject, parse_protocol, protocol_options


@click.command("eval")
@checkpoint_argument
@weights_option
@data_option
@protocol_options
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the model first (not for ttt).")
@click.option(
    "--time-budget", type=click.FloatRange(min=0, min_open=True), help="Seconds; warn at 80 %, stop and keep at 100 %."
)
@fresh_option
@dollars_option
@json_option
def command(
    checkpoint: Path | None,
    weights: str | None,
    data_dir: Path | None,
    compiled: bool,
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
    torchrun --standalone --nproc_per_node=8 -m pgolf_post eval CKPT --protocol sliding

    Sums by document are kept beside what was scored, so that two scores can be compared document by document. Ctrl-C
    and an exhausted --time-budget keep what was done; the same command goes on from there.
    """
    from pgolf_post.base.ranks import Ranks
    from pgolf_post.ledger.recording import record
    from pgolf_post.score.phase_times import PhaseTimes
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.session import Session

    started = time.perf_counter()
    ranks = Ranks.join()
    try:
        session = Session(PhaseTimes(time_budget), ranks)
        with session.clock.phase("load"):
            subject = open_subject(checkpoint, weights, data_dir)
        protocol = parse_protocol(options, subject.config, "eval")
        session.description = f"scoring ({protocol.protocol})"
        score, cached = subject.score(protocol, fresh, session, ModelPool(compiled))
    finally:
        ranks.leave()
    if not ranks.is_main:
        return
    print_table(str(subject.name), ("", "value"), _rows(score, cached))
    seconds = round(time.perf_counter() - started, 3)
    record(Path(score["folder"]), dollars_per_hour=dollars_per_hour, seconds=seconds)
    if as_json:
        sums = {key: score[key] for key in ("bpb", "nats", "tokens", "bytes", "documents")}
        phases = {key: value for key, value in score.items() if key.endswith("_seconds")}
        named = {"path": str(checkpoint or subject.name), "protocol": protocol.model_dump(mode="json")}
        print_json({**named, **sums, **_evidence(score), **phases, "cached": cached, "seconds": seconds})


def _evidence(score: dict[str, Any]) -> dict[str, Any]:
    """What a protocol that learns says it did."""
    names = ("optimizer_steps", "trained_parameters", "learned_tokens", "adapters", "phases_run", "global_steps")
    return {name: score[name] for name in names if name in score}


def _rows(score: dict[str, Any], cached: bool) -> list[tuple[str, str]]:
    rows = [("bits per byte", f"{score['bpb']:.6f}"), ("nats per token", f"{score['nats'] / score['tokens']:.6f}")]
    rows += [("tokens", f"{score['tokens']:,}"), ("bytes of text", f"{score['bytes']:,}")]
    rows += [("documents", f"{score['documents']:,}")]
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in _evidence(score).items()]
    for key, value in score.items():
        if key.endswith("_seconds") and not key.startswith(("strict", "convention")):
            rows.append((f"{key.removesuffix('_seconds')}, s", f"{value:.1f}"))
    if "strict_seconds" in score:
        rows.append(("strict sum, s of 600", f"{score['strict_seconds']:.1f}"))
        rows.append(("by convention (score + adapt), s of 600", f"{score['convention_seconds']:.1f}"))
    return [*rows, ("from cache", "yes" if cached else "no")]
