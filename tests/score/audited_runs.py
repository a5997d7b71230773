"""Protocols of kinds that are not ours, honest ones and others, each as a run that an audit takes.

An audit runs a protocol a hundred times and reads no model, so these share one that is a table: a causal one, exact to
the bit, of a thousandth of a pico model's price.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.data import BOS_ID
from pgolf_post.score.audit.causality import Run
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer

WINDOW, VOCAB = 32, 64
Rows = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]  # log p (k, vocab), tokens, targets (k,) → log p (k, vocab)


def parts_by_document(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Targets [first, stop) of each document: what follows its BOS, and the next one's BOS."""
    edges = [*np.flatnonzero(tokens == BOS_ID).tolist(), len(tokens) - 1]
    return [(a + 1, b + 1) for a, b in pairwise(edges) if b > a]


def parts_by_window(tokens: np.ndarray) -> list[tuple[int, int]]:
    return [(a, min(a + WINDOW, len(tokens))) for a in range(1, len(tokens), WINDOW)]


TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
DECAY = torch.tensor([[0.6 ** (j - i) if i <= j else 0.0 for i in range(128)] for j in range(128)])


def text() -> np.ndarray:  # (500,)
    """Documents of 17 to 90 tokens, some tokens frequent and others rare."""
    random = np.random.default_rng(1)
    lengths = [17 + 11 * i % 74 for i in range(20)]
    documents = [np.array([BOS_ID, *(2 + random.zipf(1.3, size) % (VOCAB - 2))]) for size in lengths]
    return np.concatenate(documents)[:500]


def raw_logits(tokens: np.ndarray, first: int, stop: int) -> Tensor:  # (stop - first, vocab)
    """Each token's row of a table, and those before it in the window, less and less."""
    rows = TABLE[torch.from_numpy(tokens[first - 1 : stop - 1].astype(np.int64))]
    return DECAY[: len(rows), : len(rows)] @ rows


def show_and_commit(log: CommitLog, observer: Observer | None, places: np.ndarray, rows: Tensor) -> None:
    if observer is not None:
        observer.see(places, rows)
    targets = torch.from_numpy(log.tokens[places].astype(np.int64))
    log.commit(places, -rows.gather(-1, targets[:, None])[:, 0].double().numpy())


# ---- honest ----------------------------------------------------------------------------------------------------------


def with_temperature(parts: Callable[[np.ndarray], list[tuple[int, int]]], order: str, handed_out: bool = True) -> Run:
    """Parts in some order, each at a temperature that follows the loss of those scored before it."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log, temperature = CommitLog(tokens, len(tokens) - 1), 1.0
        spans = parts(tokens)
        turns = {"first to last": range(len(spans)), "last to first": range(len(spans) - 1, -1, -1)}
        shuffled = np.random.default_rng(5).permutation(len(spans)).tolist()
        for number in turns.get(order, shuffled):
            first, stop = spans[number]
            logits = raw_logits(tokens, first, stop)
            show_and_commit(log, observer, np.arange(first, stop), F.log_softmax(logits / temperature, dim=-1))
            targets = log.hand_out(first, stop) if handed_out else tokens[first:stop].astype(np.int64)
            loss = float(F.cross_entropy(logits / temperature, torch.from_numpy(targets)))
            temperature = 1 + 0.1 * np.tanh(loss - 4)  # every token scored so far counts
        return log

    return run


def with_counts() -> Run:
    """Windows mixed with the frequencies of the tokens scored so far."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log, counts = CommitLog(tokens, len(tokens) - 1), np.ones(VOCAB)
        for first, stop in parts_by_window(tokens):
            rows = F.log_softmax(raw_logits(tokens, first, stop), dim=-1)
            prior = torch.from_numpy(np.log(counts / counts.sum())).float()
            mixed = torch.logaddexp(rows + np.log(0.8), prior + np.log(0.2))
            show_and_commit(log, observer, np.arange(first, stop), mixed)
            np.add.at(counts, log.hand_out(first, stop), 1)
        return log

    return run


