"""`fit` against the field, at equal bytes and at equal loss, and what each of its steps is worth.

    python -m benchmarks.bench_fit field CHECKPOINT --data FOLDER --val FOLDER [--windows N] [--weights ema]
                                          [--beside ARTIFACT]
    python -m benchmarks.bench_fit steps CHECKPOINT --data FOLDER --val FOLDER [--windows N]
    python -m benchmarks.bench_fit front CHECKPOINT --data FOLDER --val FOLDER [--figure FILE.svg]
    python -m benchmarks.bench_fit cost
    python -m benchmarks.bench_fit whole

field: (a) the record-1855 preset under the smaller of brotli and per-group lrzip; (a') the same with its three k and a
rank-4 LQER re-tuned for the checkpoint, at (a)'s bytes; (b) sdclip-1394 under brotli; (c) fit at (a)'s bytes; (d) fit
at (a')'s divergence; then (a') and fit at 3/4 and 1/2 of (a)'s bytes. One calibration for all. (a') is tuned as a
careful contestant would who has our probe: each of the three groups (embedding, attention, MLP) is quantized alone, the
divergence it causes on training text is measured, and its k is set so that every weight causes the same, twice over.
Two gaps of each on the same windows: measured, and as the unquantized model expects it (score/expected.py).

one: fit alone, at --bytes, with --tune-tokens of fine-tuning between its blocks.

front: divergence against bytes of (a), (a') and (b), their k times several numbers, under brotli, and of fit.

steps: fit's parts one after the other at one budget. Divergences are KL from the unquantized model on validation
windows; gaps are in bpb with a 95 % t interval over documents.

cost: equal slope on 36M weights (11 blocks × 512, vocabulary 8192, random), against one plain GPTQ pass.

whole: all of fit after statistics and κ, and decoding, on the record recipe's model with random weights.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_hot_start import RECIPE, random_checkpoint
from pgolf_post.base.progress import print_table, progress_bar, say
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.families import load_module, train_seq_len
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.kappa import by_tensor, measure_kappas
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.pack.container import pack
from pgolf_post.pack.decode import decode
from pgolf_post.pack.report.compare import compare
from pgolf_post.plan import read_plan
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.compare.paired import pair, share_interval, t_interval
from pgolf_post.score.plain import PlainProtocol, protocol_windows
from pgolf_post.score.spans import Span

RECORD_K = {"embedding": 14.0, "attention": 13.0, "mlp": 11.5}
GROUP_OF = {"q": "attention", "k": "attention", "v": "attention", "attn_proj": "attention"}
GROUP_OF |= {"mlp_fc": "mlp", "mlp_proj": "mlp", "embedding": "embedding", "head": "embedding"}
RECORD_BITS, LEAST_K = {"embedding": 7, "attention": 6, "mlp": 6}, 6.0
FRONT_FACTORS = (0.85, 1.0, 1.2, 1.45, 1.75, 2.2)
CLOSE, TUNING_ROUNDS, KL_WINDOWS = 0.0005, 2, 64


@dataclass
class Bench:
    """One checkpoint, one calibration, one sample of validation windows."""

    view: View
    stats: Stats
    data: DataFolder
    val: DataFolder
    num_windows: int
    all_scored: bool = True  # else those rows alone that the goal is about

    def __post_init__(self) -> None:
        seq_len = train_seq_len(self.view.config)
        self.tokens = self.val.tokens("val", None)
        self.token_bytes = self.val.token_bytes("val", self.tokens)
        self.spans = protocol_windows(self.tokens, PlainProtocol(seq_len=seq_len))
        random, count = np.random.default_rng(0), min(self.num_windows, len(self.spans))
        self.chosen = np.sort(random.choice(len(self.spans), count, replace=False))
        few = random.choice(self.chosen, min(KL_WINDOWS, count), replace=False)
        rows = [self.tokens[start : start + length] for start, length in (self.spans[i] for i in np.sort(few))]
        self.eyes = Probe(self.view, CalibrationSet((), np.stack(rows).astype(np.int64)))
        self.tuner = Probe(self.view, probe_text(self.view, self.data, 16384, 0))
        self.scored: dict[str, Mapping[str, torch.Tensor]] = {}  # rows whose gaps are wanted

    def row(self, name: str, model: QuantizedModel, num_bytes: int, scored: bool | None = None) -> dict[str, Any]:
        """Print a model's bytes and divergence; its gaps come with `gaps`."""
        decoded = tensors_of(model)
        kl = self.eyes.divergence(decoded)
        if self.all_scored if scored is None else scored:
            self.scored[name] = decoded
        print(f"| {name} | {num_bytes:,} | {kl.mean:.6f} |", flush=True)
        return {"name": name, "bytes": num_bytes, "kl": kl.mean}

    def gaps(self, compared: Sequence[tuple[str, str]] = ()) -> None:
        """Print every scored row's gap, measured and expected, from one pass over the windows; then shares of gaps."""
        reference, *models = (
            load_module(self.view.config, tensors, name)
            for name, tensors in {"unquantized": self.view.tensors, **self.scored}.items()
        )
        spans = [Span(start, length, length) for start, length in self.spans]
        with progress_bar("scoring", len(self.chosen)) as advance:
            found = score_against(reference, models, self.tokens, self.token_bytes, spans, self.chosen, advance=advance)
        own = found.reference
        nothing = replace(own, unit_nats=np.zeros_like(own.unit_nats))
        documents = len(own.document_nats)
        print(f"\nunquantized {own.bpb:.5f} bpb, {own.tokens:,} tokens in {documents} documents\n")
        print("|  | bpb | gap, bpb | 95 % | expected gap | 95 % |\n|---|---|---|---|---|---|")
        both = {}
        for name, loss, divergence in zip(self.scored, found.losses, found.divergences, strict=True):
            both[name] = pair(loss, own), pair(divergence, nothing)
            gaps = [t_interval(clusters) for clusters in both[name]]
            cells = [f"{gap.bpb:+.5f} | {gap.low:+.5f} … {gap.high:+.5f}" for gap in gaps]
            print("| " + " | ".join([name, f"{loss.bpb:.5f}", *cells]) + " |", flush=True)
        print("\n|  | of | gap | 95 %, paired | expected gap | 95 %, paired |\n|---|---|---|---|---|---|")
        for first, second in compared:
            shares = [share_interval(*sides) for sides in zip(both[first], both[second], strict=True)]
            cells = [f"{share:.3f} | {low:.3f} … {high:.3f}" for share, low, high in shares]
            print("| " + " | ".join([first, second, *cells]) + " |")


