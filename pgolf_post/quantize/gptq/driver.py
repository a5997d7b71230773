"""GPTQ: rounding one input column at a time, each column's error fed forward into those not yet rounded.

It minimises Σ_i e_i H e_iᵀ, e = w - ŵ, greedily: with H = F·diag(ℓ²)·Fᵀ (F upper triangular, ones on its diagonal),
column j is rounded after adding Σ_k<j F_kj·e_k, which is how far the errors already made want it moved. The algorithm
is Frantar et al. 2022 (arXiv 2210.17323), there told with the factor of H⁻¹; this form is LDLQ (arXiv 2307.13304), and
both are Babai's nearest-plane rounding in the lattice of H (arXiv 2507.18553).

A 2×2 worked example: w = (0.6, 0.6), H = [[1, .9], [.9, 1]], step 1. Round to nearest gives (1, 1), with error
e = (-.4, -.4) and cost .16 + .16 + 2·.9·.16 = 0.608. GPTQ rounds 0.6 → 1, then moves the second weight by the error it
made: .6 - .4·.9 = 0.24 → 0, with e = (-.4, .6) and cost .16 + .36 - 2·.9·.24 = 0.088.

Rounding a column is either nearest point by point (a scalar grid) or the cheapest trellis path down its rows; either
way columns are coupled by F alone, and rows by nothing unless feedback comes from both sides (coupled.py). So rows go
through in chunks (panels.py), each a (columns, rows) buffer: of corrections due to columns not yet rounded, of errors
after. A block of columns first gets what all earlier errors do to it as one matrix product, then each 32 of it
likewise, then column by column. No result depends on the number of threads, on what else is quantized beside it, or on
numba.
(On a GPU the matrix products add in another order; its symbols are as good, and not always the same.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf_post.base.numba import use_compiled
from pgolf_post.base.workers import map_items
from pgolf_post.quantize.gptq.columns import rounding
from pgolf_post.quantize.gptq.diagonals import round_diagonals
from pgolf_post.quantize.gptq.factorize import FactorCache, LDLFactor, factorize
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.panels import Buffers, Panel, panels_of
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.gptq.viterbi import check_range

__all__ = ["LDLFactor", "FactorCache", "Job", "factorize", "gptq", "gptq_jobs", "hessian_error"]

INNER_COLUMNS = 32


def gptq(
    weight: Tensor,  # (out, in) float32
    factor: LDLFactor,
    steps: Tensor,  # (out,), or whatever broadcasts to (out, in)
    largest: int | None,
    block_size: int = 128,
    *,
    trellis: Trellis | None = None,
    row_feedback: Tensor | None = None,
    name: str = "weight",
    compiled: bool | None = None,
) -> Tensor:  # (out, in) int8, or int16 if largest is None or above 127
    """Return the symbols of `weight`. Inputs are left untouched; see Job for the arguments and errors."""
    job = Job(name, weight, factor, steps, largest, trellis, row_feedback)
    return gptq_jobs([job], block_size, compiled=compiled)[0]


def gptq_jobs(
    jobs: Sequence[Job],
    block_size: int = 128,
    *,
    compiled: bool | None = None,  # None: where numba can be loaded and the weight is on the CPU
    advance: Callable[[int], object] = lambda weights: None,
) -> list[Tensor]:  # as gptq
    """Return the symbols of many matrices, chunks side by side on torch's threads. Call advance(weights done)."""
    symbols = [torch.empty(job.weight.shape, dtype=torch.int16, device=job.weight.device) for job in jobs]
    fast = [use_compiled(compiled, job.weight) for job in jobs]
    panels = [(index, panel) for index, job in enumerate(jobs) for panel in panels_of(job, fast[index])]
    panels.sort(key=lambda item: -_length(jobs[item[0]]))  # long ones first: none is left alone at the end

    def run(item: tuple[int, Panel]) -> int:
        index, panel = item
        if jobs[index].along_diagonals:
            symbols[index].copy_(torch.from_numpy(round_diagonals(jobs[index], fast[index])))
        else:
            _quantize(jobs[index], panel, block_size, fast[index], symbols[index])
        return panel.rows * jobs[index].weight.size(1)

    for weights in map_items(run, panels):
        advance(weights)
    for job, rounded in zip(jobs, symbols, strict=True):
        check_range(job.name, rounded, job.largest)
    return [
        rounded.to(torch.int8) if job.largest is not None and job.largest < 128 else rounded
        for job, rounded in zip(jobs, symbols, strict=True)
    ]


def _length(job: Job) -> int:
    """Return what the seconds of a panel of this matrix grow with."""
    return job.weight.numel() if job.along_diagonals else job.weight.size(1)


def _quantize(job: Job, panel: Panel, block_size: int, fast: bool, symbols: Tensor) -> None:
    """Quantize a panel's rows into `symbols` (out, in)."""
    feedback, order = (tensor.to(job.weight.device) for tensor in (job.factor.feedback, job.factor.order))
    weights = panel.load(job.weight.detach(), order, 0.0)
    steps = panel.load_broadcast(job, job.spread(job.steps), order)
    buffers = Buffers(weights, steps, torch.zeros_like(weights), torch.zeros_like(weights, dtype=torch.int16))
    round_columns = rounding(job, panel, buffers, feedback, fast)
    # Blocks of columns, and within them 32 at a time, are corrected by one matrix product each.
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


def hessian_error(
    weight: Tensor,  # (out, in)
    restored: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in), in the precision that is wanted
) -> float:
    """Return Σ e H eᵀ / Σ w H wᵀ: the share of the layer's output energy that quantization changed."""
    error, original = (weight - restored).to(hessian), weight.to(hessian)
    energy = float(((original @ hessian) * original).sum(dtype=torch.float64))
    return float(((error @ hessian) * error).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