def in_windows(order: str) -> Run:
    """Windows in some order, nothing learned: each begins with the token before it, which may be scored later."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log, spans = CommitLog(tokens, len(tokens) - 1), parts_by_window(tokens)
        for first, stop in spans if order == "first to last" else reversed(spans):
            rows = F.log_softmax(raw_logits(tokens, first, stop), dim=-1)
            show_and_commit(log, observer, np.arange(first, stop), rows)
        return log

    return run


# ---- not honest ------------------------------------------------------------------------------------------------------


def changed_rows(change: Rows, shown: bool = True) -> Run:
    """Windows whose distributions are changed with the targets in sight; without `shown`, only the scores are."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log = CommitLog(tokens, len(tokens) - 1)
        for first, stop in parts_by_window(tokens):
            places = np.arange(first, stop)
            rows = F.log_softmax(raw_logits(tokens, first, stop), dim=-1)
            changed = change(rows, tokens, places)
            if observer is not None and not shown:
                observer.see(places, rows)
            show_and_commit(log, observer if shown else None, places, changed)
        return log

    return run


def boosted(chosen: Callable[[np.ndarray, np.ndarray], np.ndarray], by: float = 2.0, normalised: bool = True) -> Rows:
    """The target's log-probability raised where `chosen(tokens, places)`."""

    def change(rows: Tensor, tokens: np.ndarray, places: np.ndarray) -> Tensor:
        at = torch.from_numpy(np.flatnonzero(chosen(tokens, places)))
        targets = torch.from_numpy(tokens[places].astype(np.int64))
        rows = rows.clone()
        rows[at, targets[at]] += by
        return F.log_softmax(rows, dim=-1) if normalised else rows

    return change


def one_in(count: int, seed: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda tokens, places: (places + seed) % count == 0


def after_bos(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    return tokens[places - 1] == BOS_ID


def before_bos(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    return tokens[places] == BOS_ID


def scaled(chosen: Callable[[np.ndarray, np.ndarray], np.ndarray], total: float) -> Rows:
    """Σp = total where `chosen`."""

    def change(rows: Tensor, tokens: np.ndarray, places: np.ndarray) -> Tensor:
        return rows + torch.from_numpy(np.where(chosen(tokens, places), np.log(total), 0.0))[:, None].float()

    return change


def sharpened_when_right(count: int, seed: int) -> Rows:
    """Sharper where the target is likely anyway, on one target in `count`: nothing is added to it by name."""

    def change(rows: Tensor, tokens: np.ndarray, places: np.ndarray) -> Tensor:
        targets = torch.from_numpy(tokens[places].astype(np.int64))
        likely = rows.gather(-1, targets[:, None])[:, 0] > rows.median(dim=-1).values
        chosen = likely & torch.from_numpy((places + seed) % count == 0)
        return F.log_softmax(rows * torch.where(chosen, 1.5, 1.0)[:, None], dim=-1)

    return change


def ahead_by(distance: int, count: int, seed: int) -> Rows:
    """A distribution that leans to a token `distance` places ahead of its target, one in `count`."""

    def change(rows: Tensor, tokens: np.ndarray, places: np.ndarray) -> Tensor:
        at = np.flatnonzero((places + seed) % count == 0)
        at = at[places[at] + distance < len(tokens)]
        rows = rows.clone()
        rows[torch.from_numpy(at), torch.from_numpy(tokens[places[at] + distance].astype(np.int64))] += 2.0
        return F.log_softmax(rows, dim=-1)

    return change


def rescored(honest: Run) -> Run:
    """Scores overwritten after the fact, behind the log's back."""

    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log: CommitLog = honest(tokens, observer)
        log.nats[100:105] *= 0.5
        return log

    return run


def committed_twice(place: int) -> Run:
    def run(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log = CommitLog(tokens, len(tokens) - 1)
        for first, stop in parts_by_window(tokens):
            rows = F.log_softmax(raw_logits(tokens, first, stop), dim=-1)
            show_and_commit(log, observer, np.arange(first, stop), rows)
            if first <= place < stop:
                log.commit(np.array([place]), np.zeros(1))
        return log

    return run
