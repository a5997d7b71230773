"""One scoring pass as a list of steps: timed, stopped where it is safe, kept, and continued where it stopped.

Ctrl-C, SIGTERM, SIGHUP and an exhausted time budget are the same event: at the next step boundary the log of commits
and whatever the pass has learned go to a file, and the same command goes on from there and ends with the same number. A
second signal stops at once. Under torchrun nothing is kept: the launcher kills its processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.base.signals import stop_requests
from pgolf_post.base.storage import atomic_file, disk_errors
from pgolf_post.errors import DamagedFileError, PgolfError
from pgolf_post.score.breakdown.details import Details
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer
from pgolf_post.score.phase_times import PhaseTimes

STOPPING = "stopping after this step; Ctrl-C again to stop at once"
ESTIMATE_AFTER = 3  # timed steps
ESTIMATE_WORTH_SECONDS = 10.0
# in a kept pass: prefix of what was committed, of what was learned, and of what was noted
LOG, WORK, DETAILS = "ledger.", "work.", "details."


class StoppedError(PgolfError):
    """A pass that stopped before its end, by Ctrl-C (exit 130) or its time budget (exit 1)."""


class Pass(Protocol):
    """A protocol's work on one text, cut into steps."""

    costs: np.ndarray  # (steps,) relative
    log: CommitLog

    def step(self, index: int) -> None:
        """Score, or train on, the next part of the text."""

    def state(self) -> Mapping[str, Tensor]:
        """Return what was learned so far, beside the log."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""

    def facts(self) -> dict[str, Any]:
        """Return evidence of what was learned, as JSON facts."""


@dataclass
class Session:
    """The circumstances of a pass: clock, ranks, where it is kept when stopped, who looks on."""

    clock: PhaseTimes = field(default_factory=PhaseTimes)
    ranks: Ranks = ALONE
    observer: Observer | None = None
    details: Details | None = None  # notes beside the nats, for a breakdown
    partial: Path | None = None  # where a stopped pass is kept
    identity: str = ""  # of subject, text and protocol: a partial result of another is not continued
    description: str = "scoring"
    quiet: bool = False  # part of other work that reports for it

    def run(self, work: Pass) -> None:
        """Run all steps of a pass. Raises StoppedError with the partial result kept."""
        first = self._restore(work)
        total = float(work.costs.sum())
        with stop_requests(STOPPING) as interrupted, self._progress(len(work.costs)) as advance:
            advance(first)
            started = time.perf_counter()
            for index in range(first, len(work.costs)):
                if interrupted or self.clock.over_budget():
                    self._stop(work, index, bool(interrupted))
                work.step(index)
                spent, done = time.perf_counter() - started, float(work.costs[first : index + 1].sum())
                rest = spent / done * (total - float(work.costs[: index + 1].sum())) if done else 0.0
                self._estimate(index - first + 1, self.clock.strict + rest)
                advance(1, f"≈ {self.clock.strict + rest:.0f} s in all")
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    def _progress(self, steps: int) -> AbstractContextManager[Callable[..., None]]:
        if self.quiet:
            return nullcontext(lambda *_: None)
        return progress_bar(self.description, steps)

    def _estimate(self, steps: int, whole: float) -> None:
        """Say once, after a few timed steps, what the pass will cost."""
        if steps == ESTIMATE_AFTER and whole > ESTIMATE_WORTH_SECONDS and not self.quiet:
            budget = self.clock.budget_seconds
            against = f" of a budget of {budget:.0f} s" if budget else ""
            say(f"{self.description}: about {whole:.0f} s{against}")

    def _stop(self, work: Pass, index: int, by_hand: bool) -> None:
        done = int(work.log.scored.sum())
        what = "interrupted" if by_hand else f"the time budget of {self.clock.budget_seconds:.0f} s is spent"
        message = f"{what} with {done:,} of {work.log.num_targets:,} targets scored"
        if done:
            message += f" ({work.log.nats.sum() / done:.6f} nats per token so far)"
        hint = None
        if self.partial is not None and self.ranks.world_size == 1:
            self._keep(work, index)
            how = "run the same command again" if by_hand else "raise --time-budget"
            hint = f"{how} to go on from there (kept in {self.partial})"
        error = StoppedError(message, hint=hint)
        error.exit_code = 130 if by_hand else 1
        raise error

    def _keep(self, work: Pass, index: int) -> None:
        """Write the log, what was learned, and where to go on."""
        from safetensors.torch import save_file

        assert self.partial is not None
        arrays = {f"{LOG}{key}": torch.from_numpy(np.ascontiguousarray(x)) for key, x in work.log.state().items()}
        tensors = {f"{WORK}{key}": value.detach().cpu().contiguous().clone() for key, value in work.state().items()}
        if self.details is not None:
            noted = self.details.state()
            arrays |= {f"{DETAILS}{key}": torch.from_numpy(x) for key, x in noted.items()}
        note = {"identity": self._identity(work), "step": str(index), "seconds": json.dumps(self.clock.seconds)}
        with atomic_file(self.partial) as path, disk_errors():
            save_file({**arrays, **tensors}, path, note)

    def _identity(self, work: Pass) -> str:
        noting = ", with details" if self.details is not None else ""
        return f"{self.identity} in {len(work.costs)} steps{noting}"

    def _restore(self, work: Pass) -> int:
        """Return the step to begin with: 0, or where a kept pass of the same identity stopped."""
        if self.partial is None or not self.partial.is_file() or self.ranks.world_size > 1:
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.partial, "pt") as file:
                note: dict[str, Any] = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            index, seconds = int(note["step"]), json.loads(note["seconds"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DamagedFileError(f"{self.partial} is not a kept pass: {error}", hint=f"rm {self.partial}") from None
        if note["identity"] != self._identity(work):
            return 0
        work.log.load_state({key.removeprefix(LOG): x.numpy() for key, x in tensors.items() if key.startswith(LOG)})
        work.load_state({key.removeprefix(WORK): x for key, x in tensors.items() if key.startswith(WORK)})
        if self.details is not None:
            noted = {key.removeprefix(DETAILS): x.numpy() for key, x in tensors.items() if key.startswith(DETAILS)}
            self.details.load_state(noted)
        self.clock.load(seconds)
        say(f"{self.description}: going on from {self.partial}, {int(work.log.scored.sum()):,} targets scored")
        return index
