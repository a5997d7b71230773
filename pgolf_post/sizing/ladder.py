"""The ladder: short runs of some sizes at some lengths, and what rounding costs at some rates.

A size is a list of changes of the recipe. Runs are the sweep's own trainings: those that are there are found, and those
that were killed go on. Every number is measured by the toolkit: bpb by plain windows, seconds by the schedule's clock,
gaps as `fit` predicts them with its measured κ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.artifacts import PackedArtifact
from pgolf_post.base.progress import say
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, OverBudgetError, SettingsError
from pgolf_post.fit.artifact import fit
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score
from pgolf_post.settings import apply_override, read_toml
from pgolf_post.sizing.choose import Candidate
from pgolf_post.sizing.law import Observation
from pgolf_post.sweep.train_stage import TrainStage
from pgolf_post.sweep.trainer_process import Asked, as_toml
from pgolf_post.sweep.training import trained

WIDTHS = (0.5, 0.75, 1.0, 1.25)  # of the recipe's, where no sizes are named
UNITS = (64, 32, 16, 8)  # widths are multiples of the first, and of the heads, by which four widths differ

Train = Callable[[TrainStage, Path, Path, Asked], Checkpoint]


@dataclass(frozen=True)
class LadderSettings:
    """Settings of a ladder: runs to train and measurements to make."""

    recipe: Path
    sizes: tuple[tuple[str, ...], ...]  # changes of the recipe, KEY=VALUE, a tuple for each size
    seconds: tuple[float, ...]  # lengths of the runs
    bits: tuple[float, ...]  # rates at which gaps are measured
    eval_tokens: int | None = None
    calibration_tokens: int = 65536
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Ladder:
    """Measurements of a whole ladder."""

    runs: tuple[Observation, ...]
    gaps: tuple[tuple[float, float], ...]  # bits a weight, gap in bpb
    candidates: tuple[Candidate, ...]  # the sizes, with their seconds a token


def default_sizes(recipe: Path) -> tuple[tuple[str, ...], ...]:
    """Return four widths about the recipe's own. Raises SettingsError for a recipe without a width."""
    model = read_toml(recipe).get("model", {})
    if "model_dim" not in model:
        raise SettingsError(f"{recipe} sets no model.model_dim", hint="name sizes: --size model.model_dim=256")
    width, heads = int(model["model_dim"]), int(model.get("num_heads", 1))
    for unit in (*(math.lcm(each, 2 * heads) for each in UNITS), 2 * heads):
        widths = dict.fromkeys(max(unit, unit * round(width * factor / unit)) for factor in WIDTHS)
        if len(widths) == len(WIDTHS):
            return tuple((f"model.model_dim={each}",) for each in widths)
    raise SettingsError(
        f"{recipe}: model.model_dim {width} of {heads} heads has no four widths about it",
        hint="name sizes: --size model.model_dim=256",
    )


def require_different(settings: LadderSettings) -> None:
    """Raise SettingsError for a change that is none, or for two sizes that are one recipe."""
    seen = dict[str, int]()
    for number, changes in enumerate(settings.sizes, start=1):
        tree = read_toml(settings.recipe)
        for change in changes:
            apply_override(tree, change)
        if (before := seen.setdefault(as_toml(tree), number)) != number:
            raise SettingsError(
                f'size {number}, --size "{" ".join(changes)}", is the same recipe as size {before}: the law would '
                "count its runs twice",
                hint="leave one of the two out",
            )


