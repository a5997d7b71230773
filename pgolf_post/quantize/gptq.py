"""GPTQ: rounding one input column at a time, each column's error fed forward into those not yet rounded.

It minimises Σ_i e_i H e_iᵀ, e = w - ŵ, greedily: with H = F·diag(ℓ²)·Fᵀ (F upper triangular, ones on its diagonal),
column j is rounded after adding Σ_k<j F_kj·e_k, which is how far the errors already made want it moved. The algorithm
is Frantar et al. 2022 (arXiv 2210.17323), there told with the factor of H⁻¹; this form is LDLQ (arXiv 2307.13304), and
both are Babai's nearest-plane rounding in the lattice of H (arXiv 2507.18553).

A 2×2 worked example: w = (0.6, 0.6), H = [[1, .9], [.9, 1]], scale 1. Round to nearest gives (1, 1), with error
e = (-.4, -.4) and cost .16 + .16 + 2·.9·.16 = 0.608. GPTQ rounds 0.6 → 1, then moves the second weight by the error it
made: .6 - .4·.9 = 0.24 → 0, with e = (-.4, .6) and cost .16 + .36 - 2·.9·.24 = 0.088.

Rounding a column is either nearest point by point (a scalar grid) or the cheapest trellis path down its rows; either
way columns are coupled by U alone. So rows (lanes of a trellis) go through in chunks of one fixed shape, each a
(columns, rows) buffer that stays in cache: of corrections due to columns not yet rounded, of errors after. A block of
columns first gets what all earlier errors do to it as one matrix product, then each 32 of it likewise, then column by
column. No result depends on the number of threads, on what else is quantized beside it, or on numba being installed.
(On a GPU the matrix products add in another order; its symbols are as good, and not always the same.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.quantize.compiled import use_compiled
from pgolf_post.quantize.factorize import Factor, FactorCache, factorize, is_finite
from pgolf_post.quantize.trellis import Trellis
from pgolf_post.quantize.viterbi import LARGEST, check_largest, check_range, coset_bounds, predecessors, search
from pgolf_post.workers import map_items

__all__ = ["Factor", "FactorCache", "Job", "factorize", "gptq", "gptq_jobs", "hessian_error"]

CHUNK_ROWS = 256
TRELLIS_ROWS = 512  # of a chunk's lanes together
INNER_COLUMNS = 32


@dataclass(frozen=True)
class Job:
    """One matrix to quantize against one factor."""

    name: str
    weight: Tensor  # (out, in) float32
    factor: Factor
    steps: Tensor  # (out,) per row, or whatever broadcasts to (out, in); of the union grid where there is a trellis
    largest: int | None  # symbols stay within ±largest; None: within what 16 bits hold
    trellis: Trellis | None = None
    rate_pull: Tensor | float = 0.0  # μ ≥ 0, or as steps: round for the least (u - n)² + μ·n²

    def __post_init__(self) -> None:
        """Raises MismatchError for shapes that do not fit, NumericsError for values that cannot be quantized."""
        shape = tuple(self.weight.shape)
        if len(shape) != 2 or shape[1] != len(self.factor.order):
            raise MismatchError(f"{self.name}: a weight of shape {shape} for a Hessian of {len(self.factor.order)}")
        check_largest(self.largest)
        if not is_finite(self.weight):
            self._refuse("weight", self.weight, ~torch.isfinite(self.weight))
        if not is_finite(self.steps) or not (self.steps > 0).all():
            self._refuse("step", self.steps, ~(torch.isfinite(self.steps) & (self.steps > 0)))
        shrink = self.shrink
        if not is_finite(shrink) or not ((shrink > 0) & (shrink <= 1)).all():
            self._refuse("1 / (1 + rate_pull)", shrink, ~((shrink > 0) & (shrink <= 1)))

    def _refuse(self, what: str, values: Tensor, bad: Tensor) -> None:
        place = bad.nonzero()[0].tolist()
        value = float(values[tuple(place)])
        raise NumericsError(f"{self.name}: its {what} at {place} is {value:g}; {int(bad.sum())} such values")

    def spread(self, values: Tensor) -> Tensor:  # (out,), or broadcasts to (out, in) → (1 or out, 1 or in)
        """Values in two dimensions. Raises MismatchError if they do not fit the weight."""
        matrix = values[:, None] if values.dim() == 1 else values
        if matrix.dim() != 2 or any(a not in (1, b) for a, b in zip(matrix.shape, self.weight.shape, strict=True)):
            shapes = f"{tuple(values.shape)} for a weight of {tuple(self.weight.shape)}"
            raise MismatchError(f"{self.name}: steps or rate_pull of shape {shapes}")
        return matrix

    @property
    def shrink(self) -> Tensor:  # as spread
        """1 / (1 + μ): what a target is multiplied by before it is rounded."""
        pull = self.rate_pull
        return 1 / (1 + self.spread(pull if isinstance(pull, Tensor) else torch.full((1, 1), float(pull))))


def gptq(
    weight: Tensor,  # (out, in) float32
    factor: Factor,
    steps: Tensor,  # (out,), or whatever broadcasts to (out, in)
    largest: int | None,
    block_size: int = 128,
    *,
    trellis: Trellis | None = None,
    rate_pull: Tensor | float = 0.0,
    name: str = "weight",
    compiled: bool | None = None,
) -> Tensor:  # (out, in) int8, or int16 if largest is None or above 127
    """The symbols of `weight`. Inputs are left untouched; see Job for the arguments and errors."""
    job = Job(name, weight, factor, steps, largest, trellis, rate_pull)
    return gptq_jobs([job], block_size, compiled=compiled)[0]


def gptq_jobs(
    jobs: Sequence[Job],
    block_size: int = 128,
    *,
    compiled: bool | None = None,  # None: where numba is installed and the weight is on the CPU
    advance: Callable[[int], object] = lambda weights: None,
) -> list[Tensor]:  # as gptq
    """The symbols of many matrices, their chunks side by side on torch's threads. Calls advance(weights done)."""
    symbols = [torch.empty(job.weight.shape, dtype=torch.int16, device=job.weight.device) for job in jobs]
    fast = [use_compiled(compiled, job.weight) for job in jobs]
    panels = [(index, panel) for index, job in enumerate(jobs) for panel in _panels(job, fast[index])]
    panels.sort(key=lambda item: -jobs[item[0]].weight.size(1))  # long ones first: none is left alone at the end

    def run(item: tuple[int, _Panel]) -> int:
        index, panel = item
        _quantize(jobs[index], panel, block_size, fast[index], symbols[index])
        return panel.rows * jobs[index].weight.size(1)

    for weights in map_items(run, panels):
        advance(weights)
    for job, found in zip(jobs, symbols, strict=True):
        check_range(job.name, found, job.largest)
    return [
        found.to(torch.int8) if job.largest is not None and job.largest < 128 else found
        for job, found in zip(jobs, symbols, strict=True)
    ]


