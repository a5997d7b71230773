"""Adapters per document, and now and then the weights themselves, tuned on the documents fully scored by then.

Adapters forget between documents; what documents have in common is left to one epoch of SGD over all that have been
scored, whenever their number passes the next phase's boundary. Sequences stay within a document; the last chunk of the
epoch is skipped. Source: openai/parameter-golf, PR #1855.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.base.ranks import Ranks
from pgolf_post.families import ModelFamily
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.documents import Document
from pgolf_post.score.ttt.gradients import Sequence, backward, cut_sequences
from pgolf_post.score.ttt.lora import TUNE, LoraPass, LoraProtocol, part_of
from pgolf_post.score.ttt.optimizers import cosine, optimizer_step


class PhasedProtocol(LoraProtocol):
    method: Literal["phased"] = "phased"  # type: ignore[assignment]
    phases: tuple[int, ...] = Field((833, 1666, 2500), description="fully scored documents at which weights are tuned")
    global_lr: float = Field(0.001, ge=0, description="learning rate of a phase")
    global_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of a phase's SGD")
    global_chunk_tokens: int = Field(32768, ge=1, description="tokens in one step of a phase")
    global_seq_len: int = Field(2048, ge=2, description="longest sequence of a phase in tokens")
    global_grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm of a phase; 0 = no clipping")

    @model_validator(mode="after")
    def _phases_ascend(self) -> Self:
        if not self.phases or list(self.phases) != sorted(set(self.phases)):
            raise ValueError(f"phases must be ascending numbers of documents, got {list(self.phases)}")
        return self


class PhasedPass(LoraPass):
    """Method `phased`: a `lora` pass with a step of all ranks together at every phase boundary."""

    settings: PhasedProtocol

    def __init__(
        self, module: Any, family: ModelFamily, log: CommitLog, settings: PhasedProtocol, session: Session
    ) -> None:
        super().__init__(module, family, log, settings, session)
        self.tuning = GlobalTuning(module, log, settings, session.ranks)
        documents, first = sum(map(len, self.batches)), settings.phases[0]
        if documents < first and not session.quiet:
            say(f"warning: no phase will run: the text has {documents} documents, the first is at {first}")

    def tuned_after(self) -> list[int]:
        return batches_before_phases([len(batch) for batch in self.batches], self.settings.phases)

    def step(self, index: int) -> None:
        number, chunk = self.plan[index]
        if chunk != TUNE:
            super().step(index)
            return
        with self.session.clock.phase("adapt"):
            self.tuning.run([document for batch in self.batches[: number + 1] for document in batch])

    def state(self) -> Mapping[str, Tensor]:
        return {**super().state(), **{f"tuned.{key}": tensor for key, tensor in self.tuning.state().items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        self.tuning.load_state(part_of(state, "tuned."))

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "phases_run": self.tuning.phases_run, "global_steps": self.tuning.steps}


def phases_reached(documents: int, phases: tuple[int, ...]) -> int:
    """Return how many phases' boundaries a number of fully scored documents has reached."""
    return sum(boundary <= documents for boundary in phases)


def batches_before_phases(sizes: list[int], phases: tuple[int, ...]) -> list[int]:  # documents of each batch
    """Return the numbers of the batches after which a phase is run."""
    reached = [0, *(phases_reached(int(documents), phases) for documents in np.cumsum(sizes))]
    return [number for number in range(len(sizes)) if reached[number + 1] > reached[number]]


class GlobalTuning:
    """The weights' own learning, at phase boundaries, which ranks reach together."""

    def __init__(self, module: Any, log: CommitLog, settings: PhasedProtocol, ranks: Ranks) -> None:
        self.module, self.log, self.settings, self.ranks = module, log, settings, ranks
        self.parameters: dict[str, Tensor] = dict(module.named_parameters())
        self.phases_run = 0
        self.steps = 0

    def run(self, scored: list[Document]) -> None:
        """Run the phase that these fully scored documents have reached; one if they passed several boundaries."""
        self.log.merge(self.ranks)
        self.phases_run = phases_reached(len(scored), self.settings.phases)
        self.tune(scored)
        phases = len(self.settings.phases)
        say(f"phase {self.phases_run} of {phases}: weights tuned on {len(scored)} scored documents")

    def tune(self, scored: list[Document]) -> None:
        """Train one epoch on documents, in the text's order."""
        chunks = self.chunks(sorted(scored, key=lambda document: document.start))
        momentum = self.settings.global_momentum
        sgd = torch.optim.SGD(list(self.parameters.values()), lr=self.settings.global_lr, momentum=momentum)
        for number, sequences in enumerate(chunks[:-1]):
            backward(self.module, self.parameters, sequences, self.ranks, self.settings.autocast)
            rate = self.settings.global_lr * cosine(number, len(chunks))
            optimizer_step({"sgd": sgd}, self.parameters, rate, self.settings.global_grad_clip)
            self.steps += 1

    def chunks(self, documents: list[Document]) -> list[list[Sequence]]:
        """Return sequences of scored tokens, gathered until a chunk is full."""
        chunks: list[list[Sequence]] = [[]]
        held = 0
        for document in documents:
            own = self.log.hand_out(document.start + 1, document.stop + 1)
            tokens = np.concatenate([self.log.tokens[document.start : document.start + 1].astype(np.int64), own])
            for sequence in cut_sequences(tokens, self.settings.global_seq_len):
                if held and held + len(sequence[1]) > self.settings.global_chunk_tokens:
                    chunks.append([])
                    held = 0
                chunks[-1].append(sequence)
                held += len(sequence[1])
        return chunks

    def state(self) -> dict[str, Tensor]:
        counts = {"phases_run": torch.tensor(self.phases_run), "steps": torch.tensor(self.steps)}
        return {**{f"weight.{name}": parameter for name, parameter in self.parameters.items()}, **counts}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight.{name}"])
        self.phases_run, self.steps = int(state["phases_run"]), int(state["steps"])
