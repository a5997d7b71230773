"""Score a chunk by sliding window, then train on it: the weights themselves learn the text as it goes by.

The text is cut into chunks of some 32K targets. A chunk is scored with the weights as they are, committed, and then
trained on for a few epochs; the last one is scored and not trained on. With learning rate 0 this is sliding-window
scoring. Ranks share a chunk's windows, wait until all of it is scored, then share the sequences of each step, whose
gradients are added up: the step is the same whatever the number of ranks. Source: openai/parameter-golf, PR #1493 and
its forebears.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.ranks import Ranks
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.families import ModelFamily
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import target_nats
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import later_spans, sliding_spans
from pgolf_post.score.spans import Span, batch_nats, batches_of, fitting, is_out_of_memory, places_of
from pgolf_post.score.ttt.optimizers import (
    cosine,
    load_optimizers_state,
    make_optimizers,
    optimizer_step,
    optimizers_state,
)
from pgolf_post.score.ttt.scales import trained_parameters
from pgolf_post.score.ttt.settings import TTTProtocol

IGNORED = -1  # a padded target
PROBE_TOKENS = 8

Sequence = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (length,)


class ChunkPass:
    """Methods `sgd` and `scales`: each step scores one chunk and learns from it."""

    def __init__(
        self, module: Any, family: ModelFamily, ledger: CommitLog, settings: TTTProtocol, session: Session
    ) -> None:
        self.module, self.ledger, self.settings, self.session = module, ledger, settings, session
        starts = range(1, ledger.num_targets + 1, settings.chunk_tokens)
        self.chunks = [(a, min(a + settings.chunk_tokens, ledger.num_targets + 1)) for a in starts]
        self.costs = np.array([float(stop - start) for start, stop in self.chunks])
        require_same_forward(module)
        module.requires_grad_(False)
        self.parameters = trained_parameters(module, family, settings)
        self.optimizers = make_optimizers(self.parameters, settings)
        self.optimizer_steps = 0

    def spans(self, chunk: int) -> list[Span]:
        """The windows that score a chunk: those of a sliding window over the whole text."""
        start, stop = self.chunks[chunk]
        if chunk == 0:
            return sliding_spans(stop - 1, self.settings.seq_len, self.settings.stride)
        return later_spans(start, stop, self.settings.seq_len, self.settings.stride)

    def step(self, index: int) -> None:
        with self.session.clock.phase("score"):
            batches = batches_of(self.spans(index), fitting(BATCH_TOKENS, self.module))
            for number in self.session.ranks.share(range(len(batches))):
                nats = batch_nats(self.module, self.ledger.tokens, batches[number], self.session)
                self.ledger.commit(places_of(batches[number]), nats)
            self.ledger.merge(self.session.ranks, *self.chunks[index])
        if index + 1 < len(self.chunks):
            with self.session.clock.phase("adapt"):
                self.learn(index)

    def learn(self, chunk: int) -> None:
        """Train on a scored chunk."""
        start, stop = self.chunks[chunk]
        tokens = self.ledger.hand_out(start - 1, stop)
        sequences = cut_sequences(tokens, self.settings.seq_len)
        decay = cosine(chunk, len(self.chunks)) if self.settings.schedule == "cosine" else 1.0
        for _ in range(self.settings.epochs):
            for first in range(0, len(sequences), self.settings.train_batch_seqs):
                step_sequences = sequences[first : first + self.settings.train_batch_seqs]
                backward(self.module, self.parameters, step_sequences, self.session.ranks)
                rate = self.settings.learning_rate * decay
                optimizer_step(self.optimizers, self.parameters, rate, self.settings.grad_clip)
                self.optimizer_steps += 1

    def state(self) -> Mapping[str, Tensor]:
        weights = {f"weight.{name}": parameter for name, parameter in self.parameters.items()}
        moments = optimizers_state(self.optimizers, self.parameters)
        steps = torch.tensor(self.optimizer_steps)
        return {**weights, **{f"optimizer.{key}": x for key, x in moments.items()}, "optimizer_steps": steps}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight.{name}"])
        moments = {k.removeprefix("optimizer."): x for k, x in state.items() if k.startswith("optimizer.")}
        load_optimizers_state(self.optimizers, self.parameters, moments)
        self.optimizer_steps = int(state["optimizer_steps"])

    def facts(self) -> dict[str, Any]:
        """Evidence that it acted."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        learned = sum(lesson.stop - lesson.start - 1 for lesson in self.ledger.lessons)
        return {"optimizer_steps": self.optimizer_steps, "trained_parameters": count, "learned_tokens": learned}


