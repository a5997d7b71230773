"""One low-rank adapter per document, many documents at once: score a chunk, commit it, step, go on.

Documents of similar length are a batch whose rows advance together, chunk by chunk, each chunk read in a window that
ends with it. Every row has adapters of its own, so documents in a batch do not know of each other; between batches B
returns to zero. The step after a chunk is on its mean nats, document by document; a document's last chunk is scored and
not trained on. A document's targets are the tokens after its BOS and the BOS of the next.

One forward serves score and step, as in the public scripts: a chunk's nats are computed from its hidden states without
gradients, and committed; then the log hands out the same targets, and what the graph holds becomes gradients. On a GPU
the rows of a batch go through it in parts of ROW_TOKENS, whose gradients lie in different rows of the adapters: 64
documents of 2,048 tokens would hold more activations at once than an H100 has memory, a part holds an eighth of them.

A is carried from batch to batch along a lane, one of a fixed number of queues: the published run had one per GPU. A
batch goes to the lane with the least to do, ranks share the lanes: so the result does not depend on their number.
Source: openai/parameter-golf, PR #1855.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pgolf_post.base.autocast import autocast_to
from pgolf_post.base.progress import say
from pgolf_post.errors import PgolfError
from pgolf_post.families import ModelFamily
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import distribution, observe, target_nats
from pgolf_post.score.session import Session
from pgolf_post.score.spans import is_out_of_memory
from pgolf_post.score.ttt.adapters import AdapterProtocol, Adapters
from pgolf_post.score.ttt.documents import Document, batch_by_length, deal, find_documents
from pgolf_post.score.ttt.optimizers import (
    Optimizers,
    load_optimizers_state,
    make_optimizers,
    optimizer_step,
    optimizers_state,
)

ROW_TOKENS: dict[str, int] = {"cuda": 16384}  # tokens of one forward, by type of device; elsewhere all rows at once
LEARNING_COSTS = 1.5  # a backward, in forwards
TUNE = -1  # in the place of a chunk: all ranks tune the weights (phased.py)


class LoraProtocol(AdapterProtocol):
    method: Literal["lora"] = "lora"
    lanes: int = Field(8, ge=1, description="queues of batches, shared by ranks, along each of which A is carried")

    @model_validator(mode="after")
    def _chunk_fits(self) -> Self:
        if self.chunk_tokens > self.seq_len:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} exceeds the window's {self.seq_len} tokens (seq_len)")
        return self


class LoraPass:
    """Method `lora`: each step scores one chunk of every document of a batch that has it."""

    def __init__(
        self, module: Any, family: ModelFamily, log: CommitLog, settings: LoraProtocol, session: Session
    ) -> None:
        self.module, self.log, self.settings, self.session = module, log, settings, session
        self.batches = batch_by_length(find_documents(log.tokens, log.num_targets), settings.batch_documents)
        self._plan()
        module.requires_grad_(False)
        self.adapters = Adapters(module, family, settings)
        self.adapters.require_zero_is_plain()
        self.unused: dict[str, Tensor] = self.adapters.a  # the first lane's A
        self.carried: dict[int, dict[str, Tensor]] = {}  # lane → A, where the lane has begun and goes on
        self.optimizers: Optimizers = {}
        self.optimizer_steps = 0
        if session.ranks.world_size > settings.lanes:
            ranks = session.ranks.world_size
            say(f"warning: {settings.lanes} lanes keep no more of {ranks} ranks busy: --set lanes=…")

    def tuned_after(self) -> list[int]:
        """Return the numbers of the batches after which all ranks tune the weights together."""
        return []

    def _plan(self) -> None:
        """List the steps of this rank, (batch, chunk) in the order of batches, and what each costs."""
        ranks, tuned = self.session.ranks, self.tuned_after()

        # a batch costs what its chunks cost, and goes to the lane with the least to do
        chunks = [range(self.num_chunks(batch[0])) for batch in self.batches]
        costs = [sum(self._cost(b, k) for k in chunks[b]) for b in range(len(self.batches))]
        self.lanes = deal(costs, self.settings.lanes, tuned)

        # this rank takes the batches of its lanes, and every joint tuning
        self.plan: list[tuple[int, int]] = []
        for b, lane in enumerate(self.lanes):
            if lane % ranks.world_size == ranks.rank:
                self.plan += [(b, k) for k in chunks[b]]
            if b in tuned:
                self.plan.append((b, TUNE))
        self.costs = np.array([0.0 if k == TUNE else self._cost(b, k) for b, k in self.plan])

    def num_chunks(self, document: Document) -> int:
        return -(-document.targets // self.settings.chunk_tokens)

    def _cost(self, batch: int, chunk: int) -> float:
        """Return the cost of a step in tokens of a forward."""
        rows = sum(self.num_chunks(document) > chunk for document in self.batches[batch])
        learners = sum(self.num_chunks(document) > chunk + 1 for document in self.batches[batch])
        window = min(self.settings.seq_len, (chunk + 1) * self.settings.chunk_tokens)
        return float((rows + LEARNING_COSTS * learners) * window)

    def step(self, index: int) -> None:
        number, chunk = self.plan[index]
        if chunk == 0:
            self.begin(number)

        # documents that go on after the chunk learn from it; longest come first, so they are the batch's first rows
        batch = self.batches[number]
        learners = [document for document in batch if self.num_chunks(document) > chunk + 1]
        ending = [document for document in batch if self.num_chunks(document) == chunk + 1]
        try:
            with self.adapters.attached():
                for first, documents in self.parts(ending, chunk):
                    self.score(documents, chunk, len(learners) + first)
                if learners:
                    self.score_and_learn(learners, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fewer = max(1, self.settings.batch_documents // 2)
            raise PgolfError(
                f"out of memory with {len(learners) + len(ending)} documents at once",
                hint=f"--set batch_documents={fewer}, a smaller rank, or --set precision=bf16",
            ) from None

    def begin(self, number: int) -> None:
        """Start a batch: the lane's A, B = 0, optimizers without a past."""
        lane = self.lanes[number]
        carried = self.carried.pop(lane, {}) or self.unused or self.adapters.drawn()
        self.unused = {}
        self.adapters.begin(carried, len(self.batches[number]))
        if lane in self.lanes[number + 1 :]:
            self.carried[lane] = self.adapters.a  # is learned in place: the lane's next batch begins with it
        self.optimizers = make_optimizers(self.adapters.trained(), self.settings)

    def window(self, chunk: int) -> tuple[int, int, int]:
        """Return where a chunk's window begins, its first and one past its last target; offsets in the document."""
        first = chunk * self.settings.chunk_tokens + 1
        stop = first + self.settings.chunk_tokens
        return max(0, stop - 1 - self.settings.seq_len), first, stop

    def parts(self, documents: list[Document], chunk: int) -> list[tuple[int, list[Document]]]:
        """Return documents in parts that go through one forward, each with the number of its first document."""
        begin, _, stop = self.window(chunk)
        limit = ROW_TOKENS.get(self.device.type)
        size = max(1, len(documents) if limit is None else limit // (stop - 1 - begin))
        return [(first, documents[first : first + size]) for first in range(0, len(documents), size)]

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    def score(self, documents: list[Document], chunk: int, first_row: int) -> None:
        """Commit the nats of the last chunk of documents, whose adapters are the batch's from `first_row` on."""
        with self.session.clock.phase("score"), torch.no_grad():
            tokens = self.tokens(documents, chunk)
            self.commit(documents, chunk, tokens, self.hidden(tokens, chunk, first_row))

    def score_and_learn(self, documents: list[Document], chunk: int) -> None:
        """Commit a chunk's nats of documents that go on after it, then take one step on it: on one forward."""
        trained = self.adapters.trained()
        for tensor in trained.values():
            tensor.requires_grad_(True)
        for first_row, some in self.parts(documents, chunk):
            self.score_and_differentiate(some, chunk, first_row)
        with self.session.clock.phase("adapt"):
            optimizer_step(self.optimizers, trained, self.settings.learning_rate, clip=0.0)
            for tensor in trained.values():
                tensor.requires_grad_(False)
            self.optimizer_steps += 1

    def score_and_differentiate(self, documents: list[Document], chunk: int, first_row: int) -> None:
        """Commit a chunk's nats of documents, then add their gradients to those rows of the adapters."""
        # the forward keeps its graph; nats are committed from detached hidden states
        with self.session.clock.phase("score"):
            tokens = self.tokens(documents, chunk)
            with torch.enable_grad():
                hidden = self.hidden(tokens, chunk, first_row)
            self.commit(documents, chunk, tokens, hidden.detach())

        # targets come from the log, which hands out only what has been committed
        with self.session.clock.phase("adapt"):
            begin, first, stop = self.window(chunk)
            targets = np.stack([self.scored_tokens(one, begin, stop) for one in documents])[:, first - stop :]
            with torch.enable_grad():
                with autocast_to(self.device, self.settings.autocast):
                    nats = target_nats(self.adapters, hidden, torch.from_numpy(targets).to(hidden.device).flatten())
                nats.view(len(documents), -1).mean(dim=1).sum().backward()

    def tokens(self, documents: list[Document], chunk: int) -> Tensor:  # (rows, width) int64
        """Return a chunk's window of each document and the token after it, zeros beyond a document's end."""
        begin, _, stop = self.window(chunk)
        padded = np.zeros((len(documents), stop - begin), dtype=np.int64)
        for row, document in enumerate(documents):
            own = self.log.tokens[document.start + begin : min(document.start + stop, document.stop + 1)]
            padded[row, : len(own)] = own
        return torch.from_numpy(padded).to(self.device)

    def hidden(self, tokens: Tensor, chunk: int, first_row: int) -> Tensor:  # → (rows · chunk's targets, dim)
        _, first, stop = self.window(chunk)
        with autocast_to(self.device, self.settings.autocast):
            return self.adapters.hidden(tokens[:, :-1], first_row)[:, first - stop :].flatten(0, 1)

    @torch.no_grad()
    def commit(self, documents: list[Document], chunk: int, tokens: Tensor, hidden: Tensor) -> None:
        """Commit the nats of a chunk of documents, and show the observer its distributions."""
        _, first, stop = self.window(chunk)
        with autocast_to(self.device, self.settings.autocast):
            nats = target_nats(self.adapters, hidden, tokens[:, first - stop :].flatten())

        # places of targets in the text, -1 where a document ends before the chunk does
        chunks = [np.arange(one.start + first, min(one.start + stop, one.stop + 1)) for one in documents]
        real = np.concatenate([row * (stop - first) + np.arange(len(some)) for row, some in enumerate(chunks)])
        places = np.full(len(documents) * (stop - first), -1)
        places[real] = np.concatenate(chunks)

        with autocast_to(self.device, self.settings.autocast):
            observe(self.session.observer, _AllRows(self.adapters, hidden), torch.arange(len(hidden)), places)
            self._note(documents, hidden, tokens[:, first - stop :].flatten(), places, chunk)
        self.log.commit(places[real], nats.double().cpu().numpy()[real])

    def _note(
        self,
        documents: list[Document],
        hidden: Tensor,  # (rows · chunk's targets, dim)
        targets: Tensor,  # (rows · chunk's targets,) int64
        places: np.ndarray,  # (rows · chunk's targets,) int64, -1 beyond a document's end
        chunk: int,
    ) -> None:
        """Note what a breakdown needs beside the nats, if one is made."""
        if self.session.details is None:
            return
        begin, first, stop = self.window(chunk)
        context = np.tile(np.arange(first, stop) - begin, len(documents))
        self.session.details.note(self.adapters, hidden, targets, places, context, len(self.log.tokens))

    def scored_tokens(self, document: Document, begin: int, stop: int) -> np.ndarray:  # (stop - begin,) int64
        """Return a document's tokens at offsets [begin, stop) from the log; its own BOS is known from the start."""
        own = self.log.hand_out(document.start + max(1, begin), document.start + stop)
        bos = self.log.tokens[document.start : document.start + 1].astype(np.int64)
        return own if begin else np.concatenate([bos, own])

    def state(self) -> Mapping[str, Tensor]:
        trained = self.adapters.trained()
        moments = optimizers_state(self.optimizers, trained)
        return {
            **{f"adapter.{name}": tensor for name, tensor in trained.items()},
            **{f"lane.{lane}.{key}": x for lane, a in self.carried.items() for key, x in a.items()},
            **{f"optimizer.{key}": tensor for key, tensor in moments.items()},
            "optimizer_steps": torch.tensor(self.optimizer_steps),
            "lane_in_use": torch.tensor(next((n for n, a in self.carried.items() if a is self.adapters.a), -1)),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.adapters.load_state(part_of(state, "adapter."))
        for lane in {int(key.partition(".")[0]) for key in part_of(state, "lane.")}:
            self.carried[lane] = {key: x.to(self.device) for key, x in part_of(state, f"lane.{lane}.").items()}
        if (lane := int(state["lane_in_use"])) >= 0:
            self.carried[lane] = self.adapters.a
        self.optimizers = make_optimizers(self.adapters.trained(), self.settings)
        load_optimizers_state(self.optimizers, self.adapters.trained(), part_of(state, "optimizer."))
        self.optimizer_steps = int(state["optimizer_steps"])

    def facts(self) -> dict[str, Any]:
        """Return evidence that the pass learned, on all ranks together, as JSON facts."""
        steps = torch.tensor([self.optimizer_steps], device=self.session.ranks.device)
        self.session.ranks.sum_(steps)
        adapted = {"trained_parameters": self.adapters.numbers, "adapters": len(self.adapters.a)}
        return {"optimizer_steps": int(steps), **adapted}


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of a state whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


class _AllRows:
    """Distributions of a batch whose logits exist only for all rows together; picked by number."""

    def __init__(self, adapters: Adapters, hidden: Tensor) -> None:
        self.adapters, self.all = adapters, hidden

    @cached_property
    def every(self) -> Tensor:  # (rows, vocab_size)
        return distribution(self.adapters, self.all)

    def log_probs(self, numbers: Tensor) -> Tensor:
        return self.every[numbers]
