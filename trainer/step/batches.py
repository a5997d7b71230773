"""Tokens of a step: a pure function of the seed and the step, so that a resumed run sees what it would have seen.

The training split is cut into non-overlapping windows of seq_len tokens (each with its next token), and every epoch
visits all of them in an order drawn from (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.copying import page_locked
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError


class Sampler(Protocol):
    """Whatever yields the micro-batches of a step."""

    def step_batches(
        self, step: int, windows_per_step: int, windows_per_batch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs and targets of each."""


Batches = list[tuple[Tensor, Tensor]]  # inputs and targets of every micro-batch of a step, each (windows, seq_len)


class WindowSampler:
    """The windows of a data folder's training split, in the order that a seed draws."""

    def __init__(self, data: DataFolder, seq_len: int, seed: int) -> None:
        self.seq_len, self.seed = seq_len, seed
        self.shards = [shard for _, shard in data.shards("train")]
        counts = [max(0, (len(shard) - 1) // seq_len) for shard in self.shards]
        self.first_window = np.concatenate([[0], np.cumsum(counts)])
        if self.num_windows == 0:
            raise MismatchError(f"{data.path}: no training shard holds a window of {seq_len} + 1 tokens")
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    @property
    def num_windows(self) -> int:
        return int(self.first_window[-1])

    def _window_at(self, position: int) -> int:
        """Return the index of the window that the run visits after `position` others."""
        epoch, index = divmod(position, self.num_windows)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=(self.seed, epoch)))
            self._epoch, self._order = epoch, generator.permutation(self.num_windows)
        return int(self._order[index])

    def _tokens(self, window: int) -> np.ndarray:  # (seq_len + 1,) int64
        shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
        offset = (window - int(self.first_window[shard])) * self.seq_len
        return self.shards[shard][offset : offset + self.seq_len + 1].astype(np.int64)

    def window(self, position: int) -> np.ndarray:  # (seq_len + 1,) int64
        """Return the window that the run visits after `position` others."""
        return self._tokens(self._window_at(position))

    def step_batches(
        self,
        step: int,
        windows_per_step: int,
        windows_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # (inputs, targets), each (windows_per_batch, seq_len) int64
        """Yield this rank's micro-batches of step `step` (counted from 0): every world_size-th, from `rank` on."""
        for start in range(rank * windows_per_batch, windows_per_step, world_size * windows_per_batch):
            positions = range(step * windows_per_step + start, step * windows_per_step + start + windows_per_batch)
            windows = torch.from_numpy(np.stack([self.window(p) for p in positions]))
            yield windows[:, :-1], windows[:, 1:]


class AheadSampler:
    """A sampler whose next step is drawn by a thread, into page-locked memory, while a GPU computes this one."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self._thread = ThreadPoolExecutor(1, "batches")  # starts with the first draw
        self._coming: tuple[tuple[int, ...], Future[Batches]] | None = None

    def step_batches(self, step: int, *shape: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return what `WindowSampler.step_batches` yields, and begin to draw the step after it."""
        coming, asked = self._coming, (step, *shape)
        batches = coming[1].result() if coming else []  # the thread alone draws, and nothing else while it does
        if coming is None or coming[0] != asked:
            batches = self._thread.submit(self._draw, *asked).result()
        following = (step + 1, *shape)
        self._coming = following, self._thread.submit(self._draw, *following)
        return iter(batches)

    def _draw(self, step: int, *shape: int) -> Batches:
        pairs = self.sampler.step_batches(step, *shape)
        return [(page_locked(inputs), page_locked(targets)) for inputs, targets in pairs]
