"""Fine-tuning between blocks: what it tunes, that it helps where it may, and that it costs no bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pgolf_post.base.ranks import Ranks
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.generate import own_text
from pgolf_post.calibrate.text import CalibrationSet, draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, SettingsError
from pgolf_post.families import get_family, train_seq_len
from pgolf_post.fit import tune
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.build import constants_of
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.replay import groups_in_order
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune import TunedModel
from pgolf_post.fit.tune_partial import Done, TunePartial
from tests import processes

CALIBRATION = CalibrationSettings(tokens=4096)
SETTINGS = FitSettings(kappa_tokens=256, trellis_states=4, tune_tokens=8192, tune_optimizer="adam")
COARSE = 0.01  # c


@pytest.fixture
def fitter(view: View, pico_data: DataFolder) -> Fitter:
    return prepare(view, pico_data, CALIBRATION, SETTINGS)


@pytest.fixture
def text(view: View, pico_data: DataFolder) -> CalibrationSet:
    return draw_training_text(pico_data, CALIBRATION, train_seq_len(view.config))


def rounded_first(fitter: Fitter, tuned: TunedModel) -> list[str]:
    """Round the first group into a model; returns the names of what is left."""
    first, *rest = groups_in_order(fitter.view, list(fitter.builder.matrices))
    tuned.load(fitter.builder.quantize(constants_of(first, COARSE, {})), first)
    return [name for names in rest for name in names]


def test_groups_take_every_matrix_once_in_the_order_of_the_blocks(fitter: Fitter) -> None:
    groups = groups_in_order(fitter.view, list(fitter.builder.matrices))
    assert sorted(name for names in groups for name in names) == sorted(fitter.builder.matrices)
    family = get_family(fitter.view.config["family"])
    layers = [{family.layer(name) for name in names} - {None} for names in groups]
    assert layers == [{layer} for layer in range(len(groups))]
    assert "tok_emb.weight" in groups[0]


def test_tuning_lowers_the_divergence_on_its_text(fitter: Fitter, view: View, text: CalibrationSet) -> None:
    probe, tuned = Probe(view, text), TunedModel(view, text, 16384)
    rest = rounded_first(fitter, tuned)
    before = probe.divergence(tuned.weights(list(fitter.builder.matrices))).mean
    tuned.tune(tune.learning_rates(fitter.builder, constants_of(rest, COARSE, {})), "1")
    assert probe.divergence(tuned.weights(list(fitter.builder.matrices))).mean < 0.97 * before


def test_only_what_is_left_is_tuned(fitter: Fitter, view: View, text: CalibrationSet) -> None:
    tuned = TunedModel(view, text, 4096)
    rest = rounded_first(fitter, tuned)
    before = {name: parameter.clone() for name, parameter in tuned.parameters.items()}
    tuned.tune(dict.fromkeys(rest, 1e-4), "1")
    moved = {name for name, parameter in tuned.parameters.items() if not torch.equal(parameter, before[name])}
    assert moved == set(rest)
    assert not any(parameter.requires_grad for parameter in tuned.parameters.values())


def test_gradients_do_not_depend_on_the_micro_batch(fitter: Fitter, view: View, text: CalibrationSet) -> None:
    found = []
    for micro in (1, 3, 100):
        tuned = TunedModel(view, text, 4096)
        tuned.micro = micro
        name = rounded_first(fitter, tuned)[0]
        weight = tuned.parameters[name].requires_grad_(True)
        loss = tuned.backward(torch.arange(8))
        assert weight.grad is not None
        found.append((float(loss), weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-9)


def test_bf16_tunes_by_the_gradient_that_autocast_gives(fitter: Fitter, view: View, text: CalibrationSet) -> None:
    tuned, tokens = TunedModel(view, text, 4096, "bf16"), torch.from_numpy(text.tokens[:8])
    name = rounded_first(fitter, tuned)[0]
    weight = tuned.parameters[name].requires_grad_(True)
    loss = tuned.backward(torch.arange(8))
    assert weight.grad is not None
    own = weight.grad.clone()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        logits = [model.logits(model.hidden(tokens)).float() for model in (tuned.reference, tuned.module)]
    reference, ours = (torch.log_softmax(each, -1) for each in logits)
    kl = (reference.exp() * (reference - ours)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(kl, weight)
    assert float(loss) == pytest.approx(float(kl.detach()), rel=1e-4)
    torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-8)
    exact = TunedModel(view, text, 4096)
    rounded_first(fitter, exact)
    exact.parameters[name].requires_grad_(True)
    exact.backward(torch.arange(8))
    difference = exact.parameters[name].grad - own  # type: ignore[operator]
    assert 0 < float(difference.norm()) < 0.2 * float(own.norm())


def test_every_window_is_read_once_an_epoch(view: View, text: CalibrationSet) -> None:
    tuned = TunedModel(view, text, 4096)
    tuned.batches = tune.epochs(len(text.tokens), 4, 0, "fine-tuning")
    per_epoch = len(text.tokens) // 4
    for _ in range(2):
        seen = np.concatenate([next(tuned.batches) for _ in range(per_epoch)]).tolist()
        assert len(set(seen)) == len(seen) == 4 * per_epoch


@pytest.mark.parametrize(("asked", "read"), [(1024, 4096), (8192, 8192), (10**9, None)])
def test_training_text_is_read_once_where_there_is_enough(
    asked: int, read: int | None, view: View, pico_data: DataFolder, fitter: Fitter
) -> None:
    settings = SETTINGS.model_copy(update={"tune_tokens": asked})
    texts = prepare(view, pico_data, CALIBRATION, settings, stats=fitter.stats).texts
    assert texts is not None
    windows = [window.tobytes() for text in texts for window in text.tokens]
    all_of_it = sum(len(shard) // texts[0].tokens.shape[1] for _, shard in pico_data.shards("train"))
    assert len(windows) == (all_of_it if read is None else read // texts[0].tokens.shape[1])


def test_what_judges_is_not_tuned_on(text: CalibrationSet) -> None:
    tune_text, held_out = tune.split_text(text)
    both = [{window.tobytes() for window in part.tokens} for part in (tune_text, held_out)]
    assert len(tune_text.tokens) + len(held_out.tokens) == len(text.tokens)
    assert len(held_out.tokens) == round(len(text.tokens) / 8)
    assert both[0] | both[1] == {window.tobytes() for window in text.tokens}
    assert not both[0] & both[1]
    with pytest.raises(SettingsError, match="there is 1 of"):
        tune.split_text(CalibrationSet((), text.tokens[:1]))


def test_the_budget_is_filled_again(fitter: Fitter, limit: int, view: View) -> None:
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    artifact = fit_artifact(fitter, limit)
    assert limit - WINDOW_BYTES <= artifact.path.stat().st_size <= limit
    facts = artifact.meta["fine_tuned"]
    assert facts["kept"] == (facts["divergence_after"] < facts["divergence_before"])
    assert artifact.meta["train_seconds"]["fine-tuning"] > 0
    assert all(torch.equal(view.tensors[name], tensor) for name, tensor in before.items())


def test_seconds_are_those_of_one_budget(fitter: Fitter, limit: int) -> None:
    fitter.clock.seconds["fine-tuning"] = 1000.0  # of the budget before
    assert fit_artifact(fitter, limit).meta["train_seconds"]["fine-tuning"] < 1000


def test_the_same_settings_tune_alike(fitter: Fitter, limit: int) -> None:
    assert fit_artifact(fitter, limit).symbols_sha256 == fit_artifact(fitter, limit, fresh=True).symbols_sha256


def test_what_does_not_help_is_not_kept(
    view: View, pico_data: DataFolder, fitter: Fitter, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RATE", 1.0)
    worse = fit_artifact(fitter, limit)
    plain = fit_artifact(prepare(view, pico_data, CALIBRATION, SETTINGS.model_copy(update={"tune_tokens": 0})), limit)
    assert not worse.meta["fine_tuned"]["kept"]
    assert worse.symbols_sha256 == plain.symbols_sha256
    assert "fine_tuned" not in plain.meta


def test_kappa_is_measured_once_for_both(view: View, pico_data: DataFolder, fitter: Fitter) -> None:
    kept = set(view.checkpoint.path.glob("derived/kappa/*"))
    other = prepare(view, pico_data, CALIBRATION, SETTINGS.model_copy(update={"tune_tokens": 0}))
    assert other.kappas == fitter.kappas
    assert set(view.checkpoint.path.glob("derived/kappa/*")) == kept


def test_too_few_seconds_leave_it_out(view: View, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    stats = prepare(view, pico_data, CALIBRATION, FitSettings(kappa="off")).stats
    clock = TrainingClock(limit=stats.seconds + 60)
    late = prepare(view, pico_data, CALIBRATION, FitSettings(kappa="off", tune_tokens=10**9), clock)
    assert late.texts is None
    assert "left out: fine-tuning" in capsys.readouterr().err


def test_predictions_that_are_not_finite_are_an_error(fitter: Fitter, view: View, text: CalibrationSet) -> None:
    tuned = TunedModel(view, text, 4096)
    name = rounded_first(fitter, tuned)[0]
    with torch.no_grad():
        tuned.parameters[name].fill_(np.nan)
    with pytest.raises(NumericsError, match="not finite"):
        tuned.tune({name: 1e-4}, "1")


def test_text_of_its_own_is_no_training_data(
    view: View, pico_data: DataFolder, fitter: Fitter, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS.model_copy(update={"tune_source": "self", "tune_tokens": 512})
    own = prepare(view, pico_data, CALIBRATION, settings, TrainingClock())
    assert own.texts is not None
    written = own_text(view, CALIBRATION.model_copy(update={"tokens": 512}), train_seq_len(view.config))
    assert {row.tobytes() for text in own.texts for row in text.tokens} == {row.tobytes() for row in written}
    assert own.kappas == fitter.kappas
    artifact = fit_artifact(own, limit)
    assert artifact.meta["fine_tuned"]["source"] == "self"
    assert artifact.meta["fine_tuned"]["seconds"] > 0
    assert set(artifact.meta["train_seconds"]) == {"statistics", "kappa", "regularisation"}  # not of fine-tuning
    assert "no training data was read" in capsys.readouterr().err
    short = SETTINGS.model_copy(update={"tune_tokens": 512})
    assert fit_artifact(prepare(view, pico_data, CALIBRATION, short), limit).folder != artifact.folder


def test_a_clock_that_is_out_leaves_text_of_its_own_in(view: View, pico_data: DataFolder) -> None:
    stats = prepare(view, pico_data, CALIBRATION, FitSettings(kappa="off")).stats
    settings = FitSettings(kappa="off", tune_tokens=10**3, tune_source="self")
    clock = TrainingClock(limit=stats.seconds + 60)
    clock.add("training", 60)
    assert prepare(view, pico_data, CALIBRATION, settings, clock).texts


class Second(Ranks):
    """A rank whose own clock allows what rank 0's does not."""

    def main_says(self, value: Any) -> Any:
        return False if value is True else value


