"""Heads of later tokens: their nats by hand, trained and resumed with the run, and not part of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, read_tensors
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from tests.trainer.test_model import pico_model
from trainer.config import Recipe
from trainer.optim.optimizer import assign_groups
from trainer.plan.costs import Wanted, costs_of
from trainer.plan.disk import disk_need
from trainer.plan.dry_run import dry_run
from trainer.plan.timeline import predict
from trainer.run.loop import Trainer
from trainer.schedule.step_times import StepTimes
from trainer.step import compiled
from trainer.step.compiled import num_compiled_graphs
from trainer.step.future_heads import FutureHeads, WithHeads
from trainer.step.loss import LossSettings

LATER: dict[str, Any] = {"future_tokens": 2, "future_weight": 0.5}
BRIEF: dict[str, Any] = {"phases": ("final",), "fractions": (), "metric_tokens": 40}


def trainer(folder: DataFolder, root: Path, /, **tables: dict[str, Any]) -> Trainer:
    return Trainer(pico_recipe(folder, root, **{"checkpoint": BRIEF, "loss": LATER, **tables}))


def nats_by_hand(hidden: np.ndarray, targets: np.ndarray, weights: list[np.ndarray], cap: float) -> float:
    """A window, a position and a head at a time."""
    means = []
    for ahead, weight in enumerate(weights, start=1):
        found = []
        for window, y in zip(hidden, targets, strict=True):
            for place in range(len(window) - ahead):
                logits = cap * np.tanh(weight @ window[place] / cap)
                found.append(np.log(np.exp(logits).sum()) - logits[y[place + ahead]])
        means.append(np.mean(found))
    return float(np.mean(means))


def test_nats_are_those_of_the_tokens_further_on() -> None:
    model = pico_model(logit_softcap=3.0).double()
    heads = FutureHeads(model, 3)
    hidden = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
    assert float(heads.nats(hidden, targets).detach()) == pytest.approx(np.log(50))  # they start at zero
    for weight in heads.weights:
        torch.nn.init.normal_(weight)
    matrices = [weight.detach().numpy() for weight in heads.weights]
    wanted = nats_by_hand(hidden.numpy(), targets.numpy(), matrices, 3.0)
    assert float(heads.nats(hidden, targets).detach()) == pytest.approx(wanted, rel=1e-12)


def test_the_objective_has_them_and_the_trunk_their_gradient_in_one_compiled_graph(
    pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    found, before = [], num_compiled_graphs()
    for compile_it in (False, True):
        run = trainer(pico_data, tmp_path, run={"compile": compile_it, "precision": "fp64"}, schedule={"loops_at": 1.0})
        heads, (batch,) = run.state.heads, run.sampler.step_batches(0, 4, 4)
        assert heads is not None
        for scale in (0.0, 1.0):  # what a step does to the heads is seen
            for weight in heads.weights:
                torch.nn.init.normal_(weight, std=0.3 * scale, generator=torch.Generator().manual_seed(2))
            run.state.clear_gradients()
            nats = float(run.gradients.accumulate([batch]))
            hidden = run.model.hidden(batch[0], run.model.reach(batch[0])).detach()
            later = nats_by_hand(
                hidden.numpy(),
                batch[1].numpy(),
                [w.detach().numpy() for w in heads.weights],
                run.model.config.logit_softcap,
            )
            assert run.gradients.objective_share is not None
            assert float(run.gradients.objective_share) == pytest.approx(nats + 0.5 * later, rel=1e-9)
            found.append(run.model.tok_emb.weight.grad.clone())  # type: ignore[union-attr]
            assert all(weight.grad is not None for weight in heads.weights)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[2:], found[:2])
    assert num_compiled_graphs() == before + 1


def test_they_step_as_matrices_under_names_of_their_own() -> None:
    model = pico_model()
    groups = assign_groups(WithHeads(model, FutureHeads(model, 2)))
    plain = assign_groups(model)
    assert groups["matrix"] == [*plain["matrix"], "future.0.weight", "future.1.weight"]
    assert {**groups, "matrix": plain["matrix"]} == plain


@pytest.mark.slow
@pytest.mark.parametrize("tables", [{}, {"meta_ttt": {"every": 2, "inner_lr": 0.01}, "run": {"warmup_steps": 1}}])
def test_a_run_resumes_exactly_and_its_model_has_none(
    tables: dict[str, Any], pico_data: DataFolder, pico_run: Path, tmp_path: Path
) -> None:
    checkpoint = {**BRIEF, "steps": [5]}
    whole = trainer(pico_data, tmp_path / "whole", checkpoint=checkpoint, **tables).run()
    middle = next((tmp_path / "whole" / "pico").glob("step_000005-*"))
    state = read_tensors(middle / TRAINING_FILE)
    assert state["future.1.weight"].shape == (320, 16)
    assert state["future.1.weight"].any()
    assert "momentum.future.1.weight" in state
    plain = Checkpoint.open(pico_run / "latest")
    for view in ("raw", "ema"):
        assert whole.load(view).tensors.keys() == plain.load(view).tensors.keys()
    assert whole.config["model"] == plain.config["model"]
    resumed = trainer(pico_data, tmp_path / "resumed", checkpoint=checkpoint, **tables)
    resumed.resume(middle)
    assert resumed.run().view_id("raw") == whole.view_id("raw") != plain.view_id("raw")
    ends = [read_tensors(run.path / TRAINING_FILE) for run in (whole, Checkpoint.open(tmp_path / "resumed" / "latest"))]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    without = trainer(pico_data, tmp_path / "without", loss={"z_loss": 1e-4})
    without.resume(middle)  # heads may be dropped on the way too
    assert without.state.heads is None
    with pytest.raises(SettingsError, match=r"lacks momentum.future.0.weight, momentum.future.1.weight"):
        trainer(pico_data, tmp_path / "begun").resume(next(pico_run.glob("pico/*frac75")))


@pytest.mark.long  # processes of torchrun
def test_two_processes_are_one_process(pico_data: DataFolder, tmp_path: Path) -> None:
    tree = recipe_of(tmp_path / "one", pico_data, "fp64").model_dump(exclude_none=True)
    one = Trainer(Recipe.model_validate({**tree, "loss": LATER})).run()
    words = [word for key, value in LATER.items() for word in ("--set", f"loss.{key}={value}")]
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64"), *words)
    assert farthest(one, two) < 1e-9


def test_what_cannot_act_is_refused_and_costs_are_counted(pico_data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"future_weight 0.5 acts only with future_tokens"):
        LossSettings(future_weight=0.5)
    short = pico_recipe(pico_data, tmp_path, loss=LATER, data={"seq_len": 2})
    with pytest.raises(SettingsError, match=r"loss.future_tokens 2: windows of 2 tokens have no token so far ahead"):
        dry_run(short, StepTimes(0.5, 1.0, "given"))
    recipes = [pico_recipe(pico_data, tmp_path), pico_recipe(pico_data, tmp_path, loss=LATER)]
    lines = [predict(recipe, StepTimes(0.5, 1.0, "given")) for recipe in recipes]
    plain, ours = (costs_of(line, Wanted()) for line in lines)
    less, more = map(disk_need, lines)
    assert plain is not None
    assert ours is not None
    assert less is not None
    assert more is not None
    assert ours.flops - plain.flops == 12 * 64 * 6 * 2 * 320 * 16
    assert ours.parameters == plain.parameters
    assert ours.peak_bytes > plain.peak_bytes
    num_folders = lines[0].num_checkpoints
    assert more.checkpoints - less.checkpoints == num_folders * 2 * 2 * 320 * 16 * 4  # weights and momenta
