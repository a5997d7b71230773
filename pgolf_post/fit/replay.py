"""Rounding block by block, with fine-tuning in between: matrices not rounded yet make up for those that are.

GPTQ feeds the error of a column into later columns of its matrix, and from both sides into later rows. Here it goes
into later matrices: blocks are rounded in the order of the forward pass, and between two of them everything that is
still float is tuned (tune.py), as far as held-out text agrees (shrink.py). Gains, mixes and gates are never rounded;
once all blocks are, they are tuned alone. (QuIP#, arXiv 2402.04396, tunes the rest of a block like this, against the
block's own output.) Parameters outside the blocks (embedding, head, projections) are rounded with the first. No byte is
spent: the same steps round other weights.

Bytes come out slightly different than without tuning, so c of the blocks that remain follows the bytes of those that
are done, and the last block's c is searched until the artifact fills its budget again.

Where an earlier attempt was interrupted, its weights are read back (tune_partial.py) and rounding is replayed from
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.base.ranks import ALONE, Ranks
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.families import load_module
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.probe import Probe, decoded
from pgolf_post.fit.shrink import agreed_share, part_of_way
from pgolf_post.fit.solve import WINDOW_BYTES, Build, Search, Solution
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune import TunedModel, learning_rates
from pgolf_post.fit.tune_partial import Done, TunePartial
from pgolf_post.fit.tune_ranks import SharedTuning
from pgolf_post.pack.container import pack
from pgolf_post.quantize.distill import to_stored
from pgolf_post.quantize.sequential import blocks_in_order
from pgolf_post.quantize.tensor import QuantizedTensor

STEP_NAME = "fine-tuning"  # on the training clock
LAST_BUILDS = 8
LARGEST_STEP = 0.5  # octaves of c


def groups_in_order(view: View, names: Sequence[str]) -> list[list[str]]:
    """Return matrices in the order in which they are rounded: block by block, the others with the first."""
    module = load_module(view.config, view.tensors, str(view))
    blocks = blocks_in_order(module, view.family)
    groups = [[name for site in sites for name in site.tensors if name in names] for _, sites in blocks]
    inside = {name for group in groups for name in group}
    others = [name for name in names if name not in inside]
    first, *rest = [group for group in groups if group] or [[]]
    return [others + first, *rest]


def fine_tuned(
    builder: Builder,
    search: Search,
    solution: Solution,  # without fine-tuning
    limit: int,  # bytes
    texts: tuple[CalibrationSet, CalibrationSet],  # to tune on, and held out
    tokens: int,
    clock: TrainingClock,
    partial: TunePartial,
    ranks: Ranks = ALONE,  # that tune together
) -> Solution | None:
    """Build the solution again with fine-tuning between its blocks; None, said aloud, if that does not fit the limit.

    Raises NumericsError if predictions are not finite.
    """
    groups = groups_in_order(builder.view, list(builder.matrices))
    floats = _tuned_floats(builder)
    stages = len(groups) if floats else len(groups) - 1
    tuned = _tuned_model(builder, texts[0], tokens // max(1, stages), ranks)
    tuned.load(builder.zeros, list(builder.zeros))
    stage = Stage(tuned, floats, Probe(builder.view, texts[1]) if floats else None)
    unpredicted = len(solution.data) - search.predictor.predict_bytes(solution.model)  # bytes it does not see

    # What an interrupted attempt came to.
    before = partial.resume()
    spent_seconds = before.seconds

    rounded: dict[str, QuantizedTensor] = {}
    targets: dict[str, Tensor] = {}  # the weights that were rounded
    constant = solution.constant
    for number, names in enumerate(groups[:-1]):
        # Round this block as tuning left it, and put it into the model.
        targets |= {name: before.weights[name] for name in names} if number < before.blocks else tuned.weights(names)
        constants = constants_of(names, constant, search.kappa)
        rounded |= builder.quantize(constants, {name: targets[name] for name in names})
        tuned.load(rounded, names)

        # The blocks that remain take what bytes are left.
        rest = [name for group in groups[number + 1 :] for name in group]
        model = builder.model({**solution.model.quantized, **rounded})
        excess = search.predictor.predict_bytes(model) + unpredicted - _aim(limit)
        constant = solution.constant * 2 ** _octaves(excess, builder, rest)

        # Tune them, unless that was done before.
        if number < before.blocks:
            tuned.skip({name: before.weights[name] for name in (*rest, *floats)})
            continue
        with clock.step(STEP_NAME) as step:
            step.add(spent_seconds)
            rates = learning_rates(builder, constants_of(rest, constant, search.kappa))
            stage.run(rates, f"{number + 1} of {len(groups)}", {**builder.zeros, **rounded})
        spent_seconds = clock.seconds[STEP_NAME]
        partial.save(Done(number + 1, spent_seconds, {**targets, **tuned.weights([*rest, *floats])}))

    # The last block fills the budget. Then the floats make up for it.
    kept = _stored(builder, tuned.weights(floats))
    finished = _finished(builder, search, solution, rounded, tuned.weights(groups[-1]), kept, constant, limit)
    if finished is None or not floats:
        return finished
    tuned.load(finished.model.quantized, groups[-1])
    with clock.step(STEP_NAME) as step:
        step.add(spent_seconds)
        stage.run({}, f"{len(groups)} of {len(groups)}", finished.model.quantized)
    return _with_floats(builder, search, finished, _stored(builder, tuned.weights(floats)), limit)


@dataclass(frozen=True)
class Stage:
    """Fine-tuning between two roundings, or after the last, and back as far as held-out text wants it."""

    tuned: TunedModel
    floats: Sequence[str]
    probe: Probe | None  # of held-out text; None: all of the way, as Adam did before

    def run(self, rates: Mapping[str, float], label: str, rounded: Mapping[str, QuantizedTensor]) -> None:
        """Tune some matrices and the floats beside those that are rounded. Raises NumericsError as `tune` does."""
        names = [*rates, *self.floats]
        before = self.tuned.weights(names)
        self.tuned.tune(rates, label, self.floats)
        if self.probe is None:
            return
        after = self.tuned.weights(names)
        share = agreed_share(self.probe, decoded(rounded), before, after)
        say(f"{share:.2f} of the way is kept")
        self.tuned.put(part_of_way(before, after, share))


def _tuned_floats(builder: Builder) -> list[str]:
    """Return the parameters that stay float and are tuned: Adam alone, as it was before, tunes none."""
    if builder.settings.tune_optimizer == "adam":
        return []
    return [name for name, _ in builder.view.module.named_parameters() if name in builder.passthrough]


def _stored(builder: Builder, floats: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return floats as the artifact stores them. Raises NumericsError if it cannot."""
    return {name: to_stored(name, values, builder.passthrough[name]) for name, values in floats.items()}


