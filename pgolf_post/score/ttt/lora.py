"""One low-rank adapter per document, many documents at once: score a chunk, commit it, step, go on.

Documents are sorted by length, longest first, and taken in batches whose rows advance together, chunk by chunk, each
chunk read in a window that ends with it. Every row has adapters of its own, so documents in a batch do not know of each
other; between batches B returns to zero. The step after a chunk is on its mean nats, document by document; a document's
last chunk is scored and not trained on. A document's targets are the tokens after its BOS and the BOS of the next.
Source: openai/parameter-golf, PR #1855.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import MismatchError, PgolfError
from pgolf_post.families import ModelFamily
from pgolf_post.progress import say
from pgolf_post.score.nats import observe, target_nats
from pgolf_post.score.session import Session
from pgolf_post.score.spans import is_out_of_memory
from pgolf_post.score.ttt.adapters import Adapters
from pgolf_post.score.ttt.ledger import Ledger
from pgolf_post.score.ttt.optimizers import (
    Optimizers,
    load_optimizers_state,
    make_optimizers,
    optimizer_step,
    optimizers_state,
)
from pgolf_post.score.ttt.phased import GlobalTuning
from pgolf_post.score.ttt.settings import TTTProtocol

LEARNING_COSTS = 3.0  # a forward and a backward, in forwards


@dataclass(frozen=True)
class Text:
    """A document's place: inputs [start, stop), targets [start + 1, stop]."""

    start: int
    stop: int

    @property
    def targets(self) -> int:
        return self.stop - self.start


def find_texts(tokens: np.ndarray, num_targets: int) -> list[Text]:
    """The documents of a text up to its last target. Raises MismatchError if it has no BOS."""
    starts = np.flatnonzero(tokens[:num_targets] == BOS_ID).tolist()
    if not starts:
        raise MismatchError(
            f"no BOS (token id {BOS_ID}) in {num_targets:,} tokens: where documents begin is unknown",
            hint="adapt without documents: --ttt sgd",
        )
    bounds = sorted({0, *starts, num_targets})
    return [Text(a, b) for a, b in pairwise(bounds)]


def batch_texts(texts: list[Text], size: int) -> list[list[Text]]:
    """Longest first, `size` at a time; ties in the text's order."""
    ordered = sorted(texts, key=lambda text: (-text.targets, text.start))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


