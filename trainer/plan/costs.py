"""Costs of a run before it starts, for `--dry-run`: parameters by role, FLOPs, peak memory, dollars, artifact bytes.

FLOPs are those of matrix products in the forward and backward pass, 6 for each weight, token and visit, and those of
attention, 12 · dim · context / 2 for a causal one (Kaplan et al. 2020, arXiv 2001.08361). Memory is that of weights,
gradients, moments and averages, and of activations counted as in Korthikanti et al. 2022 (arXiv 2205.05198), of an
attention that stores no scores, in the dtype of the residual stream: for one process, beside the 0.5 GB that Python,
torch and its libraries take (docs/results/train.md compares it with what runs took).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import print_table, say
from pgolf_post.data import DataFolder
from pgolf_post.families import on_no_device
from pgolf_post.fit.forecast import Forecast, bits_left, fitted_bytes, forecast
from pgolf_post.pack.report.size import BUDGET_BYTES, count_code
from pgolf_post.plan import read_plan
from trainer.config import Recipe
from trainer.family import LOOKUPS, GolfGPTFamily
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT
from trainer.model.layers import mlp_widths, with_attention
from trainer.model.visits import visit_list
from trainer.optim.optimizer import num_moments
from trainer.plan.preflight import Finding
from trainer.plan.timeline import Timeline
from trainer.step.expecting_fit import num_curvature
from trainer.step.future_heads import with_heads

FIT = "fit"  # stands for a plan: the artifact fills the budget
DOUBLE_BYTES, FLOAT_BYTES, HALF_BYTES = 8, 4, 2
LEAST_BITS = 1.0  # of a weight: a fit with less keeps little of a model (docs/results/fit.md)
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Wanted:
    """Options of the forecast: the plan, the counted code, the budget, the price of an hour."""

    plan: str | None = None  # a preset, a file, or FIT
    code: tuple[Path, ...] = ()
    budget_bytes: int = BUDGET_BYTES
    dollars_per_hour: float | None = None


@dataclass(frozen=True)
class Costs:
    """The costs of a run."""

    parameters: dict[str, int]  # by role
    tokens: int
    flops: float
    peak_bytes: int  # on this machine
    peak_by_stream: dict[str, int]  # by the dtype of the residual stream
    dollars: float | None
    code_bytes: int
    budget_bytes: int
    artifact: Forecast | None  # under a plan
    artifact_bytes: int | None
    bits_left: float  # of a weight, that the budget leaves
    plan: str | None

    @property
    def headroom_bytes(self) -> int | None:
        """Bytes left under the budget; negative over it, None without a plan."""
        return None if self.artifact_bytes is None else self.budget_bytes - self.code_bytes - self.artifact_bytes

    def facts(self) -> dict[str, Any]:
        """Return the costs as JSON."""
        told = {"parameters": self.parameters, "flops": self.flops, "peak_bytes": self.peak_bytes}
        told |= {"peak_bytes_by_stream": self.peak_by_stream}
        told |= {"dollars": self.dollars, "bits_left": self.bits_left}
        if self.plan is None:
            return told
        sizes = {"plan": self.plan, "predicted_artifact_bytes": self.artifact_bytes, "code_bytes": self.code_bytes}
        return {**told, **sizes, "headroom_bytes": self.headroom_bytes}


def costs_of(timeline: Timeline, wanted: Wanted) -> Costs | None:
    """Return what a run costs; None where the data folder is not here, which decides the vocabulary.

    Raises SettingsError or NotFoundError for a plan or code that cannot be read.
    """
    recipe = timeline.recipe
    if not recipe.data.dir.is_dir():
        return None
    with on_no_device():
        config = recipe.model_config_in(DataFolder.open(recipe.data.dir))
        model = GolfGPT(config, GraphState(active_loops=recipe.model.max_active_loops))
    family = GolfGPTFamily()
    shapes = {name: tensor.detach() for name, tensor in model.named_parameters()}
    roles: dict[str, int] = {}
    for name, tensor in shapes.items():
        roles[family.role(name)] = roles.get(family.role(name), 0) + tensor.numel()
    code_bytes = count_code(wanted.code)
    limit = wanted.budget_bytes - code_bytes
    planned = None if wanted.plan in (None, FIT) else forecast(shapes, family, model, read_plan(str(wanted.plan)))
    by_fit = fitted_bytes(limit) if wanted.plan == FIT else None
    streams = {"fp64": DOUBLE_BYTES} if recipe.run.precision == "fp64" else {"fp32": FLOAT_BYTES, "bf16": HALF_BYTES}
    peaks = {name: peak_bytes(recipe, model, number) for name, number in streams.items()}
    hours, price = timeline.seconds / SECONDS_PER_HOUR, wanted.dollars_per_hour
    return Costs(
        parameters=dict(sorted(roles.items(), key=lambda pair: -pair[1])),
        tokens=timeline.clock.tokens(timeline.clock.end_step),
        flops=run_flops(timeline, shapes),
        peak_bytes=peaks[stream_here(recipe)],
        peak_by_stream=peaks,
        dollars=None if price is None else hours * price,
        code_bytes=code_bytes,
        budget_bytes=wanted.budget_bytes,
        artifact=planned,
        artifact_bytes=planned.artifact_bytes if planned else by_fit,
        bits_left=bits_left(limit, shapes),
        plan=wanted.plan,
    )


def run_flops(timeline: Timeline, shapes: Mapping[str, Tensor]) -> float:
    """Return the FLOPs of a whole run, segment by segment."""
    recipe, total = timeline.recipe, 0.0
    for segment, end in timeline.clock.spans():
        tokens = (end - segment.first_step) * segment.stage.batch_tokens
        total += tokens * token_flops(recipe, shapes, segment.active_loops, segment.stage.seq_len)
        total += tokens * 6.0 * recipe.loss.future_tokens * shapes["tok_emb.weight"].numel()
    if recipe.meta_ttt:  # half of a step's tokens are gone through once for each step of adapting
        total *= 1 + (recipe.meta_ttt.inner_steps - 1) / (2 * recipe.meta_ttt.every)
    return total


def token_flops(recipe: Recipe, shapes: Mapping[str, Tensor], active_loops: int, seq_len: int | None = None) -> float:
    """Return the FLOPs of a token, forward and backward, with so many loops on, in windows of the recipe or others.

    Tables are looked up, so they count only where they are the head's matrix too; gains and mixes are no products.
    """
    family, model = GolfGPTFamily(), recipe.model
    head = "tok_emb.weight" if model.tie_embeddings else "lm_head.weight"
    tables = {f"{path}.weight" for path in LOOKUPS} - {head}
    weights, visited = dict[str, int](), dict[int, int]()
    for name, tensor in shapes.items():
        if family.role(name) != "control" and name not in tables:
            part = name if family.layer(name) is None else part_of(name)
            weights[part] = weights.get(part, 0) + tensor.numel()
    visits, total = visit_list(model, active_loops), sum(n for part, n in weights.items() if family.layer(part) is None)
    for layer in visits:
        revisit = visited.get(layer, 0)
        visited[layer] = revisit + 1
        own = f"override_mlps.{layer}_p{revisit}."
        total += weights.get(f"blocks.{layer}.attn.", 0)
        total += weights.get(own if own in weights else f"blocks.{layer}.mlp.", 0)
    window = seq_len or recipe.data.seq_len
    context = min(window, model.document_cut or window) / 2
    attentions = sum(with_attention(model)[layer] for layer in visits)
    return 6.0 * total + 12.0 * attentions * model.model_dim * context


def part_of(name: str) -> str:
    """Return the attention or the MLP that a block's matrix is part of: "blocks.3.mlp." of its fc and proj."""
    head, rest = name.split(".", 2)[:2], name.split(".", 2)[2]
    return ".".join(head) + "." + (rest.split(".")[0] + "." if head[0] == "blocks" else "")