def _with_floats(
    builder: Builder, search: Search, solution: Solution, floats: Mapping[str, np.ndarray], limit: int
) -> Solution:
    """Return the solution with other floats, or as it is, said aloud, if that does not fit."""
    model = builder.model(solution.model.quantized, floats)
    data = pack(model, search.packing)
    if len(data) > limit:
        say(f"floats tuned after the last block do not fit: {len(data):,} of {limit:,} bytes; those before it stay")
        return solution
    return replace(solution, model=model, data=data)


def _tuned_model(builder: Builder, text: CalibrationSet, tokens_between: int, ranks: Ranks) -> TunedModel:
    view, precision = builder.view, builder.settings.tune_precision
    roots = builder.roots if builder.settings.tune_optimizer == "preconditioned" else None
    if ranks.world_size > 1:
        return SharedTuning(view, text, tokens_between, precision, ranks, roots)
    return TunedModel(view, text, tokens_between, precision, roots=roots)


def _finished(
    builder: Builder,
    search: Search,
    solution: Solution,
    rounded: Mapping[str, QuantizedTensor],
    weights: Mapping[str, Tensor],  # of the last block
    floats: Mapping[str, np.ndarray],  # that were tuned, as stored
    constant: float,
    limit: int,
) -> Solution | None:
    """Round the last block at the c for which everything fits."""
    best: Solution | None = None
    builds: list[Build] = []
    for _ in range(LAST_BUILDS):
        last = builder.quantize(constants_of(weights, constant, search.kappa), weights)
        model = builder.model({**rounded, **last}, floats)
        data = pack(model, search.packing)
        builds.append(Build(constant, len(data), True, builder.settings.trellis_states))
        if len(data) <= limit and (best is None or len(data) > len(best.data)):
            best = replace(solution, model=model, data=data)
        if best is not None and len(best.data) >= limit - WINDOW_BYTES:
            break
        constant *= 2 ** _octaves(len(data) - _aim(limit), builder, list(weights))
    if best is None:
        smallest = min(build.num_bytes for build in builds)
        say(f"fine-tuned blocks do not fit: {smallest:,} of {limit:,} bytes; the untuned ones stay")
        return None
    return replace(best, builds=(*solution.builds, *builds))


def _aim(limit: int) -> float:
    return limit - WINDOW_BYTES / 2


def _octaves(excess: float, builder: Builder, names: Sequence[str]) -> float:
    """Return by how much c must rise for some matrices to lose so many bytes: N/8 bytes an octave."""
    weights = sum(builder.matrices[name].num_weights for name in names)
    return max(-LARGEST_STEP, min(LARGEST_STEP, 8 * excess / weights))
