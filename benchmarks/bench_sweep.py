"""What a sweep costs beside its unavoidable parts: quantizing, packing and scoring each trial once.

Six λ on the small recipe's shape with random weights, screened on 16 windows. The parts are the same functions called
one after the other in this process, with the Hessians factorized once, as the sweep does; the sweep is a whole `run`
with its listing, claims, rows and files. They take turns, each on a checkpoint of its own without results.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.bench_hot_start import random_checkpoint
from pgolf_post.artifacts import requant
from pgolf_post.base.progress import print_table
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.plan import read_plan
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.score.cached import score_artifact
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.sweep.engines.local import run_local
from pgolf_post.sweep.places import Places
from pgolf_post.sweep.run import Options

LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)
TOKENS, SEQ_LEN, REPEATS = 8192, 512, 3
SPEC = f"""question = "what does a sweep cost?"
baselines = []
noise_repeats = 0
[grid]
"*.hessian_lambda" = {list(LAMBDAS)}
[calibration]
tokens = 16384
[stages.screen]
tokens = {TOKENS}
"""


def parts(checkpoint: Checkpoint, data: DataFolder, calibration: CalibrationSettings) -> tuple[float, float]:
    """(CPU, wall) seconds of quantizing, packing and scoring every trial, weights and Hessians loaded once."""
    cpu, wall = time.process_time(), time.perf_counter()
    view = checkpoint.load()
    stats, pool = calibrate(view, data, calibration), ModelPool()
    factors = StatsFactors(stats)
    for value in LAMBDAS:
        artifact = requant(view, stats, read_plan(DEFAULT_PRESET, [f"*.hessian_lambda={value}"]), factors=factors)
        score_artifact(artifact.path, data, PlainProtocol(seq_len=SEQ_LEN, max_tokens=TOKENS + 1), pool=pool)
    return time.process_time() - cpu, time.perf_counter() - wall


def sweep(checkpoint: Checkpoint, data: DataFolder, folder: Path) -> tuple[float, float]:
    """(CPU, wall) seconds of the same by a sweep."""
    spec = folder / "spec.toml"
    spec.write_text(SPEC, encoding="utf-8")
    cpu, wall = time.process_time(), time.perf_counter()
    places = Places(checkpoint.path, data.path, folder / "checkpoints", folder / "results")
    state = run_local(Options(spec, (), places))
    assert len(state.rows) == len(LAMBDAS)
    assert not any("error" in row.result for row in state.rows.values())
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build(stdlib_documents(), folder / "data", BuildSettings(name="bench"), source=stdlib_source())
        calibration = CalibrationSettings(tokens=16384)
        found: dict[str, list[tuple[float, float]]] = {"parts": [], "sweep": []}
        for repeat in range(REPEATS):
            for kind in ("parts", "sweep") if repeat % 2 == 0 else ("sweep", "parts"):
                place = folder / f"{kind}_{repeat}"
                checkpoint = random_checkpoint(place, data)
                calibrate(checkpoint.load(), data, calibration)  # cached, as Hessians are when a sweep begins
                spent = parts(checkpoint, data, calibration) if kind == "parts" else sweep(checkpoint, data, place)
                found[kind].append(spent)
    medians = {kind: [statistics.median(times) for times in zip(*spent, strict=True)] for kind, spent in found.items()}
    labels = {"parts": "unavoidable: quantize + pack + score, 6 times", "sweep": "the sweep"}
    rows = [
        (
            labels[kind], f"{cpu:.2f}", f"{cpu / medians['parts'][0]:.3f}", f"{wall:.2f}",
            f"{wall / medians['parts'][1]:.3f}",
        )
        for kind, (cpu, wall) in medians.items()
    ]  # fmt: skip
    title = f"A sweep of six λ, 4.6M parameters, {TOKENS:,} tokens scored, medians of {REPEATS}"
    print_table(title, ("", "CPU seconds", "ratio", "wall seconds", "ratio"), rows)


if __name__ == "__main__":
    main()
