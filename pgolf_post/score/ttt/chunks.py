"""Score a chunk by sliding window, then train on it: the weights themselves learn the text as it goes by.

The text is cut into chunks of some 32K targets. A chunk is scored with the weights as they are, committed, and then
trained on for a few epochs; the last one is scored and not trained on. With learning rate 0 this is sliding-window
scoring. Ranks share a chunk's windows, wait until all of it is scored, then share the sequences of each step, whose
gradients are added up: the step is the same whatever the number of ranks. Methods (sgd.py, scales.py) differ in which
parameters are trained. Source: openai/parameter-golf, PR #1493 and its forebears.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from pgolf_post.families import ModelFamily
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import later_spans, sliding_spans
from pgolf_post.score.spans import Span, batch_nats, batches_of, fitting, places_of
from pgolf_post.score.ttt.gradients import backward, cut_sequences, require_same_forward
from pgolf_post.score.ttt.optimizers import (
    cosine,
    load_optimizers_state,
    make_optimizers,
    optimizer_step,
    optimizers_state,
)
from pgolf_post.score.ttt.settings import TTTProtocol


class ChunkProtocol(TTTProtocol):
    """Settings shared by the methods that train on whole chunks."""

    stride: int = Field(64, ge=1, description="stride in tokens of the sliding window that scores a chunk")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate over chunks")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 = no clipping")
    epochs: int = Field(3, ge=1, description="passes over a scored chunk")
    train_batch_seqs: int = Field(32, ge=1, description="sequences in one optimizer step")
    freeze: tuple[str, ...] = Field((), description="regular expressions of parameter names that are not trained")

    @property
    def excerpt_tokens(self) -> int:
        return 1 + max(3 * self.chunk_tokens, 4 * self.seq_len)

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride > self.seq_len:
            raise ValueError(f"stride {self.stride} exceeds the window's {self.seq_len} tokens (seq_len)")
        return self


P = TypeVar("P", bound=ChunkProtocol)


class ChunkPass(ABC, Generic[P]):
    """A pass whose every step scores one chunk and learns from it."""

    def __init__(self, module: Any, family: ModelFamily, log: CommitLog, settings: P, session: Session) -> None:
        self.module, self.family, self.log, self.settings, self.session = module, family, log, settings, session
        starts = range(1, log.num_targets + 1, settings.chunk_tokens)
        self.chunks = [(a, min(a + settings.chunk_tokens, log.num_targets + 1)) for a in starts]
        self.costs = np.array([float(stop - start) for start, stop in self.chunks])
        require_same_forward(module)
        module.requires_grad_(False)
        self.parameters = self._trained_parameters(module)
        self.optimizers = make_optimizers(self.parameters, settings)
        self.optimizer_steps = 0

    @abstractmethod
    def trained(self, names: list[str]) -> list[str]:
        """Return those of all floating-point parameters' names that the method trains."""

    def _trained_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the method's parameters less the frozen ones, by name. Raises SettingsError if none is left."""
        parameters = dict(module.named_parameters())
        names = self.trained([name for name, parameter in parameters.items() if parameter.is_floating_point()])
        kept = [name for name in names if not any(re.search(pattern, name) for pattern in self.settings.freeze)]
        if not kept:
            raise SettingsError(
                "the settings of test-time training leave no parameter to train: see last_blocks, freeze"
            )
        return {name: parameters[name] for name in kept}

    def spans(self, chunk: int) -> list[Span]:
        """Return the windows that score a chunk: those of a sliding window over the whole text."""
        start, stop = self.chunks[chunk]
        if chunk == 0:
            return sliding_spans(stop - 1, self.settings.seq_len, self.settings.stride)
        return later_spans(start, stop, self.settings.seq_len, self.settings.stride)

    def step(self, index: int) -> None:
        with self.session.clock.phase("score"):
            batches = batches_of(self.spans(index), fitting(BATCH_TOKENS, self.module))
            for number in self.session.ranks.share(range(len(batches))):
                nats = batch_nats(self.module, self.log.tokens, batches[number], self.session)
                self.log.commit(places_of(batches[number]), nats)
            self.log.merge(self.session.ranks, *self.chunks[index])
        if index + 1 < len(self.chunks):
            with self.session.clock.phase("adapt"):
                self.learn(index)

    def learn(self, chunk: int) -> None:
        """Train on a scored chunk."""
        start, stop = self.chunks[chunk]
        tokens = self.log.hand_out(start - 1, stop)
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
        """Return evidence that the pass learned, as JSON facts."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        learned = sum(taken.stop - taken.start - 1 for taken in self.log.handed_out)
        return {"optimizer_steps": self.optimizer_steps, "trained_parameters": count, "learned_tokens": learned}
