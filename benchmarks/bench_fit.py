"""`fit` against the field, at equal bytes and at equal loss, and what each of its steps is worth.

    python -m benchmarks.bench_fit field CHECKPOINT --data FOLDER --val FOLDER [--windows N] [--weights ema]
                                          [--beside ARTIFACT]
    python -m benchmarks.bench_fit steps CHECKPOINT --data FOLDER --val FOLDER [--windows N]
    python -m benchmarks.bench_fit front CHECKPOINT --data FOLDER --val FOLDER [--figure FILE.svg]
    python -m benchmarks.bench_fit one CHECKPOINT --data FOLDER --bytes N [--tune-tokens N]

field: (a) the record-1855 preset under the smaller of brotli and per-group lrzip; (a') the same with its three k and a
rank-4 LQER re-tuned for the checkpoint, at (a)'s bytes; (b) sdclip-1394 under brotli; (c) fit at (a)'s bytes; (d) fit
at (a')'s divergence; then (a') and fit at 3/4 and 1/2 of (a)'s bytes. One calibration for all; fit_field.py tunes (a').
Two gaps of each on the same windows: measured, and as the unquantized model expects it (score/expected.py).

one: fit alone, at --bytes, with --tune-tokens of fine-tuning between its blocks.

front: divergence against bytes of (a), (a') and (b), their k times several numbers, under brotli, and of fit.

steps: fit's parts one after the other at one budget. Divergences are KL from the unquantized model on validation
windows; gaps are in bpb with a 95 % t interval over documents.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fit_field import RECORD_K, Bench, field_bytes, recipe, recipe_at, tensors_of, tuned_k
from pgolf_post.base.progress import say
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.pack.container import pack
from pgolf_post.plan import read_plan
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel

FRONT_FACTORS = (0.85, 1.0, 1.2, 1.45, 1.75, 2.2)


def fitted(bench: Bench, settings: FitSettings) -> tuple[Builder, dict[str, float]]:
    """A builder, and κ by tensor, from the cache where they were measured before."""
    calibration = CalibrationSettings(tokens=bench.stats.num_tokens)
    fitter = prepare(bench.view, bench.data, calibration, settings, stats=bench.stats)
    return fitter.builder, fitter.kappa


def at_divergence(bench: Bench, builder: Builder, kappa: Mapping[str, float], wanted: float, start: float) -> Any:
    """fit's model whose divergence on the tuning text is `wanted`, and its bytes."""
    search, constant = Search(builder, kappa), start
    for _ in range(4):
        model = builder.model(builder.quantize(search.constants(constant)))
        found = bench.tuner.divergence(tensors_of(model)).mean
        if abs(found / wanted - 1) < 0.01:
            break
        constant *= math.sqrt(wanted / found)
    return model, search.packed_bytes(model)


def field(bench: Bench, shares: Sequence[float], beside: Sequence[Path] = ()) -> None:
    """The comparison."""
    print("|  | bytes | divergence, nats |\n|---|---|---|")
    first = quantize_view(bench.view, bench.stats, read_plan("record-1855"))
    size = field_bytes(first)
    a = bench.row("(a) record-1855", first, size, scored=True)
    k, (builder, kappa) = tuned_k(bench), fitted(bench, FitSettings())
    second, second_size, used = recipe_at(bench, k, size)
    tuned = bench.row("(a') re-tuned: " + ", ".join(f"{g} {v:.2f}" for g, v in used.items()), second, second_size, True)
    sdclip = quantize_view(bench.view, bench.stats, read_plan("sdclip-1394"))
    bench.row("(b) sdclip-1394", sdclip, field_bytes(sdclip, ["brotli"]))
    solution = Search(builder, kappa).solve(size)
    c = bench.row("(c) fit at (a)'s bytes", solution.model, len(solution.data), scored=True)
    same_loss = at_divergence(bench, builder, kappa, bench.tuner.divergence(tensors_of(second)).mean, solution.constant)
    d = bench.row("(d) fit at (a')'s divergence", *same_loss)
    ours = [c["name"]]
    for path in beside:
        ours.append(bench.row(path.parent.name, read_artifact(path).model, path.stat().st_size, scored=True)["name"])
    compared = [(name, base["name"]) for name in ours for base in (a, tuned)]
    for share in shares:
        limit = round(size * share)
        model, num_bytes, _ = recipe_at(bench, used, limit)
        base = bench.row(f"(a') at {share:g} ×", model, num_bytes, scored=True)
        solution = Search(builder, kappa).solve(limit)
        own = bench.row(f"fit at {share:g} ×", solution.model, len(solution.data), scored=True)
        compared.append((own["name"], base["name"]))
    bench.gaps(compared)
    print(f"bytes(d)/bytes(a') {d['bytes'] / tuned['bytes']:.3f}")


def one(bench: Bench, limit: int, tune_tokens: int) -> None:
    """fit at a number of bytes, as its users run it."""
    calibration = CalibrationSettings(tokens=bench.stats.num_tokens)
    fitter = prepare(bench.view, bench.data, calibration, FitSettings(tune_tokens=tune_tokens))
    artifact = fit_artifact(fitter, limit)
    more = f", {tune_tokens:,} tokens of fine-tuning" if tune_tokens else ""
    bench.row(f"fit at {limit:,} bytes{more}", read_artifact(artifact.path).model, artifact.path.stat().st_size)
    say(f"training data: {artifact.meta['train_seconds']}, {artifact.meta.get('fine_tuned')}")
    bench.gaps()


