"""What a run costs before it starts: counted by hand, and bytes against an artifact that was packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.fit import forecast as forecasts
from pgolf_post.fit.forecast import bits_left, fitted_bytes, forecast
from pgolf_post.pack.container import pack
from pgolf_post.plan import read_plan
from pgolf_post.quantize.model import quantize_view
from tests.conftest import pico_recipe
from trainer.config import Recipe
from trainer.model.architecture import GraphState
from trainer.model.gpt import GolfGPT
from trainer.model.visits import visit_list
from trainer.plan.costs import FIT, Wanted, check_bytes, costs_of, token_flops
from trainer.plan.dry_run import dry_run, require_no_refusal
from trainer.plan.timeline import predict
from trainer.schedule.step_times import StepTimes


@pytest.fixture
def recipe(pico_data: DataFolder, tmp_path: Path) -> Recipe:
    return pico_recipe(pico_data, tmp_path)


def times(recipe: Recipe) -> StepTimes:
    return StepTimes.given(recipe.model, 0.5, 1.0)


def test_parameters_flops_and_dollars_are_those_of_the_model(recipe: Recipe, view: View) -> None:
    costs = costs_of(predict(recipe, times(recipe)), Wanted(dollars_per_hour=7200.0))
    assert costs is not None
    named = dict(view.module.named_parameters())
    assert sum(costs.parameters.values()) == sum(tensor.numel() for tensor in named.values())
    assert costs.dollars == pytest.approx(2 * predict(recipe, times(recipe)).seconds)
    assert costs.artifact_bytes is None

    # a token: 6 for each weight of each visit and of the tied head, 12 · dim · mean context for each attention
    model, loops = recipe.model, recipe.model.max_active_loops
    block = 16 * 16 * 2 + 2 * 16 * 8 + 2 * 16 * 32  # q and proj, k and v, fc and proj
    visits = visit_list(model, loops)
    by_hand = 6 * (320 * 16 + block * len(visits)) + 12 * len(visits) * 16 * 16 / 2
    assert len(visits) == 4
    assert token_flops(recipe, named, loops) == by_hand
    assert token_flops(recipe, named, 0) == by_hand - 6 * block - 12 * 16 * 16 / 2


TABLES = {
    "bigram_buckets": 64,
    "bigram_dim": 8,
    "trigram_buckets": 64,
    "value_embed_layers": (1,),
    "value_embed_dim": 4,
}


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_looked_up_and_count_as_no_product(tied: bool, pico_data: DataFolder, tmp_path: Path) -> None:
    flops = []
    for tables in ({}, TABLES, {"untied_loop_mlps": True}):
        recipe = pico_recipe(pico_data, tmp_path, model={"tie_embeddings": tied, **tables})
        module = GolfGPT(recipe.model_config_in(pico_data), GraphState())
        flops.append(token_flops(recipe, dict(module.named_parameters()), 1))
    assert flops[1] - flops[0] == 6 * (8 * 16 + 4 * 8)  # projections of bigrams and of the value embedding
    assert flops[2] == flops[0]  # a re-visit's own MLP takes the place of the block's


def test_parts_of_layers_and_tables_are_counted(pico_data: DataFolder, tmp_path: Path) -> None:
    tables = {
        "trigram_buckets": 16,
        "trigram_dim": 8,
        "token_type_dim": 4,
        "head_residual_rank": 2,
        "output_bias": "zeros",
    }
    lists = {"mlp_mult": [2.0, 0.0, 1.0], "attn_layers": [0, 1]}
    plain, parted = (
        costs_of(predict(recipe, times(recipe)), Wanted())
        for recipe in (pico_recipe(pico_data, tmp_path), pico_recipe(pico_data, tmp_path, model={**tables, **lists}))
    )
    assert plain is not None
    assert parted is not None
    added = {role: count - plain.parameters.get(role, 0) for role, count in parted.parameters.items()}
    assert added["embedding"] == 16 * 8 + 8 * 4
    assert added["projection"] == 8 * 16 + 4 * 16 + 2 * 2 * 16
    assert added["mlp_fc"] == added["mlp_proj"] == 16 * (32 + 0 + 16) - 3 * 16 * 32
    assert added["q"] == added["attn_proj"] == -16 * 16
    gone = 2 * 16 + 2  # gains of an MLP and of an attention, and its heads'
    assert added["control"] == 320 + 2 - gone  # the bias, and two scales
    assert parted.peak_bytes < plain.peak_bytes


@pytest.mark.parametrize("plan", ["sdclip-1394", "record-1855"])
def test_bytes_of_gaussian_weights_are_foretold(
    plan: str, view: View, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what trained weights take instead of Gaussian ones."""
    monkeypatch.setattr(forecasts, "TRAINED", {})
    generator = torch.Generator().manual_seed(5)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in view.tensors.items()}
    gaussian = replace(view, tensors=drawn)
    packed = len(pack(quantize_view(gaussian, stats, read_plan(plan))))
    told = forecast(drawn, view.family, view.module, read_plan(plan))
    assert told.artifact_bytes == pytest.approx(packed, rel=0.05)  # of 30 KB, 1.5 are overhead
    assert sum(role.weights for role in told.roles.values()) == sum(tensor.numel() for tensor in drawn.values())


