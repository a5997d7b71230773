"""The forward pass behind every protocol: a batch of windows in, nats of some of their targets out.

A span is a window of the text and how many of its last positions are scored; logits are computed for those alone. The
batches do not depend on how many processes share them, so neither does any token's score. Where memory runs out, a
batch is halved, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.autocast import autocast_dtype, autocast_to
from pgolf_post.base.progress import say
from pgolf_post.errors import MismatchError, PgolfError
from pgolf_post.families import LanguageModel
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import observe, target_nats
from pgolf_post.score.session import Session
from pgolf_post.settings import Precision

CPU_BATCH_TOKENS = 2048  # a sixth faster than 16,384 at width 256
# The CPU's allocator has no exception of its own; on a GPU page-locked memory and cuBLAS's workspace have none either.
OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Span(NamedTuple):
    """Inputs [start, start + length); the last `scored` of the positions predict scored targets."""

    start: int
    length: int
    scored: int

    @property
    def targets(self) -> tuple[int, int]:
        """First and one past the last scored target, as places in the text."""
        stop = self.start + self.length + 1
        return stop - self.scored, stop


def places_of(spans: list[Span]) -> np.ndarray:  # (Σ scored,) int64
    """Return the scored targets of spans, in their order."""
    return np.concatenate([np.arange(*span.targets) for span in spans])


def context_of(spans: list[Span]) -> np.ndarray:  # (Σ scored,) int64
    """Return how many tokens each scored target's window holds before it, in the order of `places_of`."""
    return np.concatenate([np.arange(span.length - span.scored, span.length) + 1 for span in spans])


def batches_of(spans: list[Span], batch_tokens: int) -> list[list[Span]]:
    """Return batches of neighbouring spans of equal shape, `batch_tokens` input tokens at most (or one span)."""
    batches = []
    for (length, _), same in groupby(spans, key=lambda span: (span.length, span.scored)):
        rows, size = list(same), max(1, batch_tokens // length)
        batches += [rows[i : i + size] for i in range(0, len(rows), size)]
    return batches


def fitting(batch_tokens: int, module: LanguageModel) -> int:
    """Return the input tokens of one batch: fewer on a CPU, whose caches should hold them, than on a GPU."""
    on_cpu = next(module.parameters()).device.type == "cpu"
    return min(batch_tokens, CPU_BATCH_TOKENS) if on_cpu else batch_tokens


def stack(tokens: np.ndarray, batch: list[Span]) -> tuple[Tensor, Tensor]:
    """Return inputs (batch, length) and scored targets (batch, scored), int64."""
    rows = np.stack([tokens[s.start : s.start + s.length + 1] for s in batch]).astype(np.int64)
    whole = torch.from_numpy(rows)
    return whole[:, :-1].contiguous(), whole[:, -batch[0].scored :].contiguous()


@torch.no_grad()
def batch_nats(
    module: LanguageModel, tokens: np.ndarray, batch: list[Span], session: Session, precision: Precision = "fp32"
) -> np.ndarray:
    """Return float64 nats (batch · scored,) of the targets of spans of one shape.

    Halves the batch where memory runs out.
    """

    def work(part: list[Span]) -> np.ndarray:
        with computing_in(precision, module):
            hidden, targets = scored_hidden(module, tokens, part)
            nats = target_nats(module, hidden, targets)
            observe(session.observer, module, hidden, places_of(part))
            if session.details is not None:
                session.details.note(module, hidden, targets, places_of(part), context_of(part), len(tokens))
        return nats.double().cpu().numpy()

    return halving(work, batch)


def computing_in(precision: Precision, module: LanguageModel) -> AbstractContextManager[object]:
    """Return a context in which a module's products are computed in a precision."""
    device = next(module.parameters()).device
    return autocast_to(device, autocast_dtype(precision, device))


def scored_hidden(
    module: LanguageModel, tokens: np.ndarray, batch: list[Span]
) -> tuple[Tensor, Tensor]:  # (batch · scored, dim), (batch · scored,) int64
    """Return hidden states at the scored positions of spans of one shape, and their targets, on the module's device."""
    device = next(module.parameters()).device
    inputs, targets = stack(tokens, batch)
    hidden = module.hidden(inputs.to(device))[:, -batch[0].scored :].flatten(0, 1)
    return hidden, targets.to(device).flatten()


def halving(work: Callable[[list[Span]], np.ndarray], batch: list[Span]) -> np.ndarray:
    """Return work(batch); where memory runs out, that of its halves joined along the last axis.

    Raises PgolfError if even one window does not fit.
    """
    try:
        return work(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if len(batch) == 1:
        raise PgolfError(
            f"out of memory on a single window of {batch[0].length} tokens", hint="score shorter windows: --seq-len"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    say(f"out of memory with {len(batch)} windows of {batch[0].length} tokens at once; trying {half}")
    return np.concatenate([halving(work, part) for part in (batch[:half], batch[half:])], axis=-1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch ran out of memory, on a GPU or on the CPU."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)


class SpanPass:
    """A pass without learning: every step is a batch of spans; ranks take turns."""

    def __init__(
        self,
        module: LanguageModel,
        log: CommitLog,
        spans: list[Span],
        batch_tokens: int,
        session: Session,
        precision: Precision = "fp32",
    ) -> None:
        self.module, self.log, self.session, self.precision = module, log, session, precision
        batches = batches_of(spans, batch_tokens)
        self.batches = [batches[i] for i in session.ranks.share(range(len(batches)))]
        self.costs = np.array([float(len(b) * b[0].length) for b in self.batches])

    def step(self, index: int) -> None:
        batch = self.batches[index]
        with self.session.clock.phase("score"):
            nats = batch_nats(self.module, self.log.tokens, batch, self.session, self.precision)
            self.log.commit(places_of(batch), nats)

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is learned."""

    def facts(self) -> dict[str, Any]:
        return {}


def num_targets(num_tokens: int, seq_len: int, tail: str) -> int:
    """Return how many targets of a text are scored: all but its first token, or whole windows of them.

    Raises MismatchError if there is none.
    """
    targets = num_tokens - 1 if tail == "score" else (num_tokens - 1) // seq_len * seq_len
    if targets < 1:
        raise MismatchError(
            f"{num_tokens} tokens are fewer than one window of {seq_len} + 1",
            hint="score shorter windows (--seq-len), or the rest too (--tail score)",
        )
    return targets
