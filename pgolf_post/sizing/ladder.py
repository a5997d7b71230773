"""The ladder: short runs of some sizes at some lengths, and what rounding costs at some rates.

A size is a list of changes of the recipe, and so is a variant: what costs bytes but is no width or depth, such as a
table of n-grams or another vocabulary. Every size is trained in the recipe as it is and in each variant. Runs are the
sweep's own trainings: those that are there are found, and those that were killed go on. Before the first of them the
trainer reads every recipe (recipes.py). Every number is measured by the toolkit: bpb by plain windows over the same
text (text.py), seconds by the schedule's clock, gaps as `fit` predicts them with its measured κ.
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
from pgolf_post.fit.build import rounded_names
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.stage import score
from pgolf_post.settings import apply_override, read_toml
from pgolf_post.sizing.choose import Candidate
from pgolf_post.sizing.law import Observation
from pgolf_post.sizing.recipes import require_trainable
from pgolf_post.sizing.text import Text, Texts
from pgolf_post.sweep.train_stage import TrainStage
from pgolf_post.sweep.trainer_process import Asked, as_toml
from pgolf_post.sweep.training import trained

WIDTHS = (0.5, 0.75, 1.0, 1.25)  # of the recipe's, where no sizes are named
UNITS = (64, 32, 16, 8)  # widths are multiples of the first, and of the heads, by which four widths differ

Train = Callable[[TrainStage, Path, Path, Asked], Checkpoint]
Check = Callable[[Path, Sequence[Sequence[str]], Sequence[Sequence[str]], int | None, Path], Texts]


@dataclass(frozen=True)
class LadderSettings:
    """Settings of a ladder: runs to train and measurements to make."""

    recipe: Path
    sizes: tuple[tuple[str, ...], ...]  # changes of the recipe, KEY=VALUE, a tuple for each size
    seconds: tuple[float, ...]  # lengths of the runs
    bits: tuple[float, ...]  # rates at which gaps are measured
    eval_tokens: int | None = None  # in the recipe's own vocabulary; others read the same text
    calibration_tokens: int = 65536
    fit: FitSettings = field(default_factory=FitSettings)
    tried: tuple[tuple[str, ...], ...] = ()  # variants of the recipe beside itself, KEY=VALUE, a tuple for each

    @property
    def trees(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Changes of every recipe by the names of its size and variant; of each size, the recipe as it is first."""
        return {
            (name_of(size), name_of(variant)): (*size, *variant) for size in self.sizes for variant in ((), *self.tried)
        }


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


def name_of(changes: Sequence[str]) -> str:
    """Return changes of the recipe in short."""
    return ", ".join(change.removeprefix("model.") for change in changes) or "the recipe"


def climb(settings: LadderSettings, root: Path, train: Train = trained, check: Check = require_trainable) -> Ladder:
    """Train and measure the whole ladder.

    Raises what reading the recipes and the texts raises before anything is trained, then what the trainer, scoring and
    `fit` raise.
    """
    texts = check(settings.recipe, settings.sizes, settings.tried, settings.eval_tokens, root / "ladder")
    runs, gaps, candidates = list[Observation](), list[tuple[float, float]](), list[Candidate]()
    for (size, variant), changes in settings.trees.items():
        name = size if variant == name_of(()) else f"{size}, {variant}"
        own = list[Observation]()
        for seconds in sorted(settings.seconds):
            stage = TrainStage(recipe=str(settings.recipe), set=changes, seconds=seconds)
            checkpoint = train(stage, root, root / "ladder", Asked("plan-size", f"a ladder of sizes: {name}"))
            view, data = checkpoint.load(), DataFolder.open(Path(str(checkpoint.meta["data_dir"])))
            text = texts.of(data)
            base = next((run.parameters for run in runs if run.size == size), None)
            own.append(observe(view, data, text, size=size, variant=variant, base=base))
            runs.append(own[-1])
            say(f"{name}, {seconds:g} s: {own[-1].tokens:,} tokens, bpb {own[-1].bpb:.5f}")
        gaps += measure_gaps(view, data, settings, text.eval_tokens)  # of the size's longest run
        weights, times = (num_weights(view), num_parameters(view)), step_time(own)
        candidates.append(
            Candidate(name, own[-1].parameters, weights[0], *times, variant, text.token_bytes, weights[1])
        )
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


def observe(view: View, data: DataFolder, text: Text, size: str, variant: str, base: int | None) -> Observation:
    """Return what a run says: size, tokens, seconds of the schedule's clock, bpb by plain windows.

    `base` is the number of parameters of the size in the recipe as it is; None: this run is of it.
    """
    meta = view.checkpoint.meta
    protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=text.eval_tokens)
    seen, seconds = int(meta["tokens_seen"]), float(meta["train_seconds"])
    parameters = num_parameters(view) if base is None else base
    return Observation(size, parameters, seen, seconds, score(view, data, protocol).bpb, variant, text.token_bytes)


def num_parameters(view: View) -> int:
    """Return the number of a model's parameters."""
    return sum(tensor.numel() for tensor in view.tensors.values())


def num_weights(view: View) -> int:
    """Return the number of a model's weights that rounding stores as symbols: those of linear maps and lookup tables.

    Gains and mixes are floats in an artifact, though some are matrices by shape.
    """
    return sum(view.tensors[name].numel() for name in rounded_names(view))


def measure_gaps(
    view: View, data: DataFolder, settings: LadderSettings, eval_tokens: int | None = None
) -> list[tuple[float, float]]:
    """Return (bits a weight, gap in bpb) of a model at some rates, all bytes of the artifact counted."""
    calibration, weights = CalibrationSettings(tokens=settings.calibration_tokens), num_weights(view)
    fitter = prepare(view, data, calibration, settings.fit)
    tokens = data.tokens("val", eval_tokens or settings.eval_tokens)
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
