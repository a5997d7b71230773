"""κ: believed as far as it was measured; and the probe that measures it leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError
from pgolf_post.families import load_module
from pgolf_post.fit.kappa import LARGEST, Kappa, estimate, of_role, weighted_median
from pgolf_post.fit.probe import Probe, probe_text


def test_an_exact_measurement_is_believed() -> None:
    assert estimate(0.002, 0.003, 0.0) == pytest.approx(1.5)


def test_kappas_are_drawn_towards_what_they_have_in_common() -> None:
    assert estimate(0.002, 0.006, math.inf, common=0.7) == 0.7
    assert estimate(0.002, 0.0014, 0.0005, common=0.7) == pytest.approx(0.7)


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


def test_the_views_own_weights_diverge_by_nothing(probe: Probe, view: View) -> None:
    assert probe.divergence({}).mean == 0
    assert probe.divergence({"tok_emb.weight": view.tensors["tok_emb.weight"]}).mean == 0


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc.weight", "tok_emb.weight"])  # a matrix, and the head itself
def test_the_divergence_is_positive_and_quadratic(probe: Probe, view: View, name: str) -> None:
    error = 0.02 * torch.randn(view.tensors[name].shape, generator=torch.Generator().manual_seed(0))
    single, double = (probe.divergence({name: view.tensors[name] + factor * error}).mean for factor in (1, 2))
    assert single > 0
    assert double == pytest.approx(4 * single, rel=0.2)


def test_the_divergence_is_the_definition(probe: Probe, view: View) -> None:
    name = "blocks.0.mlp.fc.weight"
    changed = {key: tensor.clone() for key, tensor in view.tensors.items()} | {name: 1.2 * view.tensors[name]}
    tokens = torch.from_numpy(probe.text.tokens)
    own, other = (
        torch.log_softmax(module.logits(module.hidden(tokens)), -1)  # type: ignore[operator]
        for module in (load_module(view.config, weights, "test") for weights in (view.tensors, changed))
    )
    expected = (own.exp() * (own - other)).sum(-1).mean()
    assert probe.divergence({name: changed[name]}).mean == pytest.approx(float(expected), rel=1e-4)


def test_compiled_it_is_the_same_on_one_graph(probe: Probe, view: View) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    name, compiled = "blocks.0.mlp.fc.weight", Probe(view, probe.text, backend="eager")
    change = {name: 1.2 * view.tensors[name]}
    assert compiled.divergence(change).mean == pytest.approx(probe.divergence(change).mean, rel=1e-4)
    assert compiled.divergence({}).mean == 0
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2  # hidden, logits
    assert not counters["graph_break"]


def test_probing_restores_the_weights(probe: Probe, view: View) -> None:
    before = {name: tensor.clone() for name, tensor in view.tensors.items()}
    with pytest.raises(NumericsError, match="not finite"):
        probe.divergence({"tok_emb.weight": torch.full_like(view.tensors["tok_emb.weight"], math.nan)})
    probe.divergence({"blocks.2.attn.q.weight": 2 * view.tensors["blocks.2.attn.q.weight"]})
    state = probe.module.state_dict()
    for key, tensor in before.items():
        assert torch.equal(view.tensors[key], tensor)
        assert torch.equal(state[key], tensor.float())


def test_one_outlier_does_not_set_a_roles_kappa() -> None:
    """Five tensors of κ about 1 and one of 60 times the loss: a ratio of sums would be 11, the median stays at 1."""
    usual = [Kappa(0.001, 0.001 * k, 0.0001, k) for k in (0.9, 0.95, 1.0, 1.05, 1.1)]
    outlier = Kappa(0.001, 0.06, 0.0001, 4.0)
    role = of_role([*usual, outlier])
    assert role.measured / role.predicted > 10
    assert role.kappa == pytest.approx((1.0 * 1.05) ** 0.5, rel=0.05)
    assert role.error == pytest.approx(0.0001 * 6**0.5)
    assert of_role([outlier]).kappa == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("values", "weights", "median"),
    [
        ([3.0], [1.0], 3.0),
        ([1.0, 2.0], [1.0, 1.0], 1.5),
        ([5.0, 1.0, 2.0], [1.0, 1.0, 1.0], 2.0),
        ([1.0, 2.0, 9.0], [1.0, 1.0, 3.0], 9.0),
        ([9.0, 1.0, 2.0], [1.0, 1.0, 3.0], 2.0),
    ],
)
def test_a_weighted_median_has_half_of_the_weight_on_either_side(
    values: list[float], weights: list[float], median: float
) -> None:
    assert weighted_median(values, weights) == pytest.approx(median)
