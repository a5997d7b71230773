"""The stages of a round that are no command of the toolkit: rounding to the bytes, and the expected gap.

`python -m benchmarks.minigolf.work STAGE TASK.json` reads a task and prints its answer as one JSON object. What is made
is cached in the checkpoint's folder, so a killed stage goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from pgolf_post.artifacts import PackedArtifact, plan_calibration, requant
from pgolf_post.base.command_line import run_command
from pgolf_post.base.progress import print_json, say
from pgolf_post.base.storage import read_json
from pgolf_post.base.threads import use_threads
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.families import load_module
from pgolf_post.fit.artifact import fit
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.report.size import count, count_code
from pgolf_post.plan import read_plan
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.rules import GridRule
from pgolf_post.score.compare.expected import score_against
from pgolf_post.score.compare.paired import pair, t_interval
from pgolf_post.score.plain import PlainProtocol, protocol_windows
from pgolf_post.score.spans import Span
from pgolf_post.score.stage import open_weights
from pgolf_post.settings import parse_settings

MOST_TRIES, FULL = 6, 0.998  # artifacts per round; share of the bytes that counts as filled


def rounded(task: Mapping[str, Any]) -> dict[str, Any]:
    """Round the final checkpoint. Raises OverBudgetError if the artifact and its code exceed the bytes."""
    checkpoint, data = Checkpoint.open(Path(task["checkpoint"])), DataFolder.open(Path(task["data"]))
    view, code = checkpoint.load(task["weights"]), [Path(path) for path in task["code"]]
    calibration = CalibrationSettings(tokens=task["calibration_tokens"])
    if task["method"] == "fit":
        settings = parse_settings(FitSettings, task["fit"], "fit")
        codec = task["codec"]
        artifact = fit(view, data, task["bytes"], code=code, calibration=calibration, settings=settings, codec=codec)
        more = {key: artifact.meta[key] for key in ("train_seconds", "fine_tuned") if key in artifact.meta}
    else:
        limit = task["bytes"] - count_code(code)
        artifact, more = by_plan(view, data, calibration, task, limit)
    report = count(artifact.path, code, task["bytes"])
    report.require_within_budget()
    weights = num_weights(artifact, view)
    named = {"artifact": str(artifact.path), "symbols_sha256": artifact.symbols_sha256, **report.facts()}
    return {**named, "weights": weights, "bits_per_weight": 8 * report.artifact_bytes / weights, **more}


def by_plan(
    view: View, data: DataFolder, calibration: CalibrationSettings, task: Mapping[str, Any], limit: int
) -> tuple[PackedArtifact, dict[str, Any]]:
    """Return the artifact of a plan, every clip of it times one number where the bytes ask for it, and that number."""
    plan = read_plan(task["plan"], task["set"])
    stats = calibrate(view, data, plan_calibration(calibration, plan))
    factors, factor = StatsFactors(stats), 1.0
    largest: tuple[PackedArtifact, float] | None = None  # of those that fit
    for _ in range(MOST_TRIES):
        artifact = scaled_plan(view, stats, task, factor, factors)
        say(f"every clip × {factor:.4f}: {artifact.num_bytes:,} of {limit:,} bytes")
        fits = artifact.num_bytes <= limit
        if fits and (largest is None or artifact.num_bytes > largest[0].num_bytes):
            largest = artifact, factor
        done = artifact.num_bytes >= FULL * limit or (factor == 1.0 and task["to_bytes"] == "down")
        if task["to_bytes"] == "no" or (fits and done):
            break
        factor *= next_factor(artifact.num_bytes, limit, num_weights(artifact, view))
    chosen, factor = largest or (artifact, factor)
    return chosen, {"clip_factor": factor}


def num_weights(artifact: PackedArtifact, view: View) -> int:
    """Return the number of the model's weights that are stored as symbols; low-rank corrections hold none of them."""
    names = [tensor["name"] for tensor in artifact.meta["tensors"]]
    return sum(view.tensors[name].numel() for name in names if name in view.tensors)


def next_factor(num_bytes: int, limit: int, weights: int) -> float:
    """Return the number that takes an artifact to just below a limit: a step twice as large saves a bit a weight."""
    aim = limit * (1 + FULL) / 2
    return float(2 ** ((num_bytes - aim) * 8 / weights))


def scaled_plan(
    view: View, stats: Stats, task: Mapping[str, Any], factor: float, factors: StatsFactors
) -> PackedArtifact:
    """Return the artifact of a plan with every clip times a factor."""
    plan = read_plan(task["plan"], task["set"])
    clips = [rule for rule in plan.rules if isinstance(rule, GridRule) and rule.reads_clip]
    changes = [f"{rule.name}.clip={rule.clip * factor}" for rule in clips] if factor != 1.0 else []
    return requant(view, stats, read_plan(task["plan"], [*task["set"], *changes]), task["codec"], factors=factors)


def expected(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the gap that the unquantized model expects, with its 95 % interval over documents, on some windows."""
    checkpoint, data = Checkpoint.open(Path(task["checkpoint"])), DataFolder.open(Path(task["data"]))
    opened = open_weights(checkpoint.load(task["weights"])), open_weights(Path(task["artifact"]))
    reference, model = (load_module(config, tensors, name) for name, config, tensors in opened)
    tokens = data.tokens("val", task["eval_tokens"])
    protocol = PlainProtocol(seq_len=task["seq_len"])
    spans = [Span(start, length, length) for start, length in protocol_windows(tokens, protocol)]
    chosen = np.sort(np.random.default_rng(0).choice(len(spans), min(task["windows"], len(spans)), replace=False))
    found = score_against(reference, [model], tokens, data.token_bytes("val", tokens), spans, chosen)
    nothing = replace(found.reference, unit_nats=np.zeros_like(found.reference.unit_nats))
    interval = t_interval(pair(found.divergences[0], nothing))
    return {"windows": len(chosen), **interval.facts()}


STAGES = {"rounded": rounded, "expected": expected}


@click.command()
@click.argument("stage", type=click.Choice(list(STAGES)))
@click.argument("task", type=click.Path(path_type=Path))
def command(stage: str, task: Path) -> None:
    """Do one stage of a round: TASK is a JSON file with what it needs."""
    wanted = read_json(task)
    use_threads(wanted["threads"])
    print_json(STAGES[stage](wanted))


if __name__ == "__main__":
    run_command(command)