def stream_here(recipe: Recipe) -> str:
    """Return the dtype of the residual stream where the run is on this machine; on a CPU products alone are bf16."""
    if recipe.run.precision == "fp64":
        return "fp64"
    on_gpu = torch.cuda.is_available() and recipe.run.precision != "fp32" and recipe.run.stream != "fp32"
    return "bf16" if on_gpu or recipe.run.stream == "bf16" else "fp32"


def peak_bytes(
    recipe: Recipe,
    model: GolfGPT,
    number: int,  # bytes of one among the activations
) -> int:
    """Return about the memory of a training process at its peak, without libraries."""
    optim, config = recipe.optim, model.config
    trained = with_heads(recipe, model)
    total = sum(tensor.numel() for tensor in trained.parameters())
    averages = bool(optim.ema_decay) + (optim.swa_start is not None) + len(optim.power_ema_sigmas)
    averages += (recipe.qat is not None) + 2 * (recipe.meta_ttt is not None)  # copies that are put back
    states = total * (2 + averages) + num_moments(trained, optim)  # with weights and gradients
    if recipe.qat and recipe.qat.plan is None:
        states += total + num_curvature(model)  # noise, moments
    exact = max(FLOAT_BYTES, number)  # of weights, and of logits
    visits = visit_list(config, config.max_active_loops)
    hidden = sum(mlp_widths(config)[layer] for layer in visits)
    per_visit = 9 * config.model_dim + 2 * config.num_kv_heads * config.model_dim // config.num_heads
    tokens = recipe.data.micro_batch_tokens or max(stage.batch_tokens for stage in recipe.stages)
    head = (1 + recipe.loss.future_tokens) * config.vocab_size * (2 * exact + number)
    return exact * states + tokens * ((len(visits) * per_visit + 3 * hidden) * number + head)