@dataclass(frozen=True)
class _Panel:
    """Consecutive rows of a matrix: `chunks` of equal shape, each of `lanes` lanes of `lane_rows` rows."""

    start: int
    chunks: int
    lanes: int
    lane_rows: int

    @property
    def rows(self) -> int:
        return self.chunks * self.lanes * self.lane_rows

    @property
    def width(self) -> int:
        """Of a chunk's buffer: padded with empty rows, so that one shape of matrix product serves all."""
        return -(-self.lanes * self.lane_rows // CHUNK_ROWS) * CHUNK_ROWS

    def load(self, matrix: Tensor, order: Tensor, pad: float) -> Tensor:  # (out, in) → (in, chunks, width)
        """These rows transposed, columns in `order`; within a chunk, the lanes' first rows come first."""
        rows = torch.full((self.chunks, self.width, matrix.size(1)), pad, device=matrix.device)
        self._interleaved(rows).copy_(self._lanes(matrix))
        return rows.flatten(0, 1).T.contiguous()[order].view(-1, self.chunks, self.width)

    def load_broadcast(self, job: Job, values: Tensor, order: Tensor) -> Tensor:  # → (1 or in, chunks, width)
        """The same of values that broadcast to a job's weight, once where all columns share them."""
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


def _panels(job: Job, single: bool) -> Iterator[_Panel]:
    """Cut a matrix into chunks, one to a panel if `single`, else equal ones shared out over the threads.

    A short last lane and an incomplete last chunk are panels of their own.
    """
    rows = len(job.weight)
    lane_rows = max(1, min(job.trellis.lane_rows, rows)) if job.trellis else 1
    most = max(1, TRELLIS_ROWS // lane_rows) if job.trellis else CHUNK_ROWS
    full_lanes = rows // lane_rows
    chunks, left = divmod(full_lanes, most)
    share = 1 if single else max(1, -(-chunks // torch.get_num_threads()))
    for chunk in range(0, chunks, share):
        yield _Panel(chunk * most * lane_rows, min(share, chunks - chunk), most, lane_rows)
    if left:
        yield _Panel(chunks * most * lane_rows, 1, left, lane_rows)
    if full_lanes * lane_rows < rows:
        yield _Panel(full_lanes * lane_rows, 1, 1, rows - full_lanes * lane_rows)


@dataclass(frozen=True)
class _Buffers:
    """What a panel's rounding works on, each (in, chunks, width)."""

    weights: Tensor  # float32
    steps: Tensor  # float32, (1, …) where all columns share them
    shrink: Tensor  # likewise
    errors: Tensor  # float32: corrections until a column is rounded, then its error
    symbols: Tensor  # int16


def _quantize(job: Job, panel: _Panel, block_size: int, fast: bool, symbols: Tensor) -> None:
    """Quantize a panel's rows into `symbols` (out, in)."""
    feedback, order = (tensor.to(job.weight.device) for tensor in (job.factor.feedback, job.factor.order))
    weights = panel.load(job.weight.detach(), order, 0.0)
    steps, shrink = (panel.load_broadcast(job, values, order) for values in (job.spread(job.steps), job.shrink))
    buffers = _Buffers(weights, steps, shrink, torch.zeros_like(weights), torch.zeros_like(weights, dtype=torch.int16))
    round_columns = (_compiled_rounding if fast else _torch_rounding)(job, panel, buffers, feedback)
    for outer in range(0, len(weights), block_size):
        end = min(outer + block_size, len(weights))
        _feed_forward(buffers.errors, feedback, 0, outer, end)
        for start in range(outer, end, INNER_COLUMNS):
            stop = min(start + INNER_COLUMNS, end)
            _feed_forward(buffers.errors, feedback, outer, start, stop)
            round_columns(start, stop)
    panel.store(buffers.symbols, order, symbols)


def _feed_forward(errors: Tensor, feedback: Tensor, first: int, start: int, stop: int) -> None:
    """Add to the corrections of columns start .. stop-1 what the errors of columns first .. start-1 ask for."""
    if first == start:
        return
    along = feedback[first:start, start:stop].T
    for chunk in range(errors.size(1)):
        errors[start:stop, chunk].addmm_(along, errors[first:start, chunk])


Rounding = Callable[[int, int], None]  # round columns start .. stop-1, corrected for all columns before start


def _compiled_rounding(job: Job, panel: _Panel, buffers: _Buffers, feedback: Tensor) -> Rounding:
    """The kernels' rule; a compiled panel is one chunk."""
    from pgolf_post.quantize import kernels

    tensors = (buffers.weights, buffers.steps, buffers.shrink, buffers.errors, buffers.symbols)
    arrays = (*(tensor[:, 0].numpy() for tensor in tensors), feedback.numpy())
    largest = LARGEST if job.largest is None else job.largest
    if job.trellis is None:
        return lambda start, stop: kernels.round_scalar(*arrays, np.float32(largest), start, stop)
    path = (predecessors(job.trellis.states), coset_bounds(largest), panel.lane_rows, panel.lanes)
    return lambda start, stop: kernels.round_trellis(*arrays, *path, start, stop)


def _torch_rounding(job: Job, panel: _Panel, buffers: _Buffers, feedback: Tensor) -> Rounding:
    """The same in torch, operation by operation."""
    steps, shrink, errors = buffers.steps, buffers.shrink, buffers.errors
    largest = LARGEST if job.largest is None else job.largest
    bounds = torch.from_numpy(coset_bounds(largest)).to(errors.device)
    used = panel.lanes * panel.lane_rows

    def nearest(targets: Tensor) -> tuple[Tensor, Tensor]:  # (chunks, width) → grid points, symbols
        if job.trellis is None:
            symbols = torch.clamp(torch.round(targets), -largest, largest)
            return symbols, symbols
        lanes = targets[:, :used].reshape(panel.chunks, panel.lane_rows, panel.lanes).transpose(0, 1)
        paths = search(lanes.reshape(panel.lane_rows, -1), job.trellis.states, bounds)
        points, symbols = torch.zeros_like(targets), torch.zeros_like(targets)
        for path, out in zip(paths, (points, symbols), strict=True):
            out[:, :used] = path.view(lanes.shape).transpose(0, 1).reshape(panel.chunks, used)
        return points, symbols

    def run(start: int, stop: int) -> None:
        for j in range(start, stop):
            step, factor = steps[j if len(steps) > 1 else 0], shrink[j if len(shrink) > 1 else 0]
            points, symbols = nearest((buffers.weights[j] + errors[j]) / step * factor)
            buffers.symbols[j] = symbols.to(torch.int16)
            errors[j] = buffers.weights[j] - points * step
            errors[j + 1 : stop] += feedback[j, j + 1 : stop, None, None] * errors[j]

    return run


def hessian_error(
    weight: Tensor,  # (out, in)
    restored: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in), in the precision that is wanted
) -> float:
    """Σ e H eᵀ / Σ w H wᵀ: the share of the layer's output energy that quantization changed."""
    error, original = (weight - restored).to(hessian), weight.to(hessian)
    energy = float(((original @ hessian) * original).sum(dtype=torch.float64))
    return float(((error @ hessian) * error).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
