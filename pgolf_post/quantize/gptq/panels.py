"""Panels, into which a matrix is cut for rounding: chunks of one shape, (columns, rows), small enough to stay in cache.

Rows (or lanes of a trellis) do not depend on each other, unless they are coupled; then the matrix stays in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf_post.quantize.gptq.job import Job

CHUNK_ROWS = 256
TRELLIS_ROWS = 512  # of a chunk's lanes together


@dataclass(frozen=True)
class Panel:
    """Consecutive rows of a matrix: `chunks` of equal shape, each of `lanes` lanes of `lane_rows` rows."""

    start: int
    chunks: int
    lanes: int
    lane_rows: int

    @property
    def rows(self) -> int:
        """Rows of the matrix, padding not counted."""
        return self.chunks * self.lanes * self.lane_rows

    @property
    def width(self) -> int:
        """Rows of a chunk's buffer, padded with empty ones, so that one shape of matrix product serves all."""
        return -(-self.lanes * self.lane_rows // CHUNK_ROWS) * CHUNK_ROWS

    def load(self, matrix: Tensor, order: Tensor, pad: float) -> Tensor:  # (out, in) → (in, chunks, width)
        """Return these rows transposed, columns in `order`; within a chunk, the lanes' first rows come first."""
        rows = torch.full((self.chunks, self.width, matrix.size(1)), pad, device=matrix.device)
        self._interleaved(rows).copy_(self._lanes(matrix))
        return rows.flatten(0, 1).T.contiguous()[order].view(-1, self.chunks, self.width)

    def load_broadcast(self, job: Job, values: Tensor, order: Tensor) -> Tensor:  # → (1 or in, chunks, width)
        """Like load(), for values that broadcast to a job's weight; one column suffices if all columns share them."""
        order = order if values.size(1) > 1 else torch.zeros_like(order[:1])
        return self.load(values.expand(len(job.weight), -1), order, 1.0)

    def store(self, columns: Tensor, order: Tensor, matrix: Tensor) -> None:  # (in, chunks, width) → (out, in)
        """Put columns where `load` would read them from."""
        natural = columns[torch.argsort(order)]
        rows = natural.flatten(1).T.contiguous().view(self.chunks, self.width, len(order))
        self._lanes(matrix).copy_(self._interleaved(rows))

    def _lanes(self, matrix: Tensor) -> Tensor:  # (out, in) → (chunks, lane_rows, lanes, in), a view
        rows = matrix[self.start : self.start + self.rows]
        return rows.view(self.chunks, self.lanes, self.lane_rows, -1).transpose(1, 2)

    def _interleaved(self, rows: Tensor) -> Tensor:  # (chunks, width, in) → (chunks, lane_rows, lanes, in), a view
        return rows[:, : self.lanes * self.lane_rows].unflatten(1, (self.lane_rows, self.lanes))


def panels_of(job: Job, single: bool) -> Iterator[Panel]:
    """Cut a matrix into chunks, one to a panel if `single`, else equal ones shared out over the threads.

    A short last lane and an incomplete last chunk are panels of their own.
    """
    rows = len(job.weight)
    if job.row_feedback is not None or job.along_diagonals:  # in one piece and in order
        if rows:
            yield Panel(0, 1, 1, rows)
        return
    lane_rows = max(1, min(job.trellis.lane_rows, rows)) if job.trellis else 1
    most = max(1, TRELLIS_ROWS // lane_rows) if job.trellis else CHUNK_ROWS
    full_lanes = rows // lane_rows
    chunks, left = divmod(full_lanes, most)
    share = 1 if single else max(1, -(-chunks // torch.get_num_threads()))
    for chunk in range(0, chunks, share):
        yield Panel(chunk * most * lane_rows, min(share, chunks - chunk), most, lane_rows)
    if left:
        yield Panel(chunks * most * lane_rows, 1, left, lane_rows)
    if full_lanes * lane_rows < rows:
        yield Panel(full_lanes * lane_rows, 1, 1, rows - full_lanes * lane_rows)


class Columns(NamedTuple):
    """One chunk's columns as the compiled kernels take them."""

    weights: np.ndarray  # (in, width) float32
    steps: np.ndarray  # (in, width) float32; (1, width) where all columns share them
    errors: np.ndarray  # (in, width) float32: corrections until a column is rounded, then its error
    symbols: np.ndarray  # (in, width) int16
    feedback: np.ndarray  # (in, in) float32 F


@dataclass(frozen=True)
class Buffers:
    """Arrays that a panel's rounding reads and writes, each (in, chunks, width)."""

    weights: Tensor  # float32
    steps: Tensor  # float32, (1, …) where all columns share them
    errors: Tensor  # float32: corrections until a column is rounded, then its error
    symbols: Tensor  # int16

    def columns(self, feedback: Tensor) -> Columns:
        """Return views of a panel that is one chunk."""
        tensors = (self.weights, self.steps, self.errors, self.symbols)
        weights, steps, errors, symbols = (tensor[:, 0].numpy() for tensor in tensors)
        return Columns(weights, steps, errors, symbols, feedback.numpy())
