"""One low-rank adapter per document, many documents at once: score a chunk, commit it, step, go on.

Documents are sorted by length, longest first, and taken in batches whose rows advance together, chunk by chunk, each
chunk read in a window that ends with it. Every row has adapters of its own, so documents in a batch do not know of each
other; between batches B returns to zero. The step after a chunk is on its mean nats, document by document; a document's
last chunk is scored and not trained on. A document's targets are the tokens after its BOS and the BOS of the next.

One forward serves score and step, as in the public scripts: a chunk's nats are computed from its hidden states without
gradients, and committed; then the ledger hands out the same targets, and what the graph holds becomes gradients.

A is carried from batch to batch along a lane, one of a fixed number of queues: the published run had one per GPU. A
batch goes to the lane with the least to do, ranks share the lanes: so the result does not depend on their number.
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

from pgolf_post.base.progress import say
from pgolf_post.data.tokenizer import BOS_ID
from pgolf_post.errors import MismatchError, PgolfError
from pgolf_post.families import ModelFamily
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import observe, target_nats
from pgolf_post.score.session import Session
from pgolf_post.score.spans import is_out_of_memory
from pgolf_post.score.ttt.adapters import Adapters
from pgolf_post.score.ttt.optimizers import (
    Optimizers,
    load_optimizers_state,
    make_optimizers,
    optimizer_step,
    optimizers_state,
)
from pgolf_post.score.ttt.phased import GlobalTuning, tuned_after
from pgolf_post.score.ttt.settings import TTTProtocol

LEARNING_COSTS = 1.5  # a backward, in forwards
TUNE = -1  # in the place of a chunk: all ranks tune the weights


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


def deal(costs: list[float], lanes: int, together: list[int]) -> list[int]:  # one per batch
    """The lane of each batch: the first that has least to do. All wait for each other after batches `together`."""
    load, found = [0.0] * lanes, []
    for number, cost in enumerate(costs):
        found.append(load.index(min(load)))
        load[found[-1]] += cost
        if number in together:
            load = [max(load)] * lanes
    return found


class LoraPass:
    """Methods `lora` and `phased`: each step scores one chunk of every document of a batch that has it."""

    def __init__(
        self, module: Any, family: ModelFamily, ledger: CommitLog, settings: TTTProtocol, session: Session
    ) -> None:
        self.module, self.ledger, self.settings, self.session = module, ledger, settings, session
        self.batches = batch_texts(find_texts(ledger.tokens, ledger.num_targets), settings.batch_documents)
        self._plan()
        module.requires_grad_(False)
        self.adapters = Adapters(module, family, settings)
        self.adapters.require_zero_is_plain()
        self.unused: dict[str, Tensor] = self.adapters.a  # the first lane's A
        phased = settings.method == "phased"
        self.tuning = GlobalTuning(module, ledger, settings, session.ranks) if phased else None
        self.carried: dict[int, dict[str, Tensor]] = {}  # lane → A, where the lane has begun and goes on
        self.optimizers: Optimizers = {}
        self.optimizer_steps = 0
        self._warn()

    def _plan(self) -> None:
        """The steps of this rank, (batch, chunk) in the order of batches, and what each costs."""
        ranks, tuned = self.session.ranks, tuned_after(self.batches, self.settings)
        chunks = [range(self.num_chunks(batch[0])) for batch in self.batches]
        costs = [sum(self._cost(b, k) for k in chunks[b]) for b in range(len(self.batches))]
        self.lanes = deal(costs, self.settings.lanes, tuned)
        self.plan: list[tuple[int, int]] = []
        for b, lane in enumerate(self.lanes):
            if lane % ranks.world_size == ranks.rank:
                self.plan += [(b, k) for k in chunks[b]]
            if b in tuned:
                self.plan.append((b, TUNE))
        self.costs = np.array([0.0 if k == TUNE else self._cost(b, k) for b, k in self.plan])

    def _warn(self) -> None:
        """Say what a user would not expect."""
        settings, ranks = self.settings, self.session.ranks
        number = sum(map(len, self.batches))
        if self.tuning and number < settings.phases[0] and not self.session.quiet:
            say(f"warning: no phase will run: the text has {number} documents, the first is at {settings.phases[0]}")
        if ranks.world_size > settings.lanes:
            say(f"warning: {settings.lanes} lanes keep no more of {ranks.world_size} ranks busy: --set lanes=…")

    def num_chunks(self, text: Text) -> int:
        return -(-text.targets // self.settings.chunk_tokens)

    def _cost(self, batch: int, chunk: int) -> float:
        rows = sum(self.num_chunks(text) > chunk for text in self.batches[batch])
        learners = sum(self.num_chunks(text) > chunk + 1 for text in self.batches[batch])
        window = min(self.settings.seq_len, (chunk + 1) * self.settings.chunk_tokens)
        return float((rows + LEARNING_COSTS * learners) * window)

    def step(self, index: int) -> None:
        number, chunk = self.plan[index]
        if chunk == TUNE:
            assert self.tuning is not None
            with self.session.clock.phase("adapt"):
                self.tuning.run([text for some in self.batches[: number + 1] for text in some])
            return
        if chunk == 0:
            self.begin(number)
        batch = self.batches[number]
        learners = [text for text in batch if self.num_chunks(text) > chunk + 1]  # longest first: the batch's first
        ending = [text for text in batch if self.num_chunks(text) == chunk + 1]
        try:
            with self.adapters.attached():
                if ending:
                    self.score(ending, chunk, len(learners))
                if learners:
                    self.score_and_learn(learners, chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise PgolfError(
                f"out of memory with {len(learners) + len(ending)} documents at once",
                hint=f"--set batch_documents={max(1, self.settings.batch_documents // 2)}, or a smaller rank",
            ) from None

    def begin(self, number: int) -> None:
        """A new batch: the lane's A, B = 0, optimizers without a past."""
        lane = self.lanes[number]
        carried = self.carried.pop(lane, {}) or self.unused or self.adapters.drawn()
        self.unused = {}
        self.adapters.begin(carried, len(self.batches[number]))
        if lane in self.lanes[number + 1 :]:
            self.carried[lane] = self.adapters.a  # is learned in place: the lane's next batch begins with it
        self.optimizers = make_optimizers(self.adapters.trained(), self.settings)

    def window(self, chunk: int) -> tuple[int, int, int]:
        """Of a chunk: where its window begins, its first and one past its last target; offsets in the document."""
        first = chunk * self.settings.chunk_tokens + 1
        stop = first + self.settings.chunk_tokens
        return max(0, stop - 1 - self.settings.seq_len), first, stop

    def score(self, texts: list[Text], chunk: int, first_row: int) -> None:
        """Commit the nats of the last chunk of documents, whose adapters are the batch's from `first_row` on."""
        with self.session.clock.phase("score"), torch.no_grad():
            tokens = self.tokens(texts, chunk)
            self.commit(texts, chunk, tokens, self.hidden(tokens, chunk, first_row))

    def score_and_learn(self, texts: list[Text], chunk: int) -> None:
        """Commit a chunk's nats of documents that go on after it, then take one step on it: on one forward."""
        trained = self.adapters.trained()
        with self.session.clock.phase("score"):
            tokens = self.tokens(texts, chunk)
            for tensor in trained.values():
                tensor.requires_grad_(True)
            with torch.enable_grad():
                hidden = self.hidden(tokens, chunk, 0)
            self.commit(texts, chunk, tokens, hidden.detach())
        with self.session.clock.phase("adapt"):
            begin, first, stop = self.window(chunk)
            targets = np.stack([self.lesson(text, begin, stop) for text in texts])[:, first - stop :]
            with torch.enable_grad():
                nats = target_nats(self.adapters, hidden, torch.from_numpy(targets).to(hidden.device).flatten())
                nats.view(len(texts), -1).mean(dim=1).sum().backward()
            optimizer_step(self.optimizers, trained, self.settings.learning_rate, clip=0.0)
            for tensor in trained.values():
                tensor.requires_grad_(False)
            self.optimizer_steps += 1

    def tokens(self, texts: list[Text], chunk: int) -> Tensor:  # (rows, width) int64
        """A chunk's window of each document and the token after it; what lies after a document's end is never read."""
        begin, _, stop = self.window(chunk)
        padded = np.zeros((len(texts), stop - begin), dtype=np.int64)
        for row, text in enumerate(texts):
            own = self.ledger.tokens[text.start + begin : min(text.start + stop, text.stop + 1)]
            padded[row, : len(own)] = own
        return torch.from_numpy(padded).to(next(self.module.parameters()).device)

    def hidden(self, tokens: Tensor, chunk: int, first_row: int) -> Tensor:  # → (rows · chunk's targets, dim)
        _, first, stop = self.window(chunk)
        return self.adapters.hidden(tokens[:, :-1], first_row)[:, first - stop :].flatten(0, 1)

    @torch.no_grad()
    def commit(self, texts: list[Text], chunk: int, tokens: Tensor, hidden: Tensor) -> None:
        """Enter the nats of a chunk of documents."""
        _, first, stop = self.window(chunk)
        nats = target_nats(self.adapters, hidden, tokens[:, first - stop :].flatten())
        chunks = [np.arange(text.start + first, min(text.start + stop, text.stop + 1)) for text in texts]
        real = np.concatenate([row * (stop - first) + np.arange(len(some)) for row, some in enumerate(chunks)])
        places = np.full(len(texts) * (stop - first), -1)
        places[real] = np.concatenate(chunks)
        observe(self.session.observer, _AllRows(self.adapters, hidden), torch.arange(len(hidden)), places)
        self.ledger.commit(places[real], nats.double().cpu().numpy()[real])

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
            **{f"lane.{lane}.{key}": x for lane, a in self.carried.items() for key, x in a.items()},
            **{f"optimizer.{key}": tensor for key, tensor in moments.items()},
            **{f"tuned.{key}": tensor for key, tensor in tuned.items()},
            "optimizer_steps": torch.tensor(self.optimizer_steps),
            "lane_in_use": torch.tensor(next((n for n, a in self.carried.items() if a is self.adapters.a), -1)),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}

        self.adapters.load_state(part("adapter."))
        device = next(self.module.parameters()).device
        for lane in {int(key.partition(".")[0]) for key in part("lane.")}:
            self.carried[lane] = {key: x.to(device) for key, x in part(f"lane.{lane}.").items()}
        if (lane := int(state["lane_in_use"])) >= 0:
            self.carried[lane] = self.adapters.a
        self.optimizers = make_optimizers(self.adapters.trained(), self.settings)
        load_optimizers_state(self.optimizers, self.adapters.trained(), part("optimizer."))
        if self.tuning:
            self.tuning.load_state(part("tuned."))
        self.optimizer_steps = int(state["optimizer_steps"])

    def facts(self) -> dict[str, Any]:
        """Evidence that it acted, on all ranks together."""
        steps = torch.tensor([self.optimizer_steps], device=self.session.ranks.device)
        self.session.ranks.sum_(steps)
        adapted = {"trained_parameters": self.adapters.numbers, "adapters": len(self.adapters.a)}
        tuned = {"phases_run": self.tuning.phases_run, "global_steps": self.tuning.steps} if self.tuning else {}
        return {"optimizer_steps": int(steps), **adapted, **tuned}


class _AllRows:
    """Distributions of a batch whose logits exist only for all rows together; picked by number."""

    def __init__(self, adapters: Adapters, hidden: Tensor) -> None:
        self.adapters, self.all = adapters, hidden

    def log_probs(self, numbers: Tensor) -> Tensor:
        from pgolf_post.score.nats import distribution

        return distribution(self.adapters, self.all)[numbers]