def tensors_of(model: QuantizedModel) -> dict[str, torch.Tensor]:
    """What the decoder gives."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in model.tensors().items()}


def field_bytes(model: QuantizedModel, codecs: Sequence[str] = ("brotli", "lrzip")) -> int:
    """The smaller of what contestants use."""
    found = compare(model, codecs)
    return min(row.artifact_bytes for row in found.rows)


# ---- the recipe, re-tuned --------------------------------------------------------------------------------------------


def recipe(bench: Bench, k: Mapping[str, float], lqer: bool = True) -> QuantizedModel:
    """The record's recipe with other k, and with a bit more where k would clip weights that matter."""
    changes = []
    for group, value in k.items():
        bits, own = RECORD_BITS[group], value
        if value < LEAST_K:  # one bit more, the same step
            bits, own = bits + 1, value * (2**bits - 1) / (2 ** (bits - 1) - 1)
        changes += [f"{group}.clip={own}", f"{group}.bits={bits}"]
    plan = read_plan("record-1855", changes + ([] if lqer else ["lqer.top_k=0"]))
    return quantize_view(bench.view, bench.stats, plan)


def tuned_k(bench: Bench) -> dict[str, float]:
    """k such that every weight of the three groups causes the same divergence, at the same entropy as RECORD_K."""
    k = dict(RECORD_K)
    for _ in range(TUNING_ROUNDS):
        model = recipe(bench, k, lqer=False)
        weights: dict[str, int] = dict.fromkeys(k, 0)
        groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in k}
        for name, tensor in model.quantized.items():
            role = str(tensor.facts["role"])
            if role in GROUP_OF:
                group = GROUP_OF[role]
                weights[group] += tensor.symbols.size
                groups[group][name] = torch.from_numpy(tensor.dequantize())
        each = {group: bench.tuner.divergence(tensors).mean / weights[group] for group, tensors in groups.items()}
        total = sum(weights.values())
        mean = math.exp(sum(weights[g] * math.log(each[g]) for g in k) / total)
        k = {group: k[group] * math.sqrt(mean / each[group]) for group in k}
        say(f"k re-tuned: {k}")
    return k


def recipe_at(bench: Bench, k: Mapping[str, float], target: int) -> tuple[QuantizedModel, int, dict[str, float]]:
    """The recipe with every k times one number, at `target` bytes."""
    factor = 1.0
    for _ in range(6):
        now = {group: value * factor for group, value in k.items()}
        model = recipe(bench, now)
        size = field_bytes(model)
        if abs(size / target - 1) <= CLOSE:
            break
        weights = sum(tensor.symbols.size for tensor in model.quantized.values())
        factor *= 2 ** ((size - target) * 8 / weights)
    return model, size, now


# ---- fit -------------------------------------------------------------------------------------------------------------


def fitted(bench: Bench, settings: FitSettings) -> tuple[Builder, dict[str, float]]:
    """A builder, and κ by tensor."""
    builder = Builder(bench.view, bench.stats, settings)
    if settings.kappa == "off":
        return builder, dict.fromkeys(builder.matrices, 1.0)
    text = probe_text(bench.view, bench.data, settings.kappa_tokens, settings.kappa_seed)
    kappas = measure_kappas(builder, Probe(bench.view, text), settings.kappa)
    return builder, by_tensor(builder, kappas, settings.kappa)


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
        "+ 64 states": one_sided,
        "+ feedback from both sides (the default)": FitSettings(),
        "256 states": FitSettings(trellis_states=256),
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


# ---- cost ------------------------------------------------------------------------------------------------------------


def cost() -> None:
    """Seconds of a build of 36M weights against one pass of plain GPTQ on the same factors' matrices."""
    from pgolf_post.fit.steps import relative_steps
    from pgolf_post.quantize.gptq.driver import Job, gptq_jobs
    from pgolf_post.quantize.gptq.factorize import factorize
    from pgolf_post.quantize.gptq.trellis import Trellis
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
            factor = factorize("w", moments[weight.size(1)], 0.01, act_order=True)
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
        return torch.from_numpy(scale_of(shape.factors(0.4 / shape.unit, "w"), *weight.shape))

    base = min(timed(plain, None) for _ in range(2))
    trials: dict[str, tuple[Trellis | None, bool]] = {
        "equal slope, scalar grid": (None, False),
        "scalar grid, feedback from both sides": (None, True),
        "8 states": (Trellis(8, 512), False),
        "8 states, feedback from both sides": (Trellis(8, 512), True),
        "64 states": (Trellis(64, 512), False),
        "64 states, feedback from both sides (the default)": (Trellis(64, 512), True),
    }
    for name, (trellis, coupled) in trials.items():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["field", "one", "steps", "front", "cost", "whole"])
    parser.add_argument("checkpoint", type=Path, nargs="?")
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
    given = parser.parse_args()
    if given.table == "cost":
        return cost()
    if given.table == "whole":
        return whole()
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
    main()