class LoraPass:
    """Methods `lora` and `phased`: each step scores one chunk of every document of a batch that has it."""

    def __init__(
        self, module: Any, family: ModelFamily, ledger: Ledger, settings: TTTProtocol, session: Session
    ) -> None:
        self.module, self.ledger, self.settings, self.session = module, ledger, settings, session
        self.batches = batch_texts(find_texts(ledger.tokens, ledger.num_targets), settings.batch_documents)
        self.plan = [(b, k) for b, batch in enumerate(self.batches) for k in range(self.num_chunks(batch[0]))]
        self.costs = np.array([self._cost(b, k) for b, k in self.plan])
        module.requires_grad_(False)
        self.adapters = Adapters(module, family, settings)
        self.adapters.require_zero_is_plain()
        self.tuning = GlobalTuning(module, ledger, settings) if settings.method == "phased" else None
        number = sum(map(len, self.batches))
        if self.tuning and number < settings.phases[0] and not session.quiet:
            say(f"warning: no phase will run: the text has {number} documents, the first is at {settings.phases[0]}")
        self.optimizers: Optimizers = {}
        self.optimizer_steps = 0

    def num_chunks(self, text: Text) -> int:
        return -(-text.targets // self.settings.chunk_tokens)

    def _cost(self, batch: int, chunk: int) -> float:
        rows = sum(self.num_chunks(text) > chunk for text in self.batches[batch])
        learners = sum(self.num_chunks(text) > chunk + 1 for text in self.batches[batch])
        window = min(self.settings.seq_len, (chunk + 1) * self.settings.chunk_tokens)
        return float((rows + LEARNING_COSTS * learners) * window)

    def step(self, index: int) -> None:
        number, chunk = self.plan[index]
        batch = self.batches[number]
        if chunk == 0:
            self.adapters.reset()
            self.optimizers = make_optimizers(self.adapters.trained(), self.settings)
        rows = [text for text in batch if self.num_chunks(text) > chunk]
        learners = [text for text in batch if self.num_chunks(text) > chunk + 1]
        try:
            with self.adapters.attached():
                with self.session.clock.phase("score"):
                    self.score(rows, chunk)
                with self.session.clock.phase("adapt"):
                    self.learn(learners, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PgolfError(
                f"out of memory with {len(rows)} documents at once",
                hint=f"--set batch_documents={max(1, self.settings.batch_documents // 2)}, or a smaller rank",
            ) from None
        if self.tuning is not None and chunk + 1 == self.num_chunks(batch[0]):
            with self.session.clock.phase("adapt"):
                self.tuning.after([text for some in self.batches[: number + 1] for text in some])

    def window(self, chunk: int) -> tuple[int, int, int]:
        """Of a chunk: where its window begins, its first and one past its last target; offsets in the document."""
        first = chunk * self.settings.chunk_tokens + 1
        stop = first + self.settings.chunk_tokens
        return max(0, stop - 1 - self.settings.seq_len), first, stop

    @torch.no_grad()
    def score(self, rows: list[Text], chunk: int) -> None:
        """Commit a chunk's nats of every document that has it."""
        begin, first, stop = self.window(chunk)
        width = stop - begin
        padded = np.zeros((len(rows), width), dtype=np.int64)  # what lies after a document's end is never looked at
        for row, text in enumerate(rows):
            own = self.ledger.tokens[text.start + begin : min(text.start + stop, text.stop + 1)]
            padded[row, : len(own)] = own
        nats, hidden = self._nats(padded, stop - first)
        chunks = [np.arange(text.start + first, min(text.start + stop, text.stop + 1)) for text in rows]
        real = np.concatenate([row * (stop - first) + np.arange(len(some)) for row, some in enumerate(chunks)])
        places = np.full(len(rows) * (stop - first), -1)
        places[real] = np.concatenate(chunks)
        observe(self.session.observer, _AllRows(self.adapters, hidden), torch.arange(len(hidden)), places)
        self.ledger.commit(places[real], nats.double().cpu().numpy()[real])

    def _nats(self, padded: np.ndarray, scored: int) -> tuple[Tensor, Tensor]:
        """(rows · scored,) nats of the last `scored` columns of rows of tokens (rows, width), and hidden states."""
        whole = torch.from_numpy(padded).to(next(self.module.parameters()).device)
        hidden = self.adapters.hidden(whole[:, :-1])[:, -scored:].flatten(0, 1)
        return target_nats(self.adapters, hidden, whole[:, -scored:].flatten()), hidden

    def learn(self, learners: list[Text], chunk: int) -> None:
        """One step on a committed chunk, for documents that go on after it."""
        if not learners:
            return
        begin, first, stop = self.window(chunk)
        rows = np.stack([self.lesson(text, begin, stop) for text in learners])
        trained = self.adapters.trained()
        for tensor in trained.values():
            tensor.requires_grad_(True)
        with torch.enable_grad():
            nats, _ = self._nats(rows, stop - first)
            nats.view(len(learners), -1).mean(dim=1).sum().backward()
        optimizer_step(self.optimizers, trained, self.settings.learning_rate, clip=0.0)
        for tensor in trained.values():
            tensor.requires_grad_(False)
        self.optimizer_steps += 1

    def lesson(self, text: Text, begin: int, stop: int) -> np.ndarray:
        """A document's tokens at offsets [begin, stop), from the ledger; its BOS opened it, and is known from then."""
        own = self.ledger.hand_out(text.start + max(1, begin), text.start + stop)
        return own if begin else np.concatenate([self.ledger.tokens[text.start : text.start + 1].astype(np.int64), own])

    def state(self) -> Mapping[str, Tensor]:
        trained = self.adapters.trained()
        moments = optimizers_state(self.optimizers, trained)
        tuned = self.tuning.state() if self.tuning else {}
        return {
            **{f"adapter.{name}": tensor for name, tensor in trained.items()},
            **{f"optimizer.{key}": tensor for key, tensor in moments.items()},
            **{f"tuned.{key}": tensor for key, tensor in tuned.items()},
            "optimizer_steps": torch.tensor(self.optimizer_steps),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}

        self.adapters.load_state(part("adapter."))
        self.optimizers = make_optimizers(self.adapters.trained(), self.settings)
        load_optimizers_state(self.optimizers, self.adapters.trained(), part("optimizer."))
        if self.tuning:
            self.tuning.load_state(part("tuned."))
        self.optimizer_steps = int(state["optimizer_steps"])

    def facts(self) -> dict[str, Any]:
        """Evidence that it acted."""
        numbers = sum(tensor.numel() for tensor in self.adapters.trained().values()) // self.settings.batch_documents
        learned = self.optimizer_steps
        tuned = {"phases_run": self.tuning.phases_run, "global_steps": self.tuning.steps} if self.tuning else {}
        return {"optimizer_steps": learned, "trained_parameters": numbers, "adapters": len(self.adapters.a), **tuned}


class _AllRows:
    """Distributions of a batch whose logits exist only for all rows together; picked by number."""

    def __init__(self, adapters: Adapters, hidden: Tensor) -> None:
        self.adapters, self.all = adapters, hidden

    def log_probs(self, numbers: Tensor) -> Tensor:
        from pgolf_post.score.nats import distribution

        return distribution(self.adapters, self.all)[numbers]
