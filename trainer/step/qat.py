"""Quantization-aware training: late steps see the weights as a plan will round them, on that plan's own grid.

What is trained is still the float weights. For the forward and backward passes of a step they are exchanged for what
the plan's grid makes of them, and are put back before the optimizer steps; so gradients are those at the rounded
weights, handed straight through (Bengio et al. 2013, arXiv:1308.3432). Steps Δ come from the weights of the moment, by
the code that `requant` uses. With `mode = "noise"` the weights get uniform noise within ± Δ/2 instead (Fan et al. 2020,
arXiv:2004.07320, in the sense of Baskin et al. 2018, arXiv:1804.10969), drawn by seed and step, the same on every rank.
What `fit` will do follows no plan's grid: modes "fit" and "rate" are `trainer.step.expecting_fit`.

The exchange happens outside the loss, in place, once a step: a compiled graph reads its weights as inputs, so it can
not have kept others, and nothing is compiled again. It costs a rounding of all weights a step and one copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.plan import Plan, TensorPlan, make_plan, read_plan
from pgolf_post.quantize.clip import grid_steps, max_symbol
from pgolf_post.quantize.rounding import spread_steps
from pgolf_post.quantize.rows import as_matrix
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.rules import GridRule, KeepRule
from pgolf_post.settings import canonical_json
from trainer.config import Recipe
from trainer.family import GolfGPTFamily
from trainer.model.gpt import GolfGPT
from trainer.step.distributed import SINGLE_PROCESS, TrainingRanks
from trainer.step.expecting_fit import FitExpectation, require_whole_gradients
from trainer.step.qat_settings import QatSettings

Batches = Iterable[tuple[Tensor, Tensor]]  # inputs and targets, each (windows, seq_len)
STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


class WeightRounding:
    """The exchange of a model's weights for rounded or noisy ones, step by step."""

    def __init__(self, model: GolfGPT, settings: QatSettings, seed: int) -> None:
        """Plan every tensor. Raises NotFoundError or SettingsError for a plan that is unknown, or has no such grid."""
        assert settings.plan is not None
        plan = read_plan(settings.plan)
        _require_scalar_grids(plan)
        self.settings, self.seed = settings, seed
        self.parameters = dict(model.named_parameters())
        self.entries = _entries(model, plan)
        self.facts = {
            **settings.model_dump(mode="json", include={"at", "plan", "mode"}),
            "plan_sha256": sha256(canonical_json(plan.identity())).hexdigest(),
            "left_out": left_out(plan),
        }

    @contextmanager
    def during(self, step: int, at: float) -> Iterator[None]:
        """Exchange the weights inside the block, from the settings' progress on; afterwards they are as before."""
        if at < self.settings.at:
            yield
            return
        with torch.no_grad():
            kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            for name, tensor in self.exchanged(step).items():
                self.parameters[name].copy_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    self.parameters[name].copy_(tensor)

    def exchanged(self, step: int) -> dict[str, Tensor]:
        """Return the tensors that step `step` (counted from 0) sees in place of the model's own."""
        if self.settings.mode == "round":
            return {entry.name: rounded(entry, self.parameters[entry.name].detach()) for entry in self.entries}
        seeds = np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)
        generators: dict[torch.device, torch.Generator] = {}
        noisy = {}
        for entry in self.entries:
            weight = self.parameters[entry.name].detach()
            if isinstance(entry.rule, GridRule):
                if weight.device not in generators:
                    generators[weight.device] = torch.Generator(weight.device).manual_seed(int(seeds[0] >> 1))
                noisy[entry.name] = with_noise(entry, weight, generators[weight.device])
        return noisy

    def batches(self, batches: Batches, *_: Any) -> Batches:
        """Return the micro-batches of a step as they are: all of them see the same weights."""
        return batches

    def after_backward(self, *_: Any) -> None:
        """Leave the gradients as they are."""

    def acts(self, at: float) -> bool:
        """Return whether a step from this progress sees other weights."""
        return at >= self.settings.at

    def now(self) -> dict[str, Any]:
        """Return for meta.json what changes on the way: nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs: nothing."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` returned."""

    def in_words(self) -> str:
        """Return in one line what the steps see."""
        settings, names = self.settings, self.facts["left_out"]
        count = sum(isinstance(entry.rule, GridRule) for entry in self.entries)
        seen = "rounded to the grid" if settings.mode == "round" else "with noise of one step"
        without = f", without its {', '.join(names)}" if names else ""
        return f"from progress {settings.at:g} on {count} tensors are {seen} of plan {settings.plan}{without}"