def test_rank_0_says_what_there_is_time_for(view: View, pico_data: DataFolder, fitter: Fitter) -> None:
    assert fitter.kappas
    assert fitter.texts
    second = prepare(view, pico_data, CALIBRATION, SETTINGS, TrainingClock(), ranks=Second(), stats=fitter.stats)
    assert (second.kappas, second.texts) == ({}, None)


# As rank 0 and as a helper: two calls of `tune` on a model with one matrix changed; rank 0 keeps what they came to.
TUNING = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pgolf_post.base.ranks import Ranks
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.text import draw_training_text
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import swap_weights
from pgolf_post.fit import tune
from pgolf_post.fit.precondition import roots_of
from pgolf_post.fit.sensitivity import Sensitivity
from pgolf_post.fit.tune_ranks import SharedTuning, end_help, help_tune

tune.BATCH_TOKENS = tune.STEP_TOKENS = 48  # three windows: one rank of two reads more than the other
checkpoint, data, out = map(Path, sys.argv[1:4])
view, ranks = Checkpoint.open(checkpoint).load(), Ranks.join()
try:
    text = draw_training_text(DataFolder.open(data), CalibrationSettings(tokens=4096), 16)
    if ranks.is_main:
        rates = {"blocks.1.mlp.fc.weight": 1e-4, "blocks.2.attn.q.weight": 3e-4}
        sides = {name: [torch.linspace(1, 2, n).double() for n in view.tensors[name].shape] for name in rates}
        floats = ["blocks.1.attn_scale"] if sys.argv[4] == "preconditioned" else []
        roots = {name: roots_of(Sensitivity(torch.diag(columns), rows)) for name, (rows, columns) in sides.items()}
        tuned = SharedTuning(view, text, 960, "fp32", ranks, roots if sys.argv[4] == "preconditioned" else None)
        swap_weights(tuned.module, {"blocks.0.mlp.fc.weight": 1.3 * view.tensors["blocks.0.mlp.fc.weight"]})
        tuned.tune(rates, "1")
        tuned.tune(dict(list(rates.items())[:1]), "2", floats)
        save_file(tuned.weights([*rates, *floats]), out / f"{ranks.world_size}.safetensors")
        end_help(ranks)
    else:
        help_tune(view, text, "fp32", ranks)
