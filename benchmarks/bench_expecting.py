"""What training that expects fit is worth: the last steps of a run, several times over, then fit at equal bytes.

    python -m benchmarks.bench_expecting RECIPE --from CHECKPOINT --out FOLDER --arms plain,decay,rate,fit,both \
        --bits 2.5,2 --seeds 1,2,3

Each arm goes on from the checkpoint to the end of the recipe's schedule, with the seed's order of text and noise:

plain: the recipe; decay: matrices' and embeddings' weight decay × --decay; rate, fit, both: `[qat]` at these bits with
the rate alone (at the front's slope × --rate), the noise alone, and both.

Moments that a real run would have gathered beforehand are gathered first, at the checkpoint's weights. Every arm is
fitted at bits × weights ÷ 8 bytes (plain and decay at all, the others at their own) and scored on validation windows. A
fit ends within 2,000 bytes of its limit, so expected gaps are brought to the limit by 4^(bits a weight). One JSON line
a row goes to FOLDER/rows.jsonl; `python -m benchmarks.bench_expecting table FOLDER/rows.jsonl` prints means and paired
differences from plain. The same command after a crash makes the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fit_field import Bench, tensors_of
from pgolf_post.base.progress import say
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import load_module
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.spans import Span
from pgolf_post.settings import read_settings
from trainer.config import Recipe
from trainer.run.loop import Trainer
from trainer.step.expecting_fit import LEAST_REFRESHES, FitExpectation
from trainer.step.rate import front_slope

CALIBRATION_TOKENS, KAPPA_TOKENS = 32768, 4096
REGULARIZED = ((3.0, 1.0, 0.003), (2.25, 0.6, 0.01), (0.0, 0.6, 0.03))  # bits from which on: coupling and ridge


def main(arguments: Sequence[str] = ()) -> None:
    """Train and fit the arms that are asked for, or print the table of a file of rows."""
    if not arguments:
        say("bench_expecting needs a recipe and a checkpoint amid its run: RECIPE --from CHECKPOINT --out FOLDER")
        return
    if arguments[0] == "table":
        table([json.loads(line) for line in Path(arguments[1]).read_text().splitlines()])
        return
    parser = argparse.ArgumentParser(
        prog="bench_expecting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--from", dest="start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="plain,decay,rate,fit,both")
    parser.add_argument("--bits", default="2.5,2")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--decay", type=float, default=3.0, help="factor on weight decay")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the front's slope")
    given = parser.parse_args(list(arguments))
    all_bits = [float(bits) for bits in given.bits.split(",")]
    for seed in map(int, given.seeds.split(",")):
        moments: dict[str, Tensor] = {}
        for arm in given.arms.split(","):
            for bits in (None,) if arm in ("plain", "decay") else all_bits:
                facts = {"arm": arm, "seed": seed, "rate": given.rate, "decay": given.decay}
                missing = missing_bits(given.out / "rows.jsonl", facts, all_bits if bits is None else [bits])
                if not missing:
                    continue
                recipe = recipe_of(given, arm, bits, seed)
                final, seconds = trained(recipe, given, arm, moments)
                for row in fitted(final, recipe, missing, given.windows):
                    line = json.dumps({**facts, "step_cpu_seconds": round(seconds, 3), **row})
                    with (given.out / "rows.jsonl").open("a") as rows:
                        rows.write(line + "\n")
                    print(line, flush=True)


def missing_bits(path: Path, facts: dict[str, Any], all_bits: Sequence[float]) -> list[float]:
    """Return the bits at which an arm has no row yet."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    made = {row["bits"] for row in rows if facts.items() <= row.items()}
    return [bits for bits in all_bits if bits not in made]


def recipe_of(given: argparse.Namespace, arm: str, bits: float | None, seed: int) -> Recipe:
    """Return the recipe of one arm."""
    recipe = read_settings(given.recipe, Recipe, ())
    at = float(Checkpoint.open(given.start).meta["progress"])
    tree = recipe.model_dump(mode="json")
    factor = f"-x{given.rate:g}" if arm in ("rate", "both") and given.rate != 1 else ""
    name = f"{arm}{factor}{'' if bits is None else f'-{bits:g}'}-s{seed}"
    tree["run"] |= {"seed": seed, "name": name, "checkpoint_root": str(given.out)}
    tree["checkpoint"] |= {"phases": [], "fractions": [], "steps": [], "optimizer_state": False}
    if arm == "decay":
        for key in ("matrix_weight_decay", "embed_weight_decay"):
            tree["optim"][key] *= given.decay
    if bits is not None:
        rate = 0.0 if arm == "fit" else "front"
        tree["qat"] = {"at": at, "mode": "rate" if arm == "rate" else "fit", "bits": bits, "rate": rate, "every": 4}
    return Recipe.model_validate(tree)