Rounding = WeightRounding | FitExpectation


def rounding_of(recipe: Recipe, model: GolfGPT, ranks: TrainingRanks = SINGLE_PROCESS) -> Rounding | None:
    """Return what a recipe's steps see of later rounding; None where that is off.

    Raises NotFoundError or SettingsError for a plan that is unknown or has no such grid, and for what cannot act.
    """
    settings = recipe.qat
    if settings is None:
        return None
    if settings.plan is not None:
        return WeightRounding(model, settings, recipe.run.seed)
    require_whole_gradients(recipe.meta_ttt is not None)
    return FitExpectation(model, settings, recipe.run.seed, ranks)


def _entries(model: GolfGPT, plan: Plan) -> list[TensorPlan]:
    """Return the plan's entries for the model as it ends, all loops on: sites and depths depend on them."""
    graph = model.graph
    model.set_graph(graph.model_copy(update={"active_loops": model.config.max_active_loops}))
    try:
        return make_plan(dict(model.named_parameters()), GolfGPTFamily(), model, plan)
    finally:
        model.set_graph(graph)


def steps_of(entry: TensorPlan, weight: Tensor) -> Tensor:  # (rows, columns) → (rows, 1) or (rows, columns)
    """Return the steps that the entry's rule gives a matrix by its weights alone, float32."""
    assert isinstance(entry.rule, GridRule)
    return spread_steps(grid_steps(entry.name, weight, entry.rule.without_hessian(), entry.clip), weight)


def rounded(entry: TensorPlan, weight: Tensor) -> Tensor:  # any shape → the same
    """Return a tensor as an artifact of the plan would decode it, rounded to nearest; kept ones in 16 bits."""
    if isinstance(entry.rule, KeepRule):
        return weight.to(STORED[entry.rule.dtype]).to(weight.dtype)
    assert isinstance(entry.rule, GridRule)
    matrix = as_matrix(weight.float())
    steps = steps_of(entry, matrix)
    symbols = round_to_nearest(matrix, steps, max_symbol(entry.rule.bits))
    return (symbols * steps).reshape(weight.shape).to(weight.dtype)


def with_noise(entry: TensorPlan, weight: Tensor, generator: torch.Generator) -> Tensor:  # any shape → the same
    """Return a tensor with noise that is uniform within ± half a step."""
    matrix = as_matrix(weight.float())
    uniform = torch.rand(matrix.shape, generator=generator, device=matrix.device)
    return (matrix + (uniform - 0.5) * steps_of(entry, matrix)).reshape(weight.shape).to(weight.dtype)


def left_out(plan: Plan) -> list[str]:
    """Return what of a plan reads statistics or errors that training does not have; the steps are those without it."""
    found = ["lqer"] if plan.lqer is not None and plan.lqer.top_k else []
    for key in ("hessian_lambda", "awq_alpha"):
        found += [key] if any(getattr(rule, key, 0) for rule in plan.rules) else []
    return found


def _require_scalar_grids(plan: Plan) -> None:
    """Raise SettingsError for rules whose values are not known before rounding: a trellis, pruning."""
    for rule in plan.rules:
        for key, off in (("trellis_states", 0), ("prune", "none")):
            if getattr(rule, key, off) != off:
                raise SettingsError(
                    f"qat.plan {plan.name}: rule {rule.name!r} has {key} = {getattr(rule, key)!r}; training can meet a "
                    "scalar grid alone",
                    hint=f"copy the plan to a file without {key} and name that",
                )


def facts_of(rounding: Rounding | None) -> dict[str, Any]:
    """Return what meta.json says of it; nothing where it is off."""
    return {} if rounding is None else {"qat": rounding.facts}