finally:
    ranks.leave()
"""


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("preconditioned", marks=pytest.mark.long)])
def test_two_ranks_tune_as_one_does(view: View, pico_data: DataFolder, tmp_path: Path, optimizer: str) -> None:
    script = tmp_path / "tuning.py"
    script.write_text(TUNING)
    for number in (1, 2):
        words = (str(script), str(view.checkpoint.path), str(pico_data.path), str(tmp_path), optimizer)
        done = processes.run_ranks(number, *words)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{number}.safetensors") for number in (1, 2))
    for name, weight in one.items():
        moved, apart = weight - view.tensors[name], two[name] - weight
        assert float(moved.norm()) > 0
        assert float(apart.norm()) < 0.02 * float(moved.norm()), name


@pytest.mark.long
def test_the_command_tunes_on_two_ranks(view: View, pico_data: DataFolder, limit: int) -> None:
    words = ["-m", "pgolf_post", "fit", str(view.checkpoint.path), "--data", str(pico_data.path)]
    words += ["--calibration-tokens", "4096", "--kappa-tokens", "256", "--trellis-states", "4"]
    words += ["--budget", str(limit), "--tune-tokens", "4096", "--json"]
    done = processes.run_ranks(2, *words)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["fine_tuned"]["divergence_after"] > 0
    assert limit - WINDOW_BYTES <= facts["artifact_bytes"] <= limit


def test_an_interrupted_one_goes_on(
    fitter: Fitter, limit: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fit_artifact(fitter, limit)
    shutil.rmtree(first.folder)
    calls: list[str] = []
    own = TunedModel.tune

    def interrupted(tuned: TunedModel, rates: dict[str, float], label: str, floats: Sequence[str]) -> None:
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        own(tuned, rates, label, floats)

    monkeypatch.setattr(TunedModel, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_artifact(fitter, limit)
    resumed = fit_artifact(fitter, limit)
    assert "resuming: fine-tuned after 1 blocks before" in capsys.readouterr().err
    assert len(calls) == 2 + len(groups_in_order(fitter.view, list(fitter.builder.matrices))) - 2
    assert resumed.symbols_sha256 == first.symbols_sha256
    assert resumed.meta["builds"] == first.meta["builds"]
    assert not list(resumed.folder.parent.glob("*.partial*"))


def test_a_damaged_partial_is_said_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = TunePartial(tmp_path / "x.partial")
    partial.save(Done(3, 1.5, {"w": torch.arange(4.0)}))
    assert (partial.resume().blocks, partial.resume().seconds) == (3, 1.5)
    damaged = bytearray(partial.path.read_bytes())
    damaged[-1] ^= 1
    partial.path.write_bytes(damaged)
    assert partial.resume() == Done()
    assert "fine-tuning starts again" in capsys.readouterr().err