def cut_sequences(tokens: np.ndarray, seq_len: int) -> list[Sequence]:  # tokens: (n + 1,) → n targets
    """Neighbouring sequences of at most seq_len inputs, each with its targets."""
    starts = range(0, len(tokens) - 1, seq_len)
    return [(tokens[i : i + seq_len][: len(tokens) - 1 - i], tokens[i + 1 : i + seq_len + 1]) for i in starts]


def pad(sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Inputs and targets as (batch, longest) int64; what is padded has target IGNORED and no past or future."""
    longest = max(len(inputs) for inputs, _ in sequences)
    inputs = np.zeros((len(sequences), longest), dtype=np.int64)
    targets = np.full((len(sequences), longest), IGNORED, dtype=np.int64)
    for row, (some, wanted) in enumerate(sequences):
        inputs[row, : len(some)], targets[row, : len(wanted)] = some, wanted
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def micro_batches(sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    """Parts of one step that fit in memory at once."""
    longest = max((len(inputs) for inputs, _ in sequences), default=1)
    size = max(1, batch_tokens // longest)
    for first in range(0, len(sequences), size):
        yield sequences[first : first + size]


@torch.enable_grad()
def backward(module: Any, parameters: Mapping[str, Tensor], sequences: list[Sequence], ranks: Ranks) -> None:
    """Gradients of the mean nats per target, the same on every rank; each takes a part of the sequences.

    Raises PgolfError naming the setting where memory runs out.
    """
    own = [sequences[number] for number in ranks.share(range(len(sequences)))]
    total = sum(len(targets) for _, targets in sequences)
    device = next(module.parameters()).device
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for part in micro_batches(own, fitting(BATCH_TOKENS, module)):
            inputs, targets = (tensor.to(device) for tensor in pad(part))
            real = targets != IGNORED
            nats = target_nats(module, module.hidden(inputs)[real], targets[real])
            (nats.sum() / total).backward()
        sum_gradients(parameters, ranks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PgolfError(
            f"out of memory while training on {len(part)} sequences of {inputs.size(1)} tokens",
            hint=f"train on shorter or fewer sequences: --seq-len {inputs.size(1) // 2}, or --set train_batch_seqs=1",
        ) from None
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


@torch.no_grad()
def sum_gradients(parameters: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Add up gradients over ranks, in one message; a rank without a sequence adds nothing."""
    if ranks.world_size == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()])
    ranks.sum_(flat)
    for parameter, gradient in zip(
        parameters.values(), flat.split([p.numel() for p in parameters.values()]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def synthetic_tokens(module: Any, count: int = PROBE_TOKENS) -> Tensor:  # (2, count)
    """Token ids made up for a check before anything is scored; ids 2 … are no BOS, and every vocabulary has some."""
    device = next(module.parameters()).device
    ids = torch.arange(2 * count, device=device).view(2, count)
    return 2 + ids % 2


def require_same_forward(module: Any) -> None:
    """Raise VerificationError unless the forward that is trained is, bit for bit, the one that scores."""
    tokens = synthetic_tokens(module)
    with torch.no_grad():
        scoring = module.logits(module.hidden(tokens))
    with torch.enable_grad():
        training = module.logits(module.hidden(tokens)).detach()
    if not torch.equal(scoring, training):
        worst = float((scoring - training).abs().max())
        raise VerificationError(
            f"the model's forward with gradients is not the one that scores: logits differ by {worst:g}"
        )
