"""The stages that score a trial, in the order in which they run. A new one is one file here and one row."""

from __future__ import annotations

from pgolf_post.sweep.stages import drawn, expected, plain, screen, sliding, ttt, whole
from pgolf_post.sweep.stages.base import SweepStage

STAGES: dict[str, SweepStage] = {
    # name: SweepStage(settings, protocol, function, what it reads, passes a token …)
    "screen": SweepStage(
        screen.ScreenStage, drawn.protocol, screen.score, "words of drawn windows", 1.0,
        paired_by="piece", default=screen.ScreenStage(), version=screen.VERSION,
    ),
    "expected": SweepStage(
        expected.ExpectedStage, drawn.protocol, expected.score, "drawn windows, as the unquantized model expects", 2.0,
        paired_by="piece", compares=True, version=expected.VERSION,
    ),
    "plain": SweepStage(plain.PlainStage, plain.protocol, whole.score, "the validation text", 1.0),
    "sliding": SweepStage(sliding.SlidingStage, sliding.protocol, whole.score, "the validation text", 8.0),
    "ttt": SweepStage(ttt.TTTStage, ttt.protocol, whole.score, "the validation text, learning from it", 30.0),
}  # fmt: skip
