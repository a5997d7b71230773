"""The demo's closing tables: four quantizers at one byte count, then what else its checkpoints can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgolf_post.base.progress import print_table, say

HEADER = ("", "bytes", "bpb", "gap, bpb", "95 %", "seconds")
NEXT = (
    "next, with a checkpoint of your own:",
    "  pgolf-post import final_model.pt --log train.log --name mine --data data/fineweb",
    "  pgolf-post fit checkpoints/mine/step_*-imported --budget 16000000 --code train_gpt.py --eval",
)


def show(answer: dict[str, Any], seconds: float) -> None:
    """Print the tables, what took how long, and the commands to go on with."""
    say(
        f"\nbefore quantization {answer['pre_quant_bpb']:.5f} bpb, on {answer['tokens']:,} validation tokens "
        f"(an order-3 byte model fitted on the same text: {answer['byte_ngram_bpb']:.5f} bpb)"
    )
    say("gap: bpb lost by quantization, averaged over the unquantized model's predictions, with its 95 % interval")
    say("seconds: from the statistics on")
    _table(f"Four quantizers within {answer['equal_bytes']:,} bytes", answer["rows"])
    blend = f"an average of the warm-down's checkpoints ({answer['blend_ema_share']:.0%} EMA)"
    _table(f"GPTQ with SDClip as published: three λ, and {blend}", answer["more_rows"])
    say("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in answer["stage_seconds"].items()))
    say(f"total {seconds:.1f} s")
    for line in NEXT:
        say(line)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print_table(title, HEADER, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's cells. The gap of another model than the unquantized one can only be measured."""
    if "gap_bpb" in row:
        gap, half, how = row["gap_bpb"], row["gap_half_bpb"], ""
    else:
        gap, high, how = row["measured_gap_bpb"], row["measured_gap_high_bpb"], " (measured)"
        half = None if high is None else high - gap
    width = "unknown" if half is None else f"± {half:.5f}{how}"
    return row["name"], f"{row['artifact_bytes']:,}", f"{row['bpb']:.5f}", f"{gap:+.5f}", width, f"{row['seconds']:.1f}"
