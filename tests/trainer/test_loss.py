"""What training minimises: each setting is its formula in NumPy, the metric stays nats, and off means nothing ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.score.breakdown.token_text import CLASSES, TokenText
from tests.conftest import pico_recipe
from tests.trainer.test_model import pico_model
from trainer import kernels
from trainer.plan.dry_run import answer, dry_run
from trainer.run.loop import Trainer
from trainer.run.warm_up import synthetic_batch
from trainer.schedule.step_times import StepTimes
from trainer.step import compiled
from trainer.step.compiled import compiled_loss, num_compiled_graphs, training_loss
from trainer.step.loss import LossSettings, TokenClass, objective, share_of
from trainer.step.objective import Objective, TokenWeights, head_similarity

ALL: dict[str, Any] = {
    "label_smoothing": 0.1, "z_loss": 1e-3, "ignore_ids": [1],
    "class_weights": {"word start": 1.5, "continuation": 0.8}, "class_weight_ramp": [0.25, 0.75], "focal_gamma": 0.5,
    "logit_penalty": 1e-3, "head_diversity": 1e-2,
}  # fmt: skip
BRIEF: dict[str, Any] = {"phases": ("final",), "fractions": (), "metric_tokens": 40}
CPU = torch.device("cpu")


def numpy_objective(settings: Mapping[str, float], c: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The formula of trainer/step/loss.py, a position at a time."""
    total = 0.0
    for row, target in zip(c, y, strict=True):
        logsumexp = np.log(np.exp(row - row.max()).sum()) + row.max()
        nats = logsumexp - row[target]
        share = settings.get("label_smoothing", 0.0)
        smoothed = (1 - share) * nats + share * np.mean(logsumexp - row)
        focal = (1 - np.exp(-nats)) ** settings.get("focal_gamma", 0.0)
        penalties = settings.get("z_loss", 0.0) * logsumexp**2 + settings.get("logit_penalty", 0.0) * np.mean(row**2)
        total += weights[target] * (focal * smoothed + penalties)
    return float(total / len(y))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 0.01},
        {"focal_gamma": 2.0},
        {"focal_gamma": 0.5},
        {"logit_penalty": 0.02},
        {"label_smoothing": 0.2, "z_loss": 0.01, "focal_gamma": 1.5, "logit_penalty": 0.02},
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_the_formulas(settings: dict[str, float], weighted: bool) -> None:
    rng = np.random.default_rng(0)
    c, y = rng.normal(size=(5, 7)) * 3, rng.integers(0, 7, 5)
    weights = rng.choice([0.0, 0.8, 1.5], 7) if weighted else np.ones(7)
    logits = torch.tensor(c, requires_grad=True)
    both = objective(
        LossSettings(**settings),
        logits,
        torch.tensor(y),
        torch.tensor(weights) if weighted else None,  # type: ignore[arg-type]
    )
    both[0].backward()
    both = both.detach()
    assert float(both[0]) == pytest.approx(numpy_objective(settings, c, y, weights), rel=1e-12)
    assert float(both[1]) == pytest.approx(numpy_objective({}, c, y, np.ones(7)), rel=1e-12)
    found, wanted = logits.grad.numpy(), np.empty_like(c)  # type: ignore[union-attr]
    for place in np.ndindex(c.shape):
        step = np.zeros_like(c)
        step[place] = 1e-5
        wanted[place] = (
            numpy_objective(settings, c + step, y, weights) - numpy_objective(settings, c - step, y, weights)
        ) / 2e-5
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_a_target_that_is_certain_has_a_finite_gradient() -> None:
    logits = torch.tensor([[90.0, 0.0]], requires_grad=True)
    objective(LossSettings(focal_gamma=0.5), logits, torch.tensor([0]), None)[0].backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_classes_are_those_of_the_breakdown_and_weights_rise_over_the_ramp(pico_data: DataFolder) -> None:
    assert get_args(TokenClass) == CLASSES
    token_class = TokenText.from_tokenizer(pico_data.tokenizer).token_class
    full = np.where(token_class == 0, 1.5, np.where(token_class == 1, 0.8, 1.0))
    full[1] = 0
    weights = TokenWeights(LossSettings(**ALL), pico_data, CPU)
    for at, share in ((0.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)):
        weights.move_to(at)
        expected = 1 + share * (full - 1)
        expected[1] = 0
        np.testing.assert_allclose(weights.now.numpy(), expected)
    np.testing.assert_allclose(
        TokenWeights(LossSettings(**{**ALL, "class_weight_ramp": [0, 0]}), pico_data, CPU).now, full
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"focal_gamma": -0.5}, "focal_gamma"),
        ({"ignore_ids": [3, -1]}, r"ignore_ids count from 0, got \[-1\]"),
        ({"ignore_ids": [3, 3]}, "names one twice"),
        ({"class_weights": {"word start": -0.5}}, "at least 0, got {'word start': -0.5}"),
        ({"class_weights": {"nouns": 2.0}}, "class_weights.nouns"),
        ({"class_weights": {"digits": 2.0}, "class_weight_ramp": [0.5, 0.2]}, "must ascend"),
        ({"class_weight_ramp": [0.0, 0.5]}, "acts only with class_weights"),
        ({"focal_gamma": 2.0, "focal_gamma_ramp": [0.5, 1.2]}, r"focal_gamma_ramp must ascend within 0 and 1"),
        ({"focal_gamma_ramp": [0.5, 0.5]}, "acts only with focal_gamma"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "heads", "message"),
    [
        ({"ignore_ids": [320]}, 2, r"ignore_ids \[320\] are outside the vocabulary of pico, whose ids end at 319"),
        ({"class_weights": dict.fromkeys(CLASSES[:4], 0.0), "ignore_ids": list(range(320))}, 2, "leave no token"),
        ({"head_diversity": 0.1}, 1, "needs two heads, model.num_heads is 1"),
    ],
)
def test_what_model_or_vocabulary_lack_is_refused(
    pico_data: DataFolder, settings: dict[str, Any], heads: int, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Objective(LossSettings(**settings), heads, pico_data, CPU)


def test_a_class_without_tokens_is_refused(pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    only_words = SimpleNamespace(token_class=np.zeros(320, dtype=np.int64))
    monkeypatch.setattr("trainer.step.objective.TokenText.from_tokenizer", lambda _: only_words)
    with pytest.raises(SettingsError, match=r'"digits".* = 2 acts on no token: pico has "word start"'):
        TokenWeights(LossSettings(class_weights={"digits": 2.0}), pico_data, CPU)


def trainer(data: DataFolder, root: Path, **tables: dict[str, Any]) -> Trainer:
    return Trainer(pico_recipe(data, root, **{"checkpoint": BRIEF, **tables}))


def test_head_similarity_is_the_mean_squared_cosine(pico_data: DataFolder, tmp_path: Path) -> None:
    model, means = trainer(pico_data, tmp_path).model, []
    for block in model.blocks:
        torch.nn.init.uniform_(block.attn.q.weight)  # type: ignore[union-attr, arg-type]
        heads = block.attn.q.weight.detach().double().numpy().reshape(model.config.num_heads, -1)  # type: ignore[union-attr]
        unit = heads / np.linalg.norm(heads, axis=1, keepdims=True)
        pairs = [(a @ b) ** 2 for i, a in enumerate(unit) for b in unit[:i]]
        means.append(np.mean(pairs))
    assert float(head_similarity(model).detach()) == pytest.approx(np.mean(means), rel=1e-5)


def test_a_ramp_is_a_line_between_its_ends_and_a_jump_where_they_meet() -> None:
    assert [share_of((0.25, 0.75), at) for at in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]
    assert [share_of((0.5, 0.5), at) for at in (0.0, 0.4, 0.5, 1.0)] == [0, 0, 1, 1]


def test_the_power_of_the_focal_loss_rises_over_its_ramp_in_a_compiled_graph_too(
    pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    objective_of = Objective(LossSettings(focal_gamma=2.0, focal_gamma_ramp=(0.5, 1.0)), 2, pico_data, CPU)
    torch.manual_seed(0)
    model, (inputs, targets) = pico_model(), synthetic_batch(20, 2, 12, torch.Generator().manual_seed(1))
    before = num_compiled_graphs()
    for function in (objective_of.function, compiled_loss(objective_of.function)):
        for at, gamma in ((0.25, 0.0), (0.75, 1.0), (1.0, 2.0)):
            objective_of.move_to(at)
            found = function(model, inputs, targets, model.reach(inputs)).detach()
            logits = model(inputs).detach().flatten(0, 1)
            wanted = objective(LossSettings(focal_gamma=gamma), logits, targets.flatten(), None)
            torch.testing.assert_close(found, wanted)
    assert num_compiled_graphs() == before + 1


def test_off_is_the_plain_loss_and_no_table(pico_data: DataFolder, tmp_path: Path) -> None:
    run = trainer(pico_data, tmp_path)
    assert run.gradients.objective is None
    assert run.gradients.loss_function is training_loss
    assert "loss" not in run.recipe.model_dump()
    assert "loss" not in trainer(pico_data, tmp_path, loss={"z_loss": 0.0}).recipe.model_dump(mode="json")


def test_the_objective_does_not_depend_on_micro_batches_nor_on_compiling(
    pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    run = trainer(pico_data, tmp_path, loss=ALL, run={"precision": "fp64"})
    gradients, (inputs, targets) = run.gradients, synthetic_batch(320, 4, 16, torch.Generator().manual_seed(1))
    for block in run.model.blocks:  # heads that start orthogonal are not alike at all
        torch.nn.init.uniform_(block.attn.q.weight)  # type: ignore[union-attr, arg-type]
    targets[:2] = 1  # a whole micro-batch that is ignored
    found = []
    for function in (gradients.loss_function, compiled_loss(gradients.loss_function)):  # type: ignore[arg-type]
        gradients.loss_function = function
        for at, rows in ((0.5, 4), (1.0, 4), (1.0, 2)):
            assert gradients.objective is not None
            gradients.objective.move_to(at)
            gradients.share = rows / 4
            run.model.zero_grad(set_to_none=True)
            nats = gradients.accumulate([(inputs[i : i + rows], targets[i : i + rows]) for i in range(0, 4, rows)])
            assert gradients.objective_share is not None
            grads = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
            found.append((float(nats), float(gradients.objective_share), grads))
    plain = float(training_loss(run.model, inputs, targets, run.model.reach(inputs)))
    for (nats, value, grads), like in zip(found, [found[0], found[1], found[1]] * 2, strict=True):
        assert nats == pytest.approx(plain, rel=1e-12)
        assert value == pytest.approx(like[1], rel=1e-12)
        torch.testing.assert_close(grads, like[2])
    assert found[0][1] != found[1][1]  # the ramp acted, under the compiled function too


@pytest.mark.slow
def test_a_run_logs_both_and_resumes_to_the_same_bits(
    pico_data: DataFolder, pico_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = {**BRIEF, "steps": [7]}
    whole = trainer(pico_data, tmp_path / "a", loss=ALL, checkpoint=checkpoint, run={"log_every": 6}).run()
    assert whole.meta["recipe"]["loss"]["z_loss"] == ALL["z_loss"]
    assert "objective" in capsys.readouterr().err
    lines = [json.loads(line) for line in (whole.path.parent / "train.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (pico_run / "pico" / "train.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(plain[0]["loss"], abs=2e-6)
    assert all(line["objective"] != line["loss"] for line in lines)
    assert "objective" not in plain[0]
    assert whole.view_id("raw") != Checkpoint.open(pico_run / "latest").view_id("raw")
    again = trainer(pico_data, tmp_path / "b", loss=ALL, checkpoint=checkpoint)
    again.resume(next((tmp_path / "a" / "pico").glob("step_000007-*")))
    assert again.run().view_id("raw") == whole.view_id("raw")


def test_the_dry_run_says_what_is_minimised(
    pico_data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, loss={"z_loss": 1e-4, "ignore_ids": [0]})
    found = dry_run(recipe, StepTimes.given(recipe.model, 0.1, None))
    assert "loss: z_loss 0.0001, ignore_ids [0]; the metric stays plain nats" in capsys.readouterr().err
    assert answer(found)["loss"] == {"z_loss": 1e-4, "ignore_ids": [0]}
    with pytest.raises(SettingsError, match="outside the vocabulary"):
        dry_run(pico_recipe(pico_data, tmp_path, loss={"ignore_ids": [999]}), StepTimes.given(recipe.model, 0.1, None))


def test_fused_kernels_refuse_the_setting_by_name(
    pico_data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    recipe = pico_recipe(pico_data, tmp_path, run={"kernels": "triton_loss"}, loss={"z_loss": 1e-4})
    with pytest.raises(SettingsError, match=r"loss of plain nats, not of loss.z_loss 0.0001"):
        kernels.require_usable(recipe, "cuda")
