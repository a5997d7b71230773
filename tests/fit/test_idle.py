"""Parts that cost nothing as zeros are stored as zeros, aloud, and the rest of the model is fitted as ever."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import Checkpoint, View, view_id
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError, OverBudgetError
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.build import Builder
from pgolf_post.fit.idle import NEGLIGIBLE_NATS, as_zeros, least_zeros_loss, require_idle, zeros_loss
from pgolf_post.fit.limits import MOST_BITS, fixed_bytes
from pgolf_post.fit.prepare import Fitter, prepare
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.report import show_zeros
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.fit.target_gap import limit_for_gap
from pgolf_post.pack.artifact import read_artifact

FC, PROJ = "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"
Edit = Callable[[dict[str, Tensor]], object]


def changed(view: View, edit: Edit) -> View:
    """The view with some tensors edited in a copy."""
    tensors = {name: tensor.clone() for name, tensor in view.tensors.items()}
    edit(tensors)
    return View(view.checkpoint, "raw", view_id(tensors, view.config), tensors)


def fitter_of(view: View, data: DataFolder, **settings: object) -> Fitter:
    chosen = FitSettings(kappa_tokens=256, trellis_states=8).model_copy(update=settings)
    return prepare(view, data, CalibrationSettings(tokens=512), chosen)


def budget(builder: Builder, bits: float) -> int:
    return fixed_bytes(builder) + round(builder.num_weights * bits / 8) + WINDOW_BYTES // 2


@pytest.fixture
def start(pico_run: Path) -> View:
    """The weights of step 0: projections of zeros."""
    [path] = pico_run.glob("*/step_000000-*")
    return Checkpoint.open(path).load("raw")


EDITS: dict[str, tuple[Edit, set[str]]] = {
    "a projection of zeros": (lambda t: t[PROJ].zero_(), {FC, PROJ}),
    "outputs of zeros": (lambda t: t[FC].zero_(), {FC, PROJ}),
    "a projection × 1e-9": (lambda t: t[PROJ].mul_(1e-9), {FC, PROJ}),
    "a denormal projection": (lambda t: t[PROJ].fill_(1e-42), {FC, PROJ}),
    "dead outputs": (lambda t: t[FC][:20].zero_(), set()),
    "equal outputs": (lambda t: t[FC][1:].copy_(t[FC][:1].expand(31, -1)), set()),
    "a row × 10": (lambda t: t[FC][3].mul_(10), set()),
}


IN_LONG = ("outputs of zeros", "a denormal projection", "equal outputs")  # the others' like


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if case in IN_LONG else []) for case in EDITS]
)
def test_what_costs_nothing_is_zero_and_the_budget_is_filled(view: View, pico_data: DataFolder, case: str) -> None:
    edit, expected = EDITS[case]
    fitter = fitter_of(changed(view, edit), pico_data)
    assert set(fitter.builder.zeros) == expected
    limit = budget(fitter.builder, 4.0)
    artifact = fit_artifact(fitter, limit)
    assert limit - WINDOW_BYTES <= artifact.path.stat().st_size <= limit
    restored = {name: torch.from_numpy(array) for name, array in read_artifact(artifact.path).tensors.items()}
    assert set(restored) == set(view.tensors)
    assert not any(restored[name].any() for name in expected)
    probe = Probe(fitter.view, probe_text(fitter.view, pico_data, 512, 3))
    assert probe.divergence({name: restored[name] for name in expected}).mean < 1e-9
    assert probe.divergence({name: restored[name] for name in fitter.builder.matrices}).mean < 0.05


def test_the_bound_on_what_zeros_cost_holds(view: View, pico_data: DataFolder) -> None:
    matrices = fitter_of(view, pico_data, kappa="off").builder.matrices.values()
    bounds = [(least_zeros_loss(m.weight, m.sensitivity), zeros_loss(m.weight, m.sensitivity)) for m in matrices]
    assert all(NEGLIGIBLE_NATS < least <= loss for least, loss in bounds)


@pytest.mark.parametrize("kappa", ["off", "role", "tensor"])
def test_step_0_is_fitted(start: View, pico_data: DataFolder, kappa: str) -> None:
    fitter = fitter_of(start, pico_data, kappa=kappa)
    idle = {name for name in start.tensors if name.startswith("blocks.") and name.endswith("proj.weight")}
    assert idle <= set(fitter.builder.zeros)
    artifact = fit_artifact(fitter, budget(fitter.builder, 4.0))
    restored = read_artifact(artifact.path).tensors
    assert not any(restored[name].any() for name in fitter.builder.zeros)
    assert restored["tok_emb.weight"].any()


def test_bytes_that_no_weight_can_use_are_left_over(
    start: View, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget for all weights is more than those that are left can use: it is met, not filled."""
    fitter = fitter_of(start, pico_data, kappa="off")
    builder = fitter.builder
    limit = budget(builder, MOST_BITS) + 2000
    artifact = fit_artifact(fitter, limit)
    assert artifact.path.stat().st_size <= budget(builder, MOST_BITS)
    assert "bytes are left over" in capsys.readouterr().err


