"""Steps that adapt first: their gradient is that of the adapted weights, worked by hand, and nothing else changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from pgolf_post.submit.makeable import require_makeable
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from trainer.config import Recipe
from trainer.model.gpt import GolfGPT
from trainer.plan.costs import Wanted, costs_of
from trainer.plan.dry_run import dry_run
from trainer.plan.timeline import predict
from trainer.run.loop import Trainer
from trainer.schedule.step_times import StepTimes
from trainer.step import compiled
from trainer.step.compiled import num_compiled_graphs, training_loss

BRIEF: dict[str, Any] = {"phases": ("final",), "fractions": (), "metric_tokens": 40}
ADAPTING = {"every": 3, "inner_lr": 0.05, "inner_steps": 2}


def trainer(data: DataFolder, root: Path, /, **tables: dict[str, Any]) -> Trainer:
    return Trainer(pico_recipe(data, root, **{"checkpoint": BRIEF, "meta_ttt": ADAPTING, **tables}))


def by_hand(model: GolfGPT, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradients of the second half of some windows at weights that took two steps on the first."""
    adapted, half = copy.deepcopy(model), len(inputs) // 2
    for _ in range(2):
        adapted.zero_grad()
        training_loss(adapted, inputs[:half], targets[:half], adapted.reach(inputs[:half])).backward()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    adapted.zero_grad()
    training_loss(adapted, inputs[half:], targets[half:], adapted.reach(inputs[half:])).backward()
    return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("windows", [4, 2])  # one micro-batch, or two
def test_the_gradient_is_that_after_adapting_and_the_weights_are_as_before(
    windows: int, pico_data: DataFolder, tmp_path: Path
) -> None:
    run = trainer(pico_data, tmp_path, data={"micro_batch_tokens": 16 * windows}, run={"precision": "fp64"})
    for block in run.model.blocks:  # projections that start at 0 let no gradient through
        torch.nn.init.normal_(block.mlp.proj.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    batches = list(run.sampler.step_batches(0, 4, windows))
    wanted = [by_hand(run.model, *batch) for batch in batches]
    assert run.meta_ttt is not None
    nats = float(run.meta_ttt.accumulate(batches))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if name in wanted[0]:
            mean = torch.stack([each[name] for each in wanted]).mean(0)
            torch.testing.assert_close(parameter.grad, mean, rtol=1e-9, atol=1e-12)
    halves = [(inputs[: windows // 2], targets[: windows // 2]) for inputs, targets in batches]
    plain = [float(training_loss(run.model, x, y, run.model.reach(x)).detach()) for x, y in halves]
    assert nats == pytest.approx(sum(plain) / len(plain))
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.model.zero_grad(set_to_none=True)
    run.gradients.accumulate(batches)
    name = "blocks.0.mlp.fc.weight"
    assert not torch.allclose(gradients[name], run.model.get_parameter(name).grad, rtol=1e-3)  # type: ignore[arg-type]


def test_an_objective_is_adapted_to_and_logged_beside_its_nats(pico_data: DataFolder, tmp_path: Path) -> None:
    run = trainer(pico_data, tmp_path, loss={"z_loss": 0.01})
    assert run.meta_ttt is not None
    nats = float(run.meta_ttt.accumulate(run.sampler.step_batches(0, 4, 4)))
    assert float(run.gradients.objective_share) > nats > 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_is_as_without_it_until_the_first_such_step_and_resumes_exactly(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path
) -> None:
    checkpoint = {**BRIEF, "steps": [4]}
    whole = trainer(pico_data, tmp_path / "whole", checkpoint=checkpoint).run()
    logs = [root / "pico" / "train.jsonl" for root in (pico_run, tmp_path / "whole")]
    plain, ours = ([json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs)
    assert plain[:2] == ours[:2]
    assert plain[3:] != ours[3:]
    assert whole.meta["recipe"]["meta_ttt"] == ADAPTING
    resumed = trainer(pico_data, tmp_path / "resumed", checkpoint=checkpoint)
    resumed.resume(next((tmp_path / "whole" / "pico").glob("step_000004-*")))
    assert resumed.run().view_id("raw") == whole.view_id("raw")
    off = trainer(pico_data, tmp_path / "off", meta_ttt={**ADAPTING, "every": 13}).run()
    assert off.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")


@pytest.mark.slow
def test_the_warm_up_compiles_the_halves_too(
    pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    model = {"num_layers": 1, "xsa_last_n": 1, "loop_start": 0, "loop_end": 0, "num_loops": 0}
    before = num_compiled_graphs()
    run = trainer(pico_data, tmp_path, run={"compile": True, "warmup_steps": 1}, model=model).run()
    assert run.meta["warm_up"]["compiled_graphs"] == num_compiled_graphs() == before + 2


@pytest.mark.long  # processes of torchrun
def test_two_processes_are_one_process(pico_data: DataFolder, tmp_path: Path) -> None:
    sizes = {"batch_tokens": 128, "micro_batch_tokens": 32}
    tree = recipe_of(tmp_path / "one", pico_data, "fp64", data=sizes).model_dump(exclude_none=True)
    one = Trainer(Recipe.model_validate({**tree, "meta_ttt": ADAPTING})).run()
    words = [word for key, value in ADAPTING.items() for word in ("--set", f"meta_ttt.{key}={value}")]
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64", data=sizes), *words)
    assert farthest(one, two) < 1e-9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"every": 0}, "meta_ttt.every = 0: .*greater than or equal to 1"),
        ({"inner_lr": 0.0}, "meta_ttt.inner_lr = 0.0: .*greater than 0"),
        ({"inner_steps": 0}, "meta_ttt.inner_steps = 0: .*greater than or equal to 1"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], named: str, pico_data: DataFolder, tmp_path: Path) -> None:
    tree = pico_recipe(pico_data, tmp_path).model_dump(exclude_none=True)
    with pytest.raises(SettingsError, match=named):
        parse_settings(Recipe, {**tree, "meta_ttt": {**ADAPTING, **settings}}, "recipe")


def test_what_cannot_act_is_refused_and_costs_are_counted(pico_data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="meta_ttt: micro-batches of 1 windows of 16 tokens do not halve"):
        trainer(pico_data, tmp_path, data={"micro_batch_tokens": 16})
    halved = pico_recipe(pico_data, tmp_path, meta_ttt=ADAPTING, data={"micro_batch_tokens": 16})
    with pytest.raises(SettingsError, match="meta_ttt: micro-batches of 1 windows of 16 tokens do not halve"):
        dry_run(halved, StepTimes(0.5, 1.0, "given"))
    never = pico_recipe(pico_data, tmp_path, meta_ttt={**ADAPTING, "every": 13})
    refused = [f.key for f in dry_run(never, StepTimes(0.5, 1.0, "given")).findings if f.level == "refuse"]
    assert refused == ["meta_ttt.every"]
    recipes = [pico_recipe(pico_data, tmp_path), pico_recipe(pico_data, tmp_path, meta_ttt=ADAPTING)]
    plain, ours = (costs_of(predict(recipe, StepTimes(0.5, 1.0, "given")), Wanted()) for recipe in recipes)
    assert plain is not None
    assert ours is not None
    assert ours.flops == pytest.approx(plain.flops * (2 / 3 + 1.5 / 3))  # two passes over one half, one over the other
    seed: Any = SimpleNamespace(settings={"plan": "rtn", "rules": []}, artifact="x")
    with pytest.raises(SettingsError, match="meta_ttt: a script that trains does not adapt on the way"):
        require_makeable(seed, recipes[1])
