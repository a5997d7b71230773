"""Preconditioned fine-tuning: its roots, its steps, and that a fit with it is a fit like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.text import draw_training_text
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.families import train_seq_len
from pgolf_post.fit import precondition, replay
from pgolf_post.fit.artifact import fit_key
from pgolf_post.fit.build import constants_of
from pgolf_post.fit.precondition import PreconditionedMomentum, Roots, empty_roots, roots_of
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.replay import fine_tuned, groups_in_order
from pgolf_post.fit.sensitivity import Sensitivity
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.fit.tune import TunedModel, learning_rates
from pgolf_post.fit.tune_partial import TunePartial
from pgolf_post.sweep.settings import FitStage, TrialSettings

CALIBRATION = CalibrationSettings(tokens=4096)
SETTINGS = FitSettings(kappa="off", trellis_states=4, tune_tokens=8192)
COARSE = 0.01  # c


@pytest.fixture
def fitter(view: View, pico_data: DataFolder) -> Fitter:
    return prepare(view, pico_data, CALIBRATION, SETTINGS)


def moments(size: int, seed: int) -> torch.Tensor:  # (size, size) float64, positive definite
    values = torch.randn(size, 3 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values @ values.T / size


def test_roots_whiten_both_sides() -> None:
    inputs, outputs = moments(6, 0), moments(4, 1)
    roots = roots_of(Sensitivity(inputs, outputs.diagonal().clone(), outputs))
    for root, matrix in ((roots.inputs, inputs), (roots.outputs, outputs)):
        white = root.double() @ (matrix / matrix.diagonal().mean()) @ root.double()
        torch.testing.assert_close(white, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-4)


def test_rows_that_are_not_coupled_are_weighted_alone() -> None:
    rows = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)
    roots = roots_of(Sensitivity(moments(2, 0), rows))
    torch.testing.assert_close(roots.outputs, torch.diag(torch.tensor([2.0, 1.0, 0.5])))


def test_a_direction_is_the_product_of_all_three() -> None:
    roots = Roots(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.diag(torch.tensor([1.0, 5.0, 7.0])))
    gradient = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]])
    expected = torch.tensor([[2.0, 5.0, 35.0], [1.0, 15.0, 35.0]])
    torch.testing.assert_close(roots.applied(gradient), expected)
    torch.testing.assert_close(roots.applied(gradient.view(2, 3, 1)), expected.view(2, 3, 1))


def optimized(gradients: list[torch.Tensor], rate: float) -> torch.Tensor:
    """Return where some gradients lead from zero."""
    weight = torch.zeros_like(gradients[0]).requires_grad_()
    roots = Roots(torch.eye(len(weight)), torch.eye(weight.shape[1]))
    optimizer = PreconditionedMomentum([{"params": [weight], "lr": rate, "roots": roots}])
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def test_a_rate_is_the_root_mean_square_of_a_step() -> None:
    gradient = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    moved = optimized([gradient], 0.01)
    torch.testing.assert_close(moved, -0.01 * gradient / gradient.square().mean().sqrt())
    torch.testing.assert_close(optimized([gradient] * 5, 0.01), 5 * moved)


def test_steps_do_not_depend_on_the_scale_of_gradients() -> None:
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    moved = optimized(gradients, 0.01)
    torch.testing.assert_close(optimized([1e-9 * gradient for gradient in gradients], 0.01), moved)
    torch.testing.assert_close(optimized([0 * gradients[0]], 0.01), torch.zeros(3, 4))


def test_it_lowers_the_divergence_on_its_text(fitter: Fitter, view: View, pico_data: DataFolder) -> None:
    text, builder = draw_training_text(pico_data, CALIBRATION, train_seq_len(view.config)), fitter.builder
    tuned, probe = TunedModel(view, text, 16384, roots=builder.roots), Probe(view, text)
    first, *others = groups_in_order(view, list(builder.matrices))
    tuned.load(builder.quantize(constants_of(first, COARSE, {})), first)
    rest = [name for names in others for name in names]
    before, weights = probe.divergence(tuned.weights(list(builder.matrices))).mean, tuned.weights(rest)
    tuned.tune(learning_rates(builder, constants_of(rest, COARSE, {})), "1")
    assert probe.divergence(tuned.weights(list(builder.matrices))).mean < 0.95 * before
    assert all(not torch.equal(tuned.parameters[name], weights[name]) for name in rest)


def test_its_batches_are_small(view: View, pico_data: DataFolder) -> None:
    text = draw_training_text(pico_data, CALIBRATION, train_seq_len(view.config))
    adam, own = TunedModel(view, text, 4096), TunedModel(view, text, 4096, roots={})
    assert (adam.steps, own.steps) == (2, 8)
    assert own.batch * text.tokens.shape[1] == precondition.STEP_TOKENS


def test_it_is_the_default_and_no_id_names_it_where_nothing_is_tuned() -> None:
    assert FitSettings(tune_tokens=1).identity()["tune_optimizer"] == "preconditioned"
    assert "tune_optimizer" not in FitSettings(tune_tokens=1, tune_optimizer="adam").identity()
    assert FitSettings().identity() == FitSettings(tune_optimizer="adam").identity()
    assert "tune_optimizer" not in FitSettings().model_dump()


def test_adam_is_what_it_was(view: View, pico_data: DataFolder, fitter: Fitter, limit: int) -> None:
    adam = prepare(view, pico_data, CALIBRATION, SETTINGS.model_copy(update={"tune_optimizer": "adam"}))
    assert set(adam.identity["tune"]) == {"tokens", "text_sha256"}
    assert fitter.identity["tune"] == {**adam.identity["tune"], "optimizer": "preconditioned", "version": 2}
    assert fit_key(adam, limit, "rans").folder != fit_key(fitter, limit, "rans").folder


def test_an_interrupted_one_ends_alike(
    fitter: Fitter, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fitter.texts
    search, own = Search(fitter.builder, fitter.kappa), TunedModel.tune
    solution = search.solve(limit)

    def tuned(name: str) -> tuple[str, bytes]:  # symbols, floats
        partial, clock = TunePartial(tmp_path / name), TrainingClock()
        model = fine_tuned(fitter.builder, search, solution, limit, fitter.texts, 8192, clock, partial)  # type: ignore[index]
        assert model is not None
        return model.model.symbols_sha256(), b"".join(array.tobytes() for array in model.model.passthrough.values())

    whole, calls = tuned("whole"), list[str]()

    def interrupted(model: TunedModel, rates: dict[str, float], label: str, floats: Sequence[str]) -> None:
        calls.append(label)
        if len(calls) == 2:
            raise KeyboardInterrupt
        own(model, rates, label, floats)

    monkeypatch.setattr(TunedModel, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned("interrupted")
    assert tuned("interrupted") == whole
    assert whole[0] != solution.model.symbols_sha256()


def test_floats_learn_with_the_matrices_and_alone_at_the_end(
    fitter: Fitter, view: View, pico_data: DataFolder, limit: int, tmp_path: Path
) -> None:
    calls, own = list[tuple[int, int]](), TunedModel.tune

    class Watched(TunedModel):
        def tune(self, rates: Mapping[str, float], label: str, floats: Sequence[str] = ()) -> None:
            before = {name: parameter.clone() for name, parameter in self.parameters.items()}
            own(self, rates, label, floats)
            moved = {name for name, parameter in self.parameters.items() if not torch.equal(parameter, before[name])}
            assert set(rates) <= moved <= {*rates, *floats}
            calls.append((len(rates), len(moved & set(floats))))

    assert fitter.texts
    search = Search(fitter.builder, fitter.kappa)
    solution = search.solve(limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "TunedModel", Watched)
        partial = TunePartial(tmp_path / "partial")
        tuned = fine_tuned(fitter.builder, search, solution, limit, fitter.texts, 8192, TrainingClock(), partial)
    assert tuned is not None
    assert [bool(matrices) for matrices, _ in calls] == [True] * (len(calls) - 1) + [False]
    assert all(floats > 0 for _, floats in calls)
    assert len(tuned.data) <= limit
    before, after = solution.model.passthrough, tuned.model.passthrough
    assert {name: (array.dtype, array.shape) for name, array in after.items()} == {
        name: (array.dtype, array.shape) for name, array in before.items()
    }
    assert any((after[name] != before[name]).any() for name in after)


def test_floats_that_do_not_fit_stay_as_they_were(
    fitter: Fitter, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    search = Search(fitter.builder, fitter.kappa)
    solution = search.solve(limit)
    other = {name: array[::-1].copy() for name, array in fitter.builder.passthrough.items()}
    assert replay._with_floats(fitter.builder, search, solution, other, 10) is solution
    assert "those before it stay" in capsys.readouterr().err
    assert replay._with_floats(fitter.builder, search, solution, other, limit).model.passthrough.keys() == other.keys()


def test_empty_roots_have_the_shapes_of_a_parameter() -> None:
    roots = empty_roots(torch.zeros(3, 4, 5))
    assert (roots.outputs.shape, roots.inputs.shape) == ((3, 3), (20, 20))


@pytest.mark.parametrize("optimizer", ["adam", "preconditioned"])
@pytest.mark.parametrize("frequency", ["counted", "expected"])
@pytest.mark.parametrize("tokens", [0, 8])
def test_settings_are_read_back_as_they_were_given(optimizer: str, frequency: str, tokens: int) -> None:
    given = {"tune_tokens": tokens, "tune_optimizer": optimizer, "lookup_frequency": frequency, "coupling": 0.9}
    stage = FitStage(budget=7, **given)  # type: ignore[arg-type]
    assert FitStage.model_validate(stage.model_dump(mode="json")) == stage
    assert stage.settings() == FitSettings(**given)  # type: ignore[arg-type]
    trial = TrialSettings(method="fit", fit=stage).with_change("fit.tune_tokens", 16)
    assert trial.fit == stage.model_copy(update={"tune_tokens": 16})
    read = FitSettings.of_identity(stage.settings().identity())
    assert read.lookup_frequency == frequency
    assert read.tune_optimizer == optimizer or not tokens
