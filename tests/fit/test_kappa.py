"""κ: believed as far as it was measured; and the probe that measures it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError
from pgolf_post.fit.kappa import LARGEST, estimate
from pgolf_post.fit.probe import Probe
from pgolf_post.fit.run import probe_text


def test_an_exact_measurement_is_believed() -> None:
    assert estimate(0.002, 0.003, 0.0) == pytest.approx(1.5)


def test_a_measurement_of_no_certainty_says_nothing() -> None:
    assert estimate(0.002, 0.003, math.inf) == 1
    assert abs(math.log(estimate(0.002, 0.003, 0.01))) < 0.05  # a spread of five times the prediction


def test_certainty_draws_towards_the_measurement() -> None:
    spreads = [abs(estimate(0.002, 0.006, error) - 3) for error in (0.0, 0.0005, 0.001, 0.002, 0.004)]
    assert spreads == sorted(spreads)


@pytest.mark.parametrize(("measured", "limit"), [(1.0, LARGEST), (1e-9, 1 / LARGEST), (-0.01, 1 / LARGEST)])
def test_kappa_has_limits(measured: float, limit: float) -> None:
    assert estimate(0.001, measured, 1e-12) == pytest.approx(limit)


@pytest.fixture
def probe(view: View, pico_data: DataFolder) -> Probe:
    return Probe(view, probe_text(view, pico_data, 512, 0))


def test_no_error_costs_nothing(probe: Probe, view: View) -> None:
    name = "blocks.0.mlp.fc.weight"
    assert probe.curvature({name: torch.zeros_like(view.tensors[name])}).mean == 0
    assert probe.difference({name: view.tensors[name]}).mean == 0


def test_the_curvature_is_even_and_quadratic(probe: Probe, view: View) -> None:
    name = "blocks.0.mlp.fc.weight"
    error = 0.02 * torch.randn(view.tensors[name].shape, generator=torch.Generator().manual_seed(0))
    plus, minus, double = (probe.curvature({name: factor * error}).mean for factor in (1, -1, 2))
    assert plus == pytest.approx(minus, rel=1e-6)
    assert double == pytest.approx(4 * plus, rel=0.2)


def test_probing_restores_the_weights(probe: Probe, view: View) -> None:
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    name = "blocks.2.attn.q.weight"
    with pytest.raises(NumericsError, match="not finite"):
        probe.difference({"tok_emb.weight": torch.full_like(view.tensors["tok_emb.weight"], math.nan)})
    probe.difference({name: 2 * view.tensors[name]})
    state = probe.module.state_dict()
    for key, tensor in before.items():
        assert torch.equal(view.tensors[key], tensor)
        assert torch.equal(state[key], tensor.float())