def steps(bench: Bench) -> None:
    """fit's parts one after the other, at the record recipe's bytes."""
    limit = field_bytes(quantize_view(bench.view, bench.stats, read_plan("record-1855")))
    one_sided = FitSettings(row_feedback=False)
    plain = FitSettings(row_feedback=False, trellis_states=0, kappa="off")
    trials = {
        "equal slope by tensor": plain.model_copy(update={"rows": False, "columns": False}),
        "+ rows": plain.model_copy(update={"columns": False}),
        "+ columns": plain,
        "+ trellis of 8 states": FitSettings(row_feedback=False, trellis_states=8, kappa="off"),
        "+ κ by tensor": FitSettings(row_feedback=False, trellis_states=8),
        "+ 256 states": one_sided,
        "+ feedback from both sides (the default)": FitSettings(),
        "64 states": FitSettings(trellis_states=64),
        "8 states": FitSettings(trellis_states=8),
        "κ by role": FitSettings(kappa="role"),
        "centroid": FitSettings(shrink=True),
        "plain moments": FitSettings(weighted=0.0),
        "weighted moments": FitSettings(weighted=1.0),
        "off-diagonal × 0.95": FitSettings(hessian_share=0.95),
    }
    print("|  | bytes | divergence, nats |\n|---|---|---|")
    for name, settings in trials.items():
        builder, kappa = fitted(bench, settings)
        solution = Search(builder, kappa).solve(limit)
        bench.row(name, solution.model, len(solution.data), scored=False)


# ---- front -----------------------------------------------------------------------------------------------------------


def front(bench: Bench, figure: Path | None) -> None:
    """Divergence against bytes. The recipes trace theirs by their k, fit by its c."""
    k, (builder, kappa) = tuned_k(bench), fitted(bench, FitSettings())
    first = Search(builder, kappa).first_constant(field_bytes(recipe(bench, RECORD_K), ["brotli"]))

    def scaled(base: Mapping[str, float], factor: float) -> dict[str, float]:
        return {group: value * factor for group, value in base.items()}

    def sdclip(factor: float) -> QuantizedModel:
        plan = read_plan("sdclip-1394", [f"embedding.clip={20 * factor}", f"matrices.clip={12.85 * factor}"])
        return quantize_view(bench.view, bench.stats, plan)

    makers: dict[str, Any] = {
        "(a) record-1855": lambda factor: recipe(bench, scaled(RECORD_K, factor)),
        "(a') re-tuned": lambda factor: recipe(bench, scaled(k, factor)),
        "(b) sdclip-1394": sdclip,
        "fit": lambda factor: builder.model(builder.quantize(constants_of(builder.matrices, first * factor, kappa))),
    }
    print("|  | × | bytes | divergence, nats |\n|---|---|---|---|")
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in makers}
    for name, make in makers.items():
        for factor in FRONT_FACTORS:
            model = make(factor)
            size = len(pack(model)) if name == "fit" else field_bytes(model, ["brotli"])
            lines[name].append((size, bench.eyes.divergence(tensors_of(model)).mean))
            print(f"| {name} | {factor:g} | {size:,} | {lines[name][-1][1]:.6f} |", flush=True)
    if figure:
        draw_front(lines, figure)


def draw_front(lines: Mapping[str, Sequence[tuple[int, float]]], figure: Path) -> None:
    """The table as a picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "fit_front"  # the same ids every time
    canvas = Figure(figsize=(7, 4.5))
    axes = canvas.subplots()
    for name, points in lines.items():
        axes.plot([size / 1e6 for size, _ in points], [kl for _, kl in points], marker="o", label=name)
    axes.set(xlabel="artifact, MB", ylabel="divergence from the unquantized model, nats per token", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    canvas.tight_layout()
    canvas.savefig(figure, metadata={"Date": None})


def main(arguments: Sequence[str] = ()) -> None:
    if not arguments:
        say("bench_fit needs a trained checkpoint: bench_fit field|one|steps|front CHECKPOINT --data FOLDER")
        return None
    parser = argparse.ArgumentParser(
        prog="bench_fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["field", "one", "steps", "front"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--windows", type=int, default=1 << 30)
    parser.add_argument("--few-scored", action="store_true", help="not (b) and (d): their divergences alone")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="field: artifact.pgolf as a row, too")
    parser.add_argument("--bytes", type=int, help="one: the artifact's limit")
    parser.add_argument("--tune-tokens", type=int, default=0, help="one: of calibration text, between blocks")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--figure", type=Path, help="front: write a picture, too")
    parser.add_argument("--shares", default="0.75,0.5")
    given = parser.parse_args(list(arguments))
    view = Checkpoint.open(given.checkpoint).load(given.weights)
    data = DataFolder.open(given.data)
    stats = calibrate(view, data, CalibrationSettings(tokens=given.calibration_tokens, fisher=True))
    bench = Bench(view, stats, data, DataFolder.open(given.val or given.data), given.windows, not given.few_scored)
    if given.table == "one":
        return one(bench, given.bytes, given.tune_tokens)
    if given.table == "front":
        return front(bench, given.figure)
    shares = [float(share) for share in given.shares.split(",") if share]
    return field(bench, shares, given.beside) if given.table == "field" else steps(bench)


if __name__ == "__main__":
    main(sys.argv[1:])