def check_bytes(costs: Costs) -> Finding | None:
    """Refuse a run whose artifact would be over the budget."""
    headroom, limit = costs.headroom_bytes, costs.budget_bytes - costs.code_bytes
    if headroom is not None and (headroom < 0 or limit < 0):
        return Finding(
            "refuse",
            "model",
            f"artifact of {costs.artifact_bytes:,} bytes and {costs.code_bytes:,} of code: {-headroom:,} over "
            f"the budget of {costs.budget_bytes:,} under plan {costs.plan}; take a smaller model or a coarser plan",
        )
    if costs.plan == FIT and costs.bits_left < LEAST_BITS:
        return Finding(
            "refuse",
            "model",
            f"the budget of {costs.budget_bytes:,} bytes leaves {costs.bits_left:.2f} bits for each weight, fewer than "
            f"{LEAST_BITS:g}: take a smaller model",
        )
    return None


def show_costs(costs: Costs) -> None:
    """Show parameters and bytes by role, then the run's FLOPs, memory, dollars and headroom."""
    total = sum(costs.parameters.values())
    planned = costs.artifact.roles if costs.artifact else {}
    rows = [
        (role, f"{count:,}", f"{count / total:.1%}", f"{planned[role].bytes:,.0f}" if role in planned else "")
        for role, count in costs.parameters.items()
    ]
    header: Sequence[str] = ("role", "parameters", "share", "predicted bytes")
    width = 4 if planned else 3
    print_table(f"{total:,} parameters", header[:width], [row[:width] for row in rows])
    dollars = f", ${costs.dollars:.2f}" if costs.dollars is not None else ""
    peaks = " or ".join(f"{peak / 2**20:,.0f} MiB ({name} stream)" for name, peak in costs.peak_by_stream.items())
    memory = f"about {peaks} at the peak"
    say(f"{costs.tokens:,} tokens, {costs.flops:.3g} FLOPs, {memory}{dollars}")
    if costs.artifact_bytes is not None:
        say(
            f"plan {costs.plan}: about {costs.artifact_bytes:,} bytes of artifact, {costs.code_bytes:,} of code, "
            f"{costs.headroom_bytes:,} left of {costs.budget_bytes:,} ({costs.bits_left:.2f} bits for each weight)"
        )