def test_a_run_over_the_budget_is_refused_before_it_starts(recipe: Recipe, tmp_path: Path, capsys) -> None:
    code = tmp_path / "train.py"
    code.write_text("x = 1\n")
    timeline = predict(recipe, times(recipe))
    fits = costs_of(timeline, Wanted("sdclip-1394", (code,)))
    assert fits is not None
    assert fits.artifact_bytes is not None
    assert (fits.code_bytes, check_bytes(fits)) == (6, None)
    tight = Wanted("sdclip-1394", (code,), fits.artifact_bytes + 6)
    assert check_bytes(costs_of(timeline, tight)) is None  # type: ignore[arg-type]
    found = dry_run(recipe, times(recipe), wanted=replace(tight, budget_bytes=tight.budget_bytes - 1))
    assert found.findings[0].level == "refuse"
    with pytest.raises(SettingsError, match="cannot act in this run: model"):
        require_no_refusal(found.findings, "recipe")
    assert "1 over the budget of" in capsys.readouterr().err


def test_a_fit_fills_the_budget_and_says_what_a_weight_gets(recipe: Recipe, view: View) -> None:
    timeline = predict(recipe, times(recipe))
    costs = costs_of(timeline, Wanted(FIT, (), 30_000))
    assert costs is not None
    assert costs.artifact_bytes == fitted_bytes(30_000) == 29_000
    assert costs.bits_left == bits_left(30_000, dict(view.module.named_parameters()))
    scarce = costs_of(timeline, Wanted(FIT, (), 2_500))
    assert scarce is not None
    assert check_bytes(scarce) is not None
    with pytest.raises(NotFoundError, match="no plan named 'no-such-plan'"):
        costs_of(timeline, Wanted("no-such-plan"))


def test_activations_count_in_the_dtype_of_the_stream(pico_data: DataFolder, tmp_path: Path) -> None:
    peaks: dict[str, int] = {}
    for precision in ("fp32", "fp64"):
        recipe = pico_recipe(pico_data, tmp_path, run={"precision": precision}, optim={"ema_decay": 0.0})
        costs = costs_of(predict(recipe, times(recipe)), Wanted())
        assert costs is not None
        peaks |= costs.peak_by_stream
        assert costs.peak_bytes == costs.peak_by_stream[precision]
    assert peaks["fp64"] == 2 * peaks["fp32"]
    visits, per_visit, hidden = 4, 9 * 16 + 2 * 8, 32
    activations = 64 * (visits * (per_visit + 3 * hidden) + 320)  # numbers of one micro-batch, half as wide
    assert peaks["fp32"] - peaks["bf16"] == 2 * activations
