"""The log of a run: one JSON line a step in train.jsonl, a line at the terminal every few, one at the end.

Rates are recent ones, over the last few steps, because steps get slower when depth recurrence starts. An average over
the run hides that; it stands beside the recent rate. A line is appended whole and the file closed again, so that a
killed run leaves at most one torn line, which a resumed run ends before it goes on.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import FREE_SPACE, hint_of
from pgolf_post.errors import PgolfError

LOG_FILE = "train.jsonl"
RECENT_STEPS = 20
RATE_FROM_STEP, RATE_UNTIL_STEP = 5, 30  # of this process: where a minimum rate is enforced


class StepClock:
    """Tokens per second of this process, from the training seconds at which its steps ended."""

    def __init__(self, tokens_per_step: int, train_seconds: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.num_steps = 0
        self.warm_seconds = train_seconds  # when the first step, which also pays for warming up, had ended
        self.recent: deque[float] = deque([train_seconds], maxlen=RECENT_STEPS + 1)

    def tick(self, train_seconds: float) -> None:
        """Record that a step has ended at this many training seconds."""
        self.num_steps += 1
        self.recent.append(train_seconds)
        if self.num_steps == 1:
            self.warm_seconds = train_seconds

    def recent_rate(self) -> float:
        """Return tokens per second over the last steps."""
        return _rate(self.tokens_per_step * (len(self.recent) - 1), self.recent[-1] - self.recent[0])

    def warm_rate(self) -> float:
        """Return tokens per second since the first step of this process."""
        return _rate(self.tokens_per_step * (self.num_steps - 1), self.recent[-1] - self.warm_seconds)

    def require(self, minimum: float | None) -> None:
        """Raise PgolfError if the first steps of this process are slower than `minimum` tokens per second."""
        if minimum is None or not RATE_FROM_STEP <= self.num_steps <= RATE_UNTIL_STEP:
            return
        if self.warm_rate() < minimum:
            raise PgolfError(
                f"{self.warm_rate():,.0f} tokens/s over steps 2 to {self.num_steps}; "
                f"run.min_tokens_per_second is {minimum:,.0f}; stopped before more time is spent",
                hint="see what else uses the device and start again under another run.name, "
                "or accept the speed: --set run.min_tokens_per_second=RATE",
            )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)


def step_line(record: Mapping[str, Any], at: float) -> str:
    """Return a step's record as a line for the terminal; `at` is the progress at which the step began."""
    rates = "  ".join(f"{group} {lr:.3g}" for group, lr in record["lr"].items())
    objective = f"  objective {record['objective']:.4f}" if "objective" in record else ""
    return (
        f"step {record['step']:6d}  {100 * at:5.1f} %  loss {record['loss']:.4f}{objective}  "
        f"|g| {record['grad_norm']:.3f}  "
        f"lr × {record['lr_multiplier']:.3f}: {rates}  loops {record['active_loops']}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['train_seconds']:.1f} s of training, "
        f"{record['wall_seconds']:.1f} s in all"
    )


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line. Raises PgolfError if the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
    except OSError as error:
        raise PgolfError(
            f"could not write the log {path}: {error}; checkpoints saved before are intact",
            hint=hint_of(error) or FREE_SPACE,
        ) from error


def end_torn_line(path: Path) -> None:
    """End the last line of a log where a kill cut it off, so that the next line stands alone.

    Raises PgolfError if the file cannot be read or written.
    """
    try:
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as log:
                log.write("\n")
    except OSError as error:
        raise PgolfError(f"could not repair the log {path}: {error}", hint=hint_of(error) or FREE_SPACE) from error
