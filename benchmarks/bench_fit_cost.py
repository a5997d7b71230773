"""Seconds that `fit` takes, in parts and whole.

    python -m benchmarks.bench_fit_cost [steps] [whole] [--rows TEXT …]

steps: equal slope on 36M weights (11 blocks × 512, vocabulary 8192, random), against one plain GPTQ pass. Each row is
the smaller of two passes. `--rows` names those to run by a part of their name.

whole: all of fit after statistics and κ, and decoding, on the record recipe's model with random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_hot_start import RECIPE, random_checkpoint
from pgolf_post.base.progress import print_table, say
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.decode import decode


def steps(parts: Sequence[str] = ()) -> None:
    """Seconds of a build of 36M weights against one pass of plain GPTQ on the same factors' matrices.

    `parts`: parts of the names of the rows to run; none: all of them.
    """
    from pgolf_post.fit.steps import relative_steps
    from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
    from pgolf_post.quantize.gptq.factorize import factorize
    from pgolf_post.quantize.gptq.trellis import DIAGONALS, Trellis
    from pgolf_post.quantize.tensor import scale_of

    shapes = [(512, 512), (256, 512), (256, 512), (512, 512), (2048, 512), (512, 2048)] * 11 + [(8192, 512)]
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for size in (256, 512, 2048):
        x = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
        moments[size] = (x.T @ x / len(x)).double()
    weights = [torch.randn(shape, generator=generator) for shape in shapes]

    def timed(prepare_steps: Any, trellis: Trellis | None, coupled: bool = False) -> float:
        started, clock = time.perf_counter(), time.process_time()
        jobs = []
        for index, weight in enumerate(weights):
            diagonal = trellis is not None and trellis.diagonal
            factor = factorize("w", moments[weight.size(1)], 0.01, act_order=not diagonal)
            down = None
            if coupled and len(weight) in moments:  # all but the embedding
                down = factorize("w", moments[len(weight)], 0.01, act_order=False).feedback
            steps = prepare_steps(weight, factor)
            jobs.append(Job(str(index), weight, factor, steps, None, trellis, row_feedback=down))
        gptq_jobs(jobs)
        say(f"{time.perf_counter() - started:.1f} s, {time.process_time() - clock:.1f} CPU s")
        return time.process_time() - clock

    def plain(weight: torch.Tensor, _: Any) -> torch.Tensor:
        return weight.std(1, keepdim=True).expand(-1, 1) * 0.4

    def sloped(weight: torch.Tensor, factor: Any) -> torch.Tensor:
        shape = relative_steps(torch.rand(len(weight)).double() + 0.5, factor.column_lengths)
        return torch.from_numpy(scale_of(shape.factors(0.4 / shape.unit), *weight.shape))

    trials: dict[str, tuple[Trellis | None, bool]] = {
        "equal slope, scalar grid": (None, False),
        "scalar grid, feedback from both sides": (None, True),
        "lanes: 8 states, one side": (Trellis(8, 512), False),
        "lanes: 8 states, both sides": (Trellis(8, 512), True),
        "lanes: 64 states, one side": (Trellis(64, 512), False),
        "lanes: 64 states, both sides": (Trellis(64, 512), True),
        "diagonals: 8 states, one side": (Trellis(8, DIAGONALS), False),
        "diagonals: 64 states, one side": (Trellis(64, DIAGONALS), False),
        "diagonals: 8 states, both sides": (Trellis(8, DIAGONALS), True),
        "diagonals: 64 states, both sides": (Trellis(64, DIAGONALS), True),
        "diagonals: 256 states, both sides (the default)": (Trellis(256, DIAGONALS), True),
    }
    chosen = {name: trial for name, trial in trials.items() if not parts or any(part in name for part in parts)}
    if not chosen:
        raise SystemExit(f"no row is named like {', '.join(parts)}; there are: {'; '.join(trials)}")
    base = min(timed(plain, None) for _ in range(2))
    print(f"| plain GPTQ, row scales | {base:.1f} | |", flush=True)
    for name, (trellis, coupled) in chosen.items():
        found = min(timed(sloped, trellis, coupled) for _ in range(2))
        print(f"| {name} | {found:.1f} | {found / base:.2f} |", flush=True)


def whole(limit: int = 15_950_000) -> None:
    """Seconds from statistics to a written artifact, and to read it, on a model of the record recipe's shapes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        data = build(stdlib_documents(), out, BuildSettings(name="bench", vocab_size=8192), source=stdlib_source())
        view = random_checkpoint(Path(folder), data, RECIPE.with_name("record_8xh100.toml")).load()
        fitter = prepare(view, data, CalibrationSettings(tokens=8192), FitSettings(kappa="off"))
        seconds: dict[str, tuple[float, float]] = {}
        started = time.perf_counter(), time.process_time()
        artifact = fit_artifact(fitter, limit)
        seconds["fit"] = time.perf_counter() - started[0], time.process_time() - started[1]
        started = time.perf_counter(), time.process_time()
        decode(artifact.path.read_bytes())
        seconds["decode"] = time.perf_counter() - started[0], time.process_time() - started[1]
        size, builds = artifact.path.stat().st_size, artifact.meta["builds"]
    say(f"{fitter.builder.num_weights:,} weights, {builds} builds, {size:,} bytes")
    rows = [(name, f"{wall:.1f}", f"{cpu:.1f}") for name, (wall, cpu) in seconds.items()]
    print_table("", ("", "wall s", "CPU s"), rows)


TABLES = ("steps", "whole")


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="bench_fit_cost", description=__doc__)
    parser.add_argument("tables", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--rows", action="append", default=[], help="steps: a part of the names of rows to run")
    given = parser.parse_args(list(arguments))
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"unknown tables: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    for name in given.tables or TABLES:
        if name == "steps":
            steps(given.rows)
        else:
            whole()


if __name__ == "__main__":
    main(sys.argv[1:])