def climb(settings: LadderSettings, root: Path, train: Train = trained) -> Ladder:
    """Train and measure the whole ladder. Raises what `require_different`, the trainer, scoring and `fit` raise."""
    require_different(settings)
    runs, gaps, candidates = list[Observation](), list[tuple[float, float]](), list[Candidate]()
    for changes in settings.sizes:
        name = ", ".join(change.removeprefix("model.") for change in changes) or "the recipe"
        for seconds in sorted(settings.seconds):
            stage = TrainStage(recipe=str(settings.recipe), set=changes, seconds=seconds)
            checkpoint = train(stage, root, root / "ladder", Asked("plan-size", f"a ladder of sizes: {name}"))
            view, data = checkpoint.load(), DataFolder.open(Path(str(checkpoint.meta["data_dir"])))
            runs.append(observe(name, view, data, settings))
            say(f"{name}, {seconds:g} s: {runs[-1].tokens:,} tokens, bpb {runs[-1].bpb:.5f}")
        gaps += measure_gaps(view, data, settings)  # of the size's longest run
        times = step_time(runs[-len(settings.seconds) :])
        candidates.append(Candidate(name, runs[-1].parameters, num_weights(view), *times))
    return Ladder(tuple(runs), tuple(gaps), tuple(candidates))


def step_time(runs: Sequence[Observation]) -> tuple[float, float]:
    """Return seconds a token and seconds of a run's start, from its shortest and longest run. Raises MismatchError."""
    short, long = runs[0], runs[-1]
    if long.tokens <= short.tokens or long.seconds <= short.seconds:
        raise MismatchError(
            f"{long.size}: runs of {short.seconds:.3g} s and {long.seconds:.3g} s saw {short.tokens:,} and "
            f"{long.tokens:,} tokens, which tells no seconds a token",
            hint="--lengths further apart, and longer than a few steps",
        )
    per_token = (long.seconds - short.seconds) / (long.tokens - short.tokens)
    return per_token, max(0.0, long.seconds - per_token * long.tokens)


def observe(name: str, view: View, data: DataFolder, settings: LadderSettings) -> Observation:
    """Return what a run says: size, tokens, seconds of the schedule's clock, bpb by plain windows."""
    meta = view.checkpoint.meta
    protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=settings.eval_tokens)
    parameters = sum(tensor.numel() for tensor in view.tensors.values())
    seen, seconds = int(meta["tokens_seen"]), float(meta["train_seconds"])
    return Observation(name, parameters, seen, seconds, score(view, data, protocol).bpb)


def num_weights(view: View) -> int:
    """Return the number of a model's weights in matrices, which rounding stores as symbols."""
    return sum(tensor.numel() for tensor in view.tensors.values() if tensor.ndim == 2)


def measure_gaps(view: View, data: DataFolder, settings: LadderSettings) -> list[tuple[float, float]]:
    """Return (bits a weight, gap in bpb) of a model at some rates, all bytes of the artifact counted."""
    calibration, weights = CalibrationSettings(tokens=settings.calibration_tokens), num_weights(view)
    fitter = prepare(view, data, calibration, settings.fit)
    tokens = data.tokens("val", settings.eval_tokens)
    bytes_per_token = float(data.token_bytes("val", tokens).sum()) / len(tokens)
    found = []
    for bits in settings.bits:
        artifact = artifact_at(bits, fitter, weights)
        gap = float(artifact.meta["predicted_nats"]) / math.log(2) / bytes_per_token
        found.append((8 * artifact.num_bytes / weights, gap))
    return found


def artifact_at(bits: float, fitter: Fitter, weights: int) -> PackedArtifact:
    """Return the artifact of so many bits for each of a model's weights.

    Raises SettingsError naming the rate if no artifact has as few, or if so many are nothing to solve.
    """
    try:
        return fit(fitter.view, fitter.data, round(bits * weights / 8), prepared=fitter)
    except (OverBudgetError, SettingsError) as error:
        other = "higher" if isinstance(error, OverBudgetError) else "lower"
        raise SettingsError(f"--bits {bits:g}: {error}", hint=f"--bits with a {other} rate in its place") from error


def recommended(settings: LadderSettings, changes: Sequence[str], seconds: float) -> str:
    """Return the recipe of a size as TOML, trained for so many seconds."""
    tree: dict[str, Any] = read_toml(settings.recipe)
    for change in changes:
        apply_override(tree, change)
    schedule: Mapping[str, Any] = tree.get("schedule", {})
    tree["schedule"] = {**{key: value for key, value in schedule.items() if key != "steps"}, "seconds": seconds}
    return as_toml(tree)