def trained(
    recipe: Recipe, given: argparse.Namespace, arm: str, moments: dict[str, Tensor]
) -> tuple[Checkpoint, float]:
    """Return the end of one arm, and the processor seconds of a step; 0 where it was made before."""
    if made := sorted(recipe.run.folder.glob("*-final")):
        return Checkpoint.open(made[-1]), 0.0
    if recipe.run.folder.exists():
        say(f"{recipe.run.folder} is of a run that was interrupted: it begins anew")
        shutil.rmtree(recipe.run.folder)
    run = Trainer(recipe)
    run.resume(given.start)
    before, expectation = run.state.step, run.rounding
    if isinstance(expectation, FitExpectation):
        if not moments:
            moments.update(gathered(run, expectation))
        expectation.load_state(moments)
        if arm in ("rate", "both") and given.rate != 1:
            expectation.slope = lambda: given.rate * front_slope(expectation.constant)  # type: ignore[method-assign, arg-type]
    started = time.process_time()
    final = run.run()
    return final, (time.process_time() - started) / (run.state.step - before)


def gathered(run: Trainer, expectation: FitExpectation) -> dict[str, Tensor]:
    """Return the moments at the checkpoint's weights, over the steps before it."""
    for number in range(LEAST_REFRESHES):
        run.gradients.accumulate(run.sampler.step_batches(run.state.step - 1 - number, *run._batch_shape()))
        gradients = {name: weight.grad for name, weight in expectation.matrices.items() if weight.grad is not None}
        expectation.curvature.update(gradients, run.recipe.data.batch_tokens)
        run.state.clear_gradients()
    return {name: tensor.clone() for name, tensor in expectation.curvature.state().items()}


def fitted(final: Checkpoint, recipe: Recipe, all_bits: Sequence[float], windows: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of bits: bytes, bpb before and after, expected gap."""
    view, data = final.load("ema"), DataFolder.open(recipe.data.dir)
    calibration = CalibrationSettings(tokens=CALIBRATION_TOKENS, fisher=True)
    stats = calibrate(view, data, calibration)
    bench = Bench(view, stats, data, data, windows)
    models, facts = [], []
    for bits in all_bits:
        _, coupling, ridge = next(row for row in REGULARIZED if bits >= row[0])
        settings = FitSettings(coupling=coupling, ridge=ridge, kappa_tokens=KAPPA_TOKENS, regularize="fixed")
        fitter = prepare(view, data, calibration, settings, stats=stats)
        limit = round(fitter.builder.num_weights * bits / 8)
        solution = Search(fitter.builder, fitter.kappa).solve(limit)
        models.append(tensors_of(solution.model))
        slope = 2 * math.log(2) * fitter.builder.num_weights * solution.constant**2 / 24 / fitter.builder.num_weights
        facts.append({"bits": bits, "limit": limit, "bytes": len(solution.data), "scalar_nats_per_bit": slope})
        excess = 8 * (len(solution.data) - limit) / fitter.builder.num_weights
        facts[-1]["scale"] = 4**excess
    reference, *quantized = (load_module(view.config, tensors, "model") for tensors in (view.tensors, *models))
    spans = [Span(start, length, length) for start, length in bench.spans]
    with torch.no_grad():
        found = score_against(reference, quantized, bench.tokens, bench.token_bytes, spans, bench.chosen)
    nothing = replace(found.reference, unit_nats=np.zeros_like(found.reference.unit_nats))
    for row, loss, divergence in zip(facts, found.losses, found.divergences, strict=True):
        gap = divergence.bpb * row.pop("scale")
        yield {
            **row,
            "unquantized_bpb": found.reference.bpb,
            "bpb": loss.bpb,
            "expected_gap": gap,
            "expected_bpb": found.reference.bpb + gap,
            "tokens": nothing.tokens,
            "qat": final.meta.get("qat", {}),
        }


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print, for each number of bits and arm, means over seeds, and differences from plain at the same seed."""
    print("| bits | arm | seeds | bytes | unquantized bpb | expected gap | expected bpb | − plain | bpb | − plain |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    arms = dict.fromkeys((row["bits"], row["arm"], row["rate"], row["decay"]) for row in rows)
    plain = {(row["bits"], row["seed"]): row for row in rows if row["arm"] == "plain"}
    for bits, arm, rate, decay in sorted(arms, key=lambda key: -key[0]):
        same = [r for r in rows if (r["bits"], r["arm"], r["rate"], r["decay"]) == (bits, arm, rate, decay)]
        keys = ("bytes", "unquantized_bpb", "expected_gap", "expected_bpb", "bpb")
        means = [sum(row[key] for row in same) / len(same) for key in keys]
        apart = [
            ", ".join(f"{row[key] - plain[row['bits'], row['seed']][key]:+.4f}" for row in same) for key in keys[3:]
        ]
        factor = f" × {rate if arm in ('rate', 'both') else decay:g}" if arm in ("rate", "both", "decay") else ""
        cells = [f"{bits:g}", arm + factor, str(len(same)), f"{means[0]:,.0f}", *(f"{mean:.4f}" for mean in means[1:4])]
        print("| " + " | ".join([*cells, apart[0], f"{means[4]:.4f}", apart[1]]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
