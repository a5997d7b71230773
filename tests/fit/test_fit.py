"""The whole fit on a pico model: the window it promises, what it refuses, and that its parts do what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import PackedArtifact
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, OverBudgetError, SettingsError
from pgolf_post.fit.artifact import fit, fit_artifact
from pgolf_post.fit.build import Builder, constants_of
from pgolf_post.fit.explain import by_role, explain
from pgolf_post.fit.limits import fixed_bytes, require_less_than_fp16
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.regularize import PAIRS, regularized
from pgolf_post.fit.report import show_training
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES, Search
from pgolf_post.fit.target_gap import limit_for_gap, require_gap
from pgolf_post.fit.training_clock import TrainingClock
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.quantize.gptq.trellis import DIAGONALS

CALIBRATION = CalibrationSettings(tokens=512)
SETTINGS = FitSettings(kappa_tokens=256, trellis_states=8)


@pytest.fixture
def fitter(view: View, pico_data: DataFolder) -> Fitter:
    return prepare(view, pico_data, CALIBRATION, SETTINGS)


def budget(fitter: Fitter, bits: float) -> int:
    """About what an artifact of so many bits per weight takes."""
    return fixed_bytes(fitter.builder) + round(fitter.builder.num_weights * bits / 8) + WINDOW_BYTES // 2


def used_constants(artifact: PackedArtifact) -> dict[str, float]:
    """c/√κ of every matrix: those of two builds, where one was mixed from them."""
    return {tensor["name"]: tensor["constant"] for tensor in artifact.meta["tensors"] if tensor["method"] == "fit"}


@pytest.mark.parametrize("bits", [2.0, 3.5, 6.0])
def test_the_artifact_fills_its_budget_and_decodes(fitter: Fitter, bits: float) -> None:
    limit = budget(fitter, bits)
    artifact = fit_artifact(fitter, limit)
    assert limit - WINDOW_BYTES <= artifact.path.stat().st_size <= limit
    decoded = read_artifact(artifact.path).tensors
    assert set(decoded) == set(fitter.view.tensors)
    for name, tensor in fitter.view.tensors.items():
        assert decoded[name].shape == tuple(tensor.shape)
        assert np.isfinite(decoded[name]).all()


def test_more_bytes_cost_less_loss(fitter: Fitter) -> None:
    losses = [fit_artifact(fitter, budget(fitter, bits)).meta["predicted_nats"] for bits in (2.0, 4.0, 6.0)]
    assert losses[0] > 4 * losses[1] > 16 * losses[2]


def test_a_search_solves_every_budget_from_a_clean_start(fitter: Fitter) -> None:
    """One search, asked twice for two budgets, answers as two searches do: no build of the first is counted again."""
    limits = [budget(fitter, bits) for bits in (2.0, 4.0)]
    search = Search(fitter.builder, fitter.kappa)
    together = [search.solve(limit) for limit in limits]
    apart = [Search(fitter.builder, fitter.kappa).solve(limit) for limit in limits]
    for one, other in zip(together, apart, strict=True):
        assert one.builds == other.builds
        assert one.data == other.data


def test_the_same_settings_find_the_same_artifact(fitter: Fitter) -> None:
    first = fit_artifact(fitter, budget(fitter, 3))
    again = fit_artifact(fitter, budget(fitter, 3))
    fresh = fit_artifact(fitter, budget(fitter, 3), fresh=True)
    assert again.cached
    assert not fresh.cached
    assert fresh.symbols_sha256 == first.symbols_sha256


def test_inputs_are_left_untouched(view: View, pico_data: DataFolder) -> None:
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    fitter = prepare(view, pico_data, CALIBRATION, SETTINGS)
    fit_artifact(fitter, budget(fitter, 3))
    assert all(torch.equal(view.tensors[name], tensor) for name, tensor in before.items())


def test_a_budget_under_one_bit_says_the_least(fitter: Fitter) -> None:
    with pytest.raises(
        OverBudgetError, match=r"less than one bit for each of .* weights; the least is about"
    ) as caught:
        fit_artifact(fitter, fixed_bytes(fitter.builder))
    assert caught.value.hint is not None
    assert "--budget" in caught.value.hint


def test_a_budget_for_fp16_is_nothing_to_solve(fitter: Fitter) -> None:
    with pytest.raises(SettingsError, match="nothing to solve"):
        fit_artifact(fitter, 4 * fitter.builder.num_weights)


def test_a_budget_for_fp16_is_refused_before_statistics_are_collected(
    view: View, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf_post.fit.artifact.prepare", None)
    with pytest.raises(SettingsError, match=r"16,000,000 bytes hold all [\d,]+ weights in fp16 .*nothing to solve"):
        fit(view, pico_data, 16_000_000)


def test_the_limit_known_from_shapes_is_the_one_known_from_statistics(fitter: Fitter) -> None:
    """Nothing that could be solved is refused early, and what is near is left to the exact one."""
    most = 2 * fitter.builder.num_weights + fixed_bytes(fitter.builder)
    require_less_than_fp16(fitter.view, most - 1)
    with pytest.raises(SettingsError, match="nothing to solve"):
        require_less_than_fp16(fitter.view, round(1.05 * most))


def test_statistics_of_other_weights_are_refused(view: View, pico_data: DataFolder) -> None:
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=512, fisher=True))
    with pytest.raises(MismatchError, match="not of these"):
        Builder(view, replace(stats, view_id="0" * 64), SETTINGS)


def test_cached_kappas_are_read_back(view: View, pico_data: DataFolder, fitter: Fitter) -> None:
    again = prepare(view, pico_data, CALIBRATION, SETTINGS)
    assert again.kappas == fitter.kappas
    assert set(again.kappa) == set(fitter.builder.matrices)
    assert max(again.kappa.values()) <= 16 * min(again.kappa.values())


def test_kappa_by_role_is_one_number_a_role(view: View, pico_data: DataFolder) -> None:
    """The number is the median over the role's tensors of what each is measured to be alone."""
    fitter = prepare(view, pico_data, CALIBRATION, SETTINGS.model_copy(update={"kappa": "role"}))
    assert set(fitter.kappas) == {matrix.role for matrix in fitter.builder.matrices.values()}
    for name, kappa in fitter.kappa.items():
        assert kappa == fitter.kappas[fitter.builder.matrices[name].role].kappa
    alone = prepare(view, pico_data, CALIBRATION, SETTINGS).kappa
    for role, one in fitter.kappas.items():
        of_role = [alone[name] for name, matrix in fitter.builder.matrices.items() if matrix.role == role]
        assert min(of_role) * 0.999999 <= one.kappa <= max(of_role) * 1.000001


