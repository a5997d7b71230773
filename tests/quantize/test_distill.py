"""Distillation after rounding: symbols stay, what is kept is better on unseen text, and else nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import plan_text, requant
from pgolf_post.calibrate import CalibrationSettings, Stats
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NumericsError, SettingsError
from pgolf_post.families import load_module
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.plan import DistillSettings, parse_plan, read_plan
from pgolf_post.quantize import distill as module
from pgolf_post.quantize.distill import Losses, distill, split_windows, to_stored, tunable
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.tensor import QuantizedModel

COARSE = ("*.bits=3", "matrices.clip=3", "embedding.clip=3")
SETTINGS = DistillSettings(tokens=640, steps=30, learning_rate=0.01, batch_tokens=256, holdout=0.25)


@pytest.fixture
def model(view: View, stats: Stats) -> QuantizedModel:
    return quantize_view(view, stats, read_plan("sdclip-1394", COARSE))


def same_floats(first: QuantizedModel, second: QuantizedModel) -> bool:
    assert first.passthrough.keys() == second.passthrough.keys()
    return all(np.array_equal(first.passthrough[name], second.passthrough[name]) for name in first.passthrough)


def test_symbols_and_scales_stay_and_the_held_out_loss_falls(
    view: View, model: QuantizedModel, text: CalibrationSet
) -> None:
    before = {name: array.copy() for name, array in model.passthrough.items()}
    tuned, report = distill(model, view, text, SETTINGS)
    assert report.kept
    assert report.after.kl < report.before.kl
    assert report.after.nats < report.before.nats
    assert tuned.symbols_sha256() == model.symbols_sha256()
    assert all(tuned.quantized[name] is tensor for name, tensor in model.quantized.items())
    assert not same_floats(tuned, model)
    assert {array.dtype for array in tuned.passthrough.values()} == {np.dtype(np.float16)}
    assert all(np.array_equal(before[name], array) for name, array in model.passthrough.items())  # input untouched
    assert tuned.lineage["distill_id"] == module.distill_id(view, text, SETTINGS)[:12]


def test_the_reported_loss_is_that_of_the_model_handed_back(
    view: View, model: QuantizedModel, text: CalibrationSet
) -> None:
    tuned, report = distill(model, view, text, SETTINGS)
    _, held_out = split_windows(text.tokens, SETTINGS)
    tokens = torch.from_numpy(held_out)
    decoded = {name: torch.from_numpy(array) for name, array in tuned.tensors().items()}
    with torch.no_grad():
        reference = load_module(view.config, view.tensors, "reference")(tokens).double().log_softmax(-1)
        quantized = load_module(view.config, decoded, "quantized")(tokens).double().log_softmax(-1)
    kl = (reference.exp() * (reference - quantized)).sum(-1).mean()
    assert report.after.kl == pytest.approx(float(kl), rel=1e-4)
    nats = -quantized[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert report.after.nats == pytest.approx(float(nats), rel=1e-5)


@pytest.mark.parametrize("worse", ["kl", "nats"])
def test_what_is_not_better_on_held_out_text_is_not_kept(
    view: View, model: QuantizedModel, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch, worse: str
) -> None:
    found = iter([Losses(0.2, 3.0), Losses(**{"kl": 0.1, "nats": 2.9, worse: 5.0})])
    monkeypatch.setattr(module._Work, "losses", lambda *_: next(found))
    kept, report = distill(model, view, text, SETTINGS)
    assert kept is model
    assert not report.kept
    assert worse in report.reason


def test_a_rate_that_harms_is_undone(view: View, model: QuantizedModel, text: CalibrationSet) -> None:
    kept, report = distill(model, view, text, SETTINGS.model_copy(update={"learning_rate": 1.0, "steps": 3}))
    assert not report.kept
    assert kept is model
    assert report.after.kl > report.before.kl


def test_the_same_seed_gives_the_same_floats_and_another_does_not(
    view: View, model: QuantizedModel, text: CalibrationSet
) -> None:
    first, again = distill(model, view, text, SETTINGS)[0], distill(model, view, text, SETTINGS)[0]
    assert same_floats(first, again)
    other = distill(model, view, text, SETTINGS.model_copy(update={"seed": 1}))[0]
    assert not same_floats(first, other)


def test_training_and_held_out_windows_are_apart_and_all_there(text: CalibrationSet) -> None:
    trained, held_out = split_windows(text.tokens, SETTINGS)
    assert (len(trained), len(held_out)) == (30, 10)
    assert sorted(map(tuple, np.concatenate([trained, held_out]))) == sorted(map(tuple, text.tokens))
    few = split_windows(text.tokens, SETTINGS.model_copy(update={"tokens": 33, "holdout": 0.99}))
    assert [len(part) for part in few] == [1, 1]
    with pytest.raises(SettingsError, match="it has 1 of 16"):
        split_windows(text.tokens, SETTINGS.model_copy(update={"tokens": 31}))


def test_only_parameters_that_training_would_move_are_tuned(view: View, model: QuantizedModel) -> None:
    assert {name for name in model.passthrough if "scale" in name} <= set(tunable(model))
    assert not set(tunable(model)) & set(model.quantized)
    nothing = dataclasses.replace(model, passthrough={})
    with pytest.raises(MismatchError, match="nothing to tune"):
        tunable(nothing)


def test_bfloat16_stays_bfloat16_and_overflow_names_the_tensor(view: View, stats: Stats, text: CalibrationSet) -> None:
    model = quantize_view(view, stats, read_plan("sdclip-1394", [*COARSE, 'control.dtype="bf16"']))
    tuned, report = distill(model, view, text, SETTINGS)
    assert report.kept
    assert {array.dtype for array in tuned.passthrough.values()} == {np.dtype(np.uint16)}
    with pytest.raises(NumericsError, match=r"q_gain.*7e\+04"):
        to_stored("q_gain", torch.tensor([7e4]), np.zeros(1, np.float16))


def test_a_rate_is_blamed_for_a_loss_only_after_steps_at_that_rate(
    view: View, model: QuantizedModel, text: CalibrationSet
) -> None:
    broken = {name: np.full_like(array, np.nan) for name, array in model.passthrough.items()}
    with pytest.raises(NumericsError, match="held-out loss before distillation is not finite") as caught:
        distill(dataclasses.replace(model, passthrough=broken), view, text, SETTINGS)
    assert "learning_rate" not in str(caught.value.hint)


def test_validation_text_is_refused(view: View, stats: Stats, pico_data: DataFolder) -> None:
    plan = read_plan("sdclip-1394", ["distill.tokens=640"])
    with pytest.raises(SettingsError, match="validation text is refused"):
        _ = parse_calibration(source="val")
    shards = pico_data.manifest["splits"]
    poisoned = {**pico_data.manifest, "splits": {**shards, "train": shards["val"]}}
    with pytest.raises(MismatchError, match="validation text"):
        plan_text(view, dataclasses.replace(pico_data, manifest=poisoned), plan, CalibrationSettings(tokens=640))
    with pytest.raises(SettingsError, match="no calibration text"):
        requant(view, stats, plan)


def parse_calibration(**values: Any) -> CalibrationSettings:
    from pgolf_post.settings import parse_settings

    return parse_settings(CalibrationSettings, values, "test")


def test_a_model_of_other_weights_is_refused(model: QuantizedModel, view: View, text: CalibrationSet) -> None:
    raw = view.checkpoint.load("raw")
    with pytest.raises(MismatchError, match="the reference is"):
        distill(model, raw, text, SETTINGS)


def test_a_plan_that_distils_packs_what_was_tuned_and_is_another_artifact(
    view: View, stats: Stats, pico_data: DataFolder
) -> None:
    usual = read_plan("sdclip-1394", COARSE)
    tree = {"rules": [rule.model_dump() for rule in usual.rules], "distill": SETTINGS.model_dump()}
    plan = parse_plan(tree, "test.toml")
    text = plan_text(view, pico_data, plan, CalibrationSettings(tokens=640))
    control, made = requant(view, stats, usual), requant(view, stats, plan, text=text)
    assert made.id != control.id
    assert made.symbols_sha256 == control.symbols_sha256
    assert made.meta["distill"]["kept"]
    assert made.meta["distill"]["steps"] == 30
    assert made.meta["distill"]["kl_after"] < made.meta["distill"]["kl_before"]
    tuned, _ = distill(quantize_view(view, stats, usual), view, calibration_text_of(view, pico_data), SETTINGS)
    assert same_floats(read_artifact(made.path).model, tuned)
    assert requant(view, stats, plan, text=text).cached
    other = plan.model_copy(update={"distill": SETTINGS.model_copy(update={"steps": 2})})
    assert requant(view, stats, other, text=text).id != made.id


def calibration_text_of(view: View, data: DataFolder) -> CalibrationSet:
    return calibration_text(view, data, CalibrationSettings(tokens=640), 16)
