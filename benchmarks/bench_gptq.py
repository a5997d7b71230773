"""Quantizing 36M parameters: our engine against the usual loop over one matrix at a time, in the same run.

The set has the record model's shapes (11 blocks of 512, MLP 4×, vocabulary 8192), random weights, and Hessians of
correlated inputs with a power-law spectrum and channels of very different size. The baseline is written as GPTQ
usually is in PyTorch: one matrix after the other, its own Hessian inverted by two Cholesky factorizations, columns
rounded one by one, updates of later columns lazy by blocks of 128. Ratios are medians over interleaved repeats, of wall
seconds and, for machines shared with other work, of this process's CPU seconds (with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_post.base.progress import print_table, progress_bar
from pgolf_post.quantize.clip import grid_steps
from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
from pgolf_post.quantize.gptq.factorize import FactorCache
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.rules import RtnRule

REPEATS, DAMP, LARGEST = 3, 0.01, 31
BLOCKS, WIDTH, VOCABULARY = 11, 512, 8192
CLIPS = (10.0, 11.0, 12.0, 13.0, 14.0, 15.0)
SDCLIP = RtnRule(name="sdclip", bits=6)
BLOCK_MATRICES = {  # name → (rows, columns, site)
    "q": (512, 512, "attn.in"), "k": (256, 512, "attn.in"), "v": (256, 512, "attn.in"), "o": (512, 512, "attn.out"),
    "fc": (2048, 512, "mlp.in"), "proj": (512, 2048, "mlp.mid"),
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    name: str
    weight: Tensor  # (out, in) float32
    site: str


def random_hessian(width: int, generator: torch.Generator) -> Tensor:  # (width, width) float64
    """Mean xxᵀ of 2·width inputs: a few strong directions, some loud channels."""
    mixing = torch.randn(width, width, generator=generator) * (1.0 + torch.arange(width))[:, None] ** -0.5
    inputs = torch.randn(2 * width, width, generator=generator) @ mixing
    inputs *= torch.exp(0.5 * torch.randn(width, generator=generator))
    return (inputs.T @ inputs / len(inputs)).double()


def record_shapes() -> tuple[list[Matrix], dict[str, Tensor]]:
    """The matrices, and the Hessian of every site."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"blocks.{block}.{name}": (rows, columns, f"blocks.{block}.{site}")
        for block in range(BLOCKS)
        for name, (rows, columns, site) in BLOCK_MATRICES.items()
    } | {"tok_emb": (VOCABULARY, WIDTH, "head.in")}
    sites = {site: columns for _, columns, site in shapes.values()}
    hessians = {site: random_hessian(columns, generator) for site, columns in sites.items()}
    matrices = [
        Matrix(name, 0.05 * torch.randn(rows, columns, generator=generator), site)
        for name, (rows, columns, site) in shapes.items()
    ]
    return matrices, hessians


def usual_loop(weight: Tensor, hessian: Tensor, scales: Tensor, block_size: int = 128) -> Tensor:
    """Symbols (out, in) int8 of one matrix."""
    hessian, columns = hessian.float(), weight.size(1)
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
    order = torch.argsort(hessian.diagonal(), descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    symbols = torch.empty_like(weight)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, errors = weight[:, start:stop].clone(), torch.empty(len(weight), stop - start)
        for j in range(stop - start):
            along = upper[start + j, start + j : stop]
            symbols[:, start + j] = torch.clamp(torch.round(block[:, j] / scales), -LARGEST, LARGEST)
            errors[:, j] = (block[:, j] - symbols[:, start + j] * scales) / along[0]
            block[:, j:] -= errors[:, j : j + 1] @ along[None, :]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return symbols[:, torch.argsort(order)].to(torch.int8)


def engine(
    matrices: list[Matrix],
    factors: FactorCache,
    clip: float,
    trellis: Trellis | None = None,
    compiled: bool | None = None,
) -> list[Tensor]:
    """All matrices through ours; a trellis on half the spacing has the same bits."""
    factors.fill([matrix.site for matrix in matrices], DAMP, True)
    jobs = []
    for matrix in matrices:
        steps = grid_steps(matrix.name, matrix.weight, SDCLIP, clip)
        factor = factors.get(matrix.site, DAMP, True)
        largest = None if trellis else LARGEST
        jobs.append(Job(matrix.name, matrix.weight, factor, steps / 2 if trellis else steps, largest, trellis))
    return gptq_jobs(jobs, compiled=compiled)


def ratios(times: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[float]:
    """Medians of wall and CPU seconds over those of other work in the same repeat."""
    return [statistics.median(a[which] / b[which] for a, b in zip(times, others, strict=True)) for which in range(2)]


def main() -> None:
    matrices, hessians = record_shapes()
    weights = sum(matrix.weight.numel() for matrix in matrices)

    def usual() -> list[Tensor]:
        return [
            usual_loop(m.weight, hessians[m.site], grid_steps(m.name, m.weight, SDCLIP, CLIPS[0])) for m in matrices
        ]

    def fresh(trellis: Trellis | None = None) -> list[Tensor]:
        return engine(matrices, FactorCache(hessians.__getitem__), CLIPS[0], trellis)

    def sweep() -> None:
        factors = FactorCache(hessians.__getitem__)
        for clip in CLIPS:
            engine(matrices, factors, clip)

    known = FactorCache(hessians.__getitem__)
    works: dict[str, Callable[[], object]] = {
        "baseline: the usual loop": usual,
        "scalar": fresh,
        "scalar, factors known": lambda: engine(matrices, known, CLIPS[0]),
        "scalar, factors known, without numba": lambda: engine(matrices, known, CLIPS[0], None, False),
        f"scalar, sweep of {len(CLIPS)} clips": sweep,
        "trellis of 8 states": lambda: fresh(Trellis(8, 64)),
        "trellis of 8 states, factors known": lambda: engine(matrices, known, CLIPS[0], Trellis(8, 64)),
        "trellis of 8 states, lanes of 512": lambda: engine(matrices, known, CLIPS[0], Trellis(8, 512)),
        "trellis of 64 states, factors known": lambda: engine(matrices, known, CLIPS[0], Trellis(64, 128)),
    }
    for trellis in (None, Trellis(8, 64)):
        engine(matrices[:1], known, CLIPS[0], trellis)  # compiles the kernels
    known.fill(hessians, DAMP, True)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}  # (wall, CPU)
    with progress_bar("measuring", REPEATS * len(works)) as advance:
        for _ in range(REPEATS):
            for name, work in works.items():
                started = time.perf_counter(), time.process_time()
                work()
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
                advance(1, note=name)
    names = ("baseline: the usual loop", "scalar")
    rows = []
    for name, times in seconds.items():
        medians = (f"{statistics.median(column):.2f}" for column in zip(*times, strict=True))
        rows.append((name, *medians, *(f"{ratio:.3f}" for other in names for ratio in ratios(times, seconds[other]))))
    header = ("", "wall s", "CPU s", "of baseline", "(CPU)", "of scalar", "(CPU)")
    title = f"GPTQ of {weights:,} weights, {torch.get_num_threads()} threads, medians of {REPEATS}"
    print_table(title, header, rows)
    same = [float((a == b).float().mean()) for a, b in zip(usual(), fresh(), strict=True)]
    print(f"symbols equal to the baseline's: {sum(same) / len(same):.4%} (mean over matrices)")


if __name__ == "__main__":
    main()