def test_too_few_seconds_leave_kappa_out(view: View, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(view, pico_data, CALIBRATION, FitSettings(kappa="off"))
    clock = TrainingClock()
    with clock.step("before"):
        pass
    clock.limit, clock.seconds["before"] = 100.0, 100.0
    fitter = prepare(view, pico_data, CALIBRATION, FitSettings(kappa_tokens=1024), clock)
    assert fitter.kappas == {}
    assert clock.dropped == ["kappa"]
    assert "left out: kappa" in capsys.readouterr().err


def test_statistics_alone_beyond_the_seconds_are_an_error(view: View, pico_data: DataFolder) -> None:
    with pytest.raises(SettingsError, match="--train-seconds allows 1e-06"):
        prepare(view, pico_data, CALIBRATION, SETTINGS, TrainingClock(1e-6))


@pytest.mark.parametrize("changed", [{"trellis_states": 0}, {"rows": False}, {"columns": False}, {"shrink": True}])
def test_every_switch_acts(fitter: Fitter, changed: dict[str, int]) -> None:
    constants = constants_of(fitter.builder.matrices, 0.002, {})
    other = Builder(fitter.view, fitter.stats, SETTINGS.model_copy(update=changed))
    first, second = fitter.builder.quantize(constants), other.quantize(constants)
    assert any(not np.array_equal(first[name].dequantize(), second[name].dequantize()) for name in first)


@pytest.mark.parametrize("lane_rows", [DIAGONALS, 16])
def test_either_trellis_fills_the_budget_and_decodes(view: View, pico_data: DataFolder, lane_rows: int) -> None:
    settings = SETTINGS.model_copy(update={"lane_rows": lane_rows})
    fitter = prepare(view, pico_data, CALIBRATION, settings)
    limit = budget(fitter, 3.5)
    artifact = fit_artifact(fitter, limit)
    assert limit - WINDOW_BYTES <= artifact.path.stat().st_size <= limit
    decoded = read_artifact(artifact.path)
    quantized = fitter.builder.quantize(used_constants(artifact))
    for name, tensor in quantized.items():
        assert tensor.trellis is not None
        assert tensor.trellis.lane_rows == min(lane_rows, len(tensor.symbols))
        assert np.array_equal(decoded.tensors[name], tensor.dequantize()), name


@pytest.mark.parametrize(("lane_rows", "few"), [(512, 8), (0, 256)])  # along diagonals all look
def test_few_states_look_for_c_and_all_of_them_build_once_or_twice(fitter: Fitter, lane_rows: int, few: int) -> None:
    settings = SETTINGS.model_copy(update={"trellis_states": 64 if lane_rows else 256, "lane_rows": lane_rows})
    search = Search(Builder(fitter.view, fitter.stats, settings), fitter.kappa)
    solution = search.solve(budget(fitter, 4.0))
    *others, last = [build.states for build in solution.builds]
    every = settings.trellis_states
    assert last == every
    assert set(others) <= {few, every}
    assert others.count(every) <= (1 if few < every else 2)
    assert {tensor.trellis.states for tensor in solution.model.quantized.values() if tensor.trellis} == {every}


def test_regularisation_follows_the_rate(view: View, pico_data: DataFolder) -> None:
    """Below 3 bits the pair that diverges least is taken, with factors of its own; above, nothing is tried."""
    settings = SETTINGS.model_copy(update={"regularize": "rate"})
    fitter = prepare(view, pico_data, CALIBRATION, settings)
    coarse, fine = (fit_artifact(fitter, budget(fitter, bits)) for bits in (2.0, 4.0))
    assert "regularized" not in fine.meta
    chosen = coarse.meta["regularized"]
    tried = {(one["coupling"], one["ridge"]): one["divergence"] for one in chosen["tried"]}
    assert set(tried) == set(PAIRS)
    assert tried[chosen["coupling"], chosen["ridge"]] == min(tried.values()) == chosen["divergence"]
    assert "regularisation" in coarse.meta["train_seconds"]
    pair = {key: chosen[key] for key in ("coupling", "ridge")}
    fixed = Builder(view, fitter.stats, SETTINGS.model_copy(update=pair))
    for kept in ({"regularize": "fixed"}, {"coupling": 0.9}, {"kappa": "off"}):
        own = replace(
            fitter, settings=settings.model_copy(update=kept), kappas={} if "kappa" in kept else fitter.kappas
        )
        assert regularized(own, budget(fitter, 2.0), "rans") == (own, None, {})
    quantized = fixed.quantize(used_constants(coarse))
    decoded = read_artifact(coarse.path)
    assert all(np.array_equal(decoded.tensors[name], tensor.dequantize()) for name, tensor in quantized.items())


def test_columns_of_zeros_are_refused_along_diagonals() -> None:
    with pytest.raises(ValueError, match="set lane_rows = 512 or trellis_states = 0"):
        FitSettings(zeros=True)


@pytest.mark.parametrize("states", [0, 4])
def test_columns_that_are_worth_no_bits_are_zero(fitter: Fitter, states: int) -> None:
    settings = SETTINGS.model_copy(update={"trellis_states": states, "zeros": True, "kappa": "off", "lane_rows": 512})
    builder = Builder(fitter.view, fitter.stats, settings)
    name = max(builder.matrices, key=lambda name: builder.matrices[name].num_weights)
    part = builder.matrices[name]
    weight = part.weight.clone()
    weight[:, 3] *= 1e-4
    weight[5] *= 1e-4
    builder.matrices[name] = replace(part, weight=weight)
    symbols = builder.quantize({name: 0.001})[name].symbols
    assert not symbols[:, 3].any()
    assert symbols[5].any() == (states > 0)  # a trellis has no zero in every state
    assert (symbols != 0).mean() > 0.5


def test_the_centroid_lowers_the_predicted_loss(fitter: Fitter) -> None:
    constants = constants_of(fitter.builder.matrices, 0.01, {})
    plain = fitter.builder.quantize(constants)
    shrunk = Builder(fitter.view, fitter.stats, SETTINGS.model_copy(update={"shrink": True})).quantize(constants)
    for name, tensor in shrunk.items():
        assert tensor.facts["predicted_loss"] <= plain[name].facts["predicted_loss"] * 1.0001, name


def test_slopes_are_equal_where_the_solver_is_free(fitter: Fitter) -> None:
    free = replace(fitter, kappas={})
    quantized = free.builder.quantize(Search(free.builder, {}).constants(0.0005))
    rows = explain([{"name": name, **tensor.facts} for name, tensor in quantized.items()], {})
    slopes = [row.slope for row in rows if row.num_weights >= 256]
    assert max(slopes) < 1.35 * min(slopes)
    assert sum(row.num_weights for row in by_role(rows)) == free.builder.num_weights


def test_distilled_floats_are_kept_only_if_better(view: View, pico_data: DataFolder, fitter: Fitter) -> None:
    tuned = prepare(view, pico_data, CALIBRATION, SETTINGS.model_copy(update={"distill": True}))
    limit = budget(fitter, 2.0)
    plain, other = fit_artifact(fitter, limit), fit_artifact(tuned, limit)
    facts = other.meta["distilled"]
    assert other.path.stat().st_size <= limit
    assert other.symbols_sha256 == plain.symbols_sha256
    assert not facts["kept"] or facts["kl_after"] < facts["kl_before"]
    assert "distillation" in tuned.clock.seconds


def test_bytes_for_a_gap(fitter: Fitter) -> None:
    small, large = limit_for_gap(fitter, 0.02), limit_for_gap(fitter, 0.002)
    assert large > small
    with pytest.raises(SettingsError, match="must be positive"):
        limit_for_gap(fitter, -1.0)
    with pytest.raises(SettingsError, match="must be positive and finite"):
        require_gap(math.inf)
    assert fitter.clock.seconds["target gap"] > 0


def test_an_artifact_is_beside_its_checkpoint(fitter: Fitter) -> None:
    artifact = fit_artifact(fitter, budget(fitter, 3))
    assert artifact.path.parent.parent == Path(fitter.view.checkpoint.path) / "derived" / "artifact"


def test_a_damaged_kappa_is_measured_again(
    view: View, pico_data: DataFolder, fitter: Fitter, capsys: pytest.CaptureFixture[str]
) -> None:
    for kept in Path(view.checkpoint.path).glob("derived/kappa/*/kappa.json"):
        kept.write_text(kept.read_text().replace("0", "1"))
    again = prepare(view, pico_data, CALIBRATION, SETTINGS)
    assert again.kappas == fitter.kappas
    assert "recomputing" in capsys.readouterr().err


def test_a_kappa_text_of_one_window_is_refused_since_it_has_no_error(pico_run: Path, pico_data: DataFolder) -> None:
    view = Checkpoint.open(pico_run / "latest").load()
    with pytest.raises(SettingsError, match="one window of"):
        prepare(view, pico_data, CALIBRATION, FitSettings(kappa_tokens=view.train_seq_len))


def test_it_says_what_more_calibration_text_costs(fitter: Fitter, capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds in proportion to tokens; nothing is said where there are as many already."""
    few = replace(fitter, stats=replace(fitter.stats, num_tokens=65536, seconds=20.0))
    show_training(few, {})
    assert "--calibration-tokens 262144: a lower loss at the same bytes, for about 60 s more" in capsys.readouterr().err
    show_training(replace(fitter, stats=replace(fitter.stats, num_tokens=262144)), {})
    assert "--calibration-tokens" not in capsys.readouterr().err
