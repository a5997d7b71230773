"""Trellis and row feedback named in a plan: through requant to disk and back, better than without, refused in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import plan_calibration, requant
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.plan import Plan, read_plan
from pgolf_post.quantize.gptq.driver import gptq
from pgolf_post.quantize.gptq.factorize import factorize
from pgolf_post.quantize.gptq.trellis import Trellis
from pgolf_post.quantize.model import quantize_view

FC = "blocks.1.mlp.fc.weight"
TRELLIS = ("matrices.trellis_states=8", "matrices.lane_rows=24")
COUPLED = ("matrices.row_feedback=true",)


def plan_of(*overrides: str) -> Plan:
    return read_plan("sdclip-1394", ["matrices.bits=4", "matrices.clip=5", *overrides])


@pytest.fixture
def fisher_stats(view: View, pico_data: DataFolder) -> Stats:
    """Statistics with the backward half, as requant collects them for a plan that reads it."""
    return calibrate(view, pico_data, plan_calibration(CalibrationSettings(tokens=640), plan_of(*COUPLED)))


@pytest.mark.parametrize(
    "overrides",
    [
        TRELLIS,
        ("embedding.trellis_states=4",),
        COUPLED,
        (*TRELLIS, *COUPLED),
        (*TRELLIS, *COUPLED, "matrices.per=group", "matrices.group_size=8"),
        (*TRELLIS, "matrices.awq_alpha=0.5"),
        (*TRELLIS, *COUPLED, "matrices.awq_alpha=0.5", "matrices.awq_fold=false"),
        (*TRELLIS, "matrices.per=tensor", "matrices.scale=absmax"),
    ],
)
def test_an_artifact_decodes_to_the_symbols_that_were_packed(
    view: View, fisher_stats: Stats, overrides: tuple[str, ...]
) -> None:
    plan = plan_of(*overrides)
    model, artifact = quantize_view(view, fisher_stats, plan), requant(view, fisher_stats, plan)
    decoded, restored = read_artifact(artifact.path), model.tensors()
    assert artifact.symbols_sha256 == model.symbols_sha256() == decoded.manifest["symbols_sha256"]
    assert decoded.tensors.keys() == restored.keys()
    assert all(np.array_equal(decoded.tensors[name], array) for name, array in restored.items())
    control = requant(view, fisher_stats, plan_of())
    assert artifact.id != control.id
    assert artifact.symbols_sha256 != control.symbols_sha256


def test_a_plan_gives_the_symbols_of_the_method_called_by_hand(view: View, fisher_stats: Stats) -> None:
    tensor = quantize_view(view, fisher_stats, plan_of(*TRELLIS, *COUPLED)).quantized[FC]
    scalar = quantize_view(view, fisher_stats, plan_of()).quantized[FC]
    assert np.array_equal(tensor.factors[0].values * 2, scalar.factors[0].values)  # the union grid is twice as fine
    assert fisher_stats.fisher is not None
    columns = factorize("in", fisher_stats.mean_hessian("blocks.1.mlp.in"), 0.01, act_order=True)
    rows = factorize("out", fisher_stats.fisher.mean_outputs(FC), 0.01, act_order=False)
    steps = torch.from_numpy(tensor.factors[0].values.astype(np.float32))
    trellis = Trellis(8, 24)
    symbols = gptq(view.tensors[FC], columns, steps, 7, trellis=trellis, row_feedback=rows.feedback)
    assert tensor.trellis == trellis
    assert np.array_equal(tensor.symbols, symbols.numpy())
    assert {"row_damp_used", "dead_rows", "trellis_states"} <= tensor.facts.keys()


def test_a_trellis_lowers_the_hessian_error_and_row_feedback_the_loss_of_both_sides(
    view: View, fisher_stats: Stats
) -> None:
    assert fisher_stats.fisher is not None
    outputs, hessian = fisher_stats.fisher.mean_outputs(FC), fisher_stats.mean_hessian("blocks.1.mlp.in")

    def losses(*overrides: str) -> tuple[float, float]:
        tensor = quantize_view(view, fisher_stats, plan_of(*overrides)).quantized[FC]
        error = view.tensors[FC].double() - torch.from_numpy(tensor.dequantize()).double()
        return float(tensor.facts["error"]), float(((outputs @ error @ hessian) * error).sum())

    plain, trellis, coupled = losses(), losses(*TRELLIS), losses(*COUPLED)
    assert trellis[0] < plain[0]
    assert coupled[1] < plain[1]


def test_lanes_are_no_longer_than_the_tensor(view: View, stats: Stats) -> None:
    tensor = quantize_view(view, stats, plan_of("matrices.trellis_states=8")).quantized[FC]
    assert tensor.trellis == Trellis(8, len(tensor.symbols))


def test_sequential_plans_couple_rows_by_the_statistics_at_hand(
    view: View, fisher_stats: Stats, text: CalibrationSet
) -> None:
    usual = quantize_view(view, fisher_stats, plan_of(*TRELLIS, *COUPLED))
    made = quantize_view(view, fisher_stats, plan_of(*TRELLIS, *COUPLED, "sequential=true"), text=text)
    first = [name for name in usual.quantized if name.startswith("blocks.0.")]
    assert all(np.array_equal(made.quantized[name].symbols, usual.quantized[name].symbols) for name in first)
    assert made.symbols_sha256() != usual.symbols_sha256()


def test_statistics_without_the_backward_half_are_refused_with_the_way_out(view: View, stats: Stats) -> None:
    with pytest.raises(MismatchError, match=r"rule 'matrices' has row_feedback, .* no backward half") as refused:
        quantize_view(view, stats, plan_of(*COUPLED))
    assert "calibrate --fisher" in str(refused.value.hint)