def test_a_model_of_zeros_is_its_floats(view: View, pico_data: DataFolder) -> None:
    def clear(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.ndim == 2:
                tensor.zero_()

    fitter = fitter_of(changed(view, clear), pico_data)
    assert fitter.builder.matrices == {}
    artifact = fit_artifact(fitter, 10_000)
    assert artifact.meta["predicted_nats"] == 0
    assert limit_for_gap(fitter, 0.01) == artifact.path.stat().st_size
    with pytest.raises(OverBudgetError, match=r"what is left takes [\d,]+ of \d+ bytes|the least is about"):
        fit_artifact(fitter, 500)


def test_zeros_are_named_with_their_reason(
    view: View, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    fitter = fitter_of(changed(view, lambda tensors: tensors[PROJ].zero_()), pico_data)
    artifact = fit_artifact(fitter, budget(fitter.builder, 3.0))
    zeros = [facts for facts in artifact.meta["tensors"] if facts["method"] == "zeros"]
    assert {facts["name"]: facts["reason"] for facts in zeros} == {
        FC: "the loss does not depend on it",
        PROJ: "it holds zeros only",
    }
    show_zeros([{"zeros": zeros}])
    assert "holds zeros only" in capsys.readouterr().err
    show_zeros([{"zeros": []}])
    assert capsys.readouterr().err == ""


def test_blocks_are_fine_tuned_around_zeros(view: View, pico_data: DataFolder) -> None:
    fitter = fitter_of(changed(view, lambda tensors: tensors[PROJ].zero_()), pico_data, tune_tokens=256)
    artifact = fit_artifact(fitter, budget(fitter.builder, 3.0))
    assert not read_artifact(artifact.path).tensors[FC].any()


def test_text_that_calibration_did_not_see_is_asked(view: View, pico_data: DataFolder) -> None:
    """Zeros in the place of a matrix that predictions do depend on are an error, and more text is the way out."""
    zeros = {FC: as_zeros(FC, "mlp_fc", view.tensors[FC], 0.0, "the loss does not depend on it")}
    probe = Probe(view, probe_text(view, pico_data, 512, 0))
    with pytest.raises(NumericsError, match=rf"{FC}.*other training text does") as caught:
        require_idle(probe, zeros)
    assert caught.value.hint is not None
    assert "--calibration-tokens" in caught.value.hint


def test_a_model_without_such_parts_has_no_zeros(view: View, pico_data: DataFolder) -> None:
    fitter = fitter_of(view, pico_data, kappa="off")
    assert fitter.builder.zeros == {}
    assert "zeros" not in fitter.identity
    dead = fitter_of(changed(view, lambda tensors: tensors[PROJ].zero_()), pico_data, kappa="off")
    assert dead.identity["zeros"] == sorted([FC, PROJ])


@pytest.mark.parametrize("states", [0, 64])
def test_what_costs_less_as_zeros_than_rounded_is_zeros_in_that_build(
    view: View, pico_data: DataFolder, states: int
) -> None:
    """A matrix the loss hardly depends on gets steps far above its weights; rounded, it would be mostly error."""
    small = changed(view, lambda tensors: tensors[FC].mul_(0.1))
    builder = fitter_of(small, pico_data, kappa="off", trellis_states=states, row_feedback=False).builder
    assert FC not in builder.zeros
    matrix = builder.matrices[FC]
    coarse, fine = builder.quantize({FC: 0.01})[FC], builder.quantize({FC: 1e-5})[FC]
    assert not coarse.dequantize().any()
    assert coarse.facts["method"] == "zeros"
    assert "zeros cost less" in coarse.facts["reason"]
    assert coarse.facts["predicted_loss"] == pytest.approx(matrix.sensitivity.loss(matrix.weight))
    assert fine.facts["method"] == "fit"
    assert fine.facts["predicted_loss"] < matrix.loss_of_zeros
    for constant in (0.03, 0.001, 0.0003, 0.0001):
        assert builder.quantize({FC: constant})[FC].facts["predicted_loss"] <= matrix.loss_of_zeros


@pytest.mark.parametrize("states", [0, 64])
def test_an_outlier_makes_its_row_coarser(view: View, pico_data: DataFolder, states: int) -> None:
    """A weight that would need a symbol beyond 16 bits is stored; other rows are rounded as ever."""
    builder = fitter_of(view, pico_data, kappa="off", trellis_states=states).builder
    plain, weight = builder.quantize({FC: 0.0005})[FC].dequantize(), builder.matrices[FC].weight.clone()
    weight[3, 5] = 3e5
    builder.matrices[FC] = replace(builder.matrices[FC], weight=weight, row_factor=None)
    restored = builder.quantize({FC: 0.0005})[FC].dequantize()
    assert restored[3, 5] == pytest.approx(3e5, rel=1e-3)
    if not states:  # a trellis couples the rows of a column
        assert restored[:3] == pytest.approx(plain[:3], abs=0.05)


def test_damaged_statistics_are_named(view: View, pico_data: DataFolder) -> None:
    fitter = fitter_of(view, pico_data, kappa="off")
    fisher = fitter.stats.fisher
    assert fisher is not None
    rows = ChainMap({FC: torch.full((32,), torch.nan).double()}, fisher.rows)  # type: ignore[arg-type]
    stats = replace(fitter.stats, fisher=replace(fisher, rows=rows))
    with pytest.raises(NumericsError, match=rf"{FC}: .*NaN or infinity"):
        Builder(view, stats, FitSettings())
