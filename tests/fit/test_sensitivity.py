"""What the loss minds: both sides of a tied embedding, shrunk estimates, and statistics that do not suffice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.families import Site, build_module, get_family
from pgolf_post.fit.sensitivity import LARGEST_ROW_RATIO, sensitivities, sensitivity
from pgolf_post.fit.settings import FitSettings

RAW = FitSettings(
    weighted=1.0, hessian_share=1.0, ridge=1e-9, row_trust=1.0, lookup_frequency="counted", lookup_floor=1e-9
)


@pytest.fixture
def fisher_stats(view: View, pico_data: DataFolder) -> Stats:
    return calibrate(view, pico_data, CalibrationSettings(tokens=512, fisher=True))


@pytest.fixture
def sites(view: View) -> dict[str, Site]:
    found = get_family(view.config["family"]).sites(build_module(view.config))
    return {tensor: site for site in found for tensor in site.tensors}


def test_without_shrinking_an_error_in_one_row_costs_what_fisher_says(
    view: View, fisher_stats: Stats, sites: dict[str, Site]
) -> None:
    name = "blocks.1.mlp.fc.weight"
    minded = sensitivity(name, sites[name], fisher_stats, RAW)
    fisher = fisher_stats.fisher
    assert fisher is not None
    error = torch.zeros_like(view.tensors[name], dtype=torch.float64)
    error[3] = torch.randn(error.size(1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = fisher.mean_rows(name)
    share = (rows / rows.mean()).clamp(1 / LARGEST_ROW_RATIO, LARGEST_ROW_RATIO)
    expected = 0.5 * share[3] / share.mean() * (error[3] @ fisher.mean_weighted(name) @ error[3])
    assert minded.loss(error) == pytest.approx(float(expected), rel=1e-6)


def test_rows_that_are_minded_together_cost_what_fisher_says(fisher_stats: Stats, sites: dict[str, Site]) -> None:
    """½·Σ_ik C_ik·e_i M e_kᵀ, C the outputs' second moment in units of its mean diagonal."""
    name = "blocks.1.attn.v.weight"
    minded, fisher = sensitivity(name, sites[name], fisher_stats, RAW), fisher_stats.fisher
    assert fisher is not None
    outputs, moments = fisher.mean_outputs(name), fisher.mean_weighted(name)
    shares = outputs.diagonal() / outputs.diagonal().mean()
    assert shares.max() < LARGEST_ROW_RATIO
    assert shares.min() > 1 / LARGEST_ROW_RATIO
    error = torch.randn(len(outputs), len(moments), generator=torch.Generator().manual_seed(0)).double()
    expected = 0.5 * float(((outputs / outputs.diagonal().mean() @ error @ moments) * error).sum())
    assert minded.loss(error) == pytest.approx(expected, rel=1e-6)
    alone = sensitivity(name, sites[name], fisher_stats, RAW.model_copy(update={"row_feedback": False}))
    assert alone.coupling is None
    assert torch.equal(alone.rows, minded.rows)


def test_coupling_shrinks_what_rows_share_and_nothing_else(fisher_stats: Stats, sites: dict[str, Site]) -> None:
    name = "blocks.1.attn.v.weight"
    full, half, none = (
        sensitivity(name, sites[name], fisher_stats, RAW.model_copy(update={"coupling": share})).coupling
        for share in (1.0, 0.5, 0.0)
    )
    assert full is not None
    assert half is not None
    assert none is not None
    assert torch.equal(none, torch.diag(full.diagonal()))
    torch.testing.assert_close(half, (full + none) / 2)


def test_no_row_of_a_table_or_head_is_coupled(fisher_stats: Stats, sites: dict[str, Site]) -> None:
    found = sensitivities(sites, sites.values(), fisher_stats, FitSettings())
    assert {name for name, minded in found.items() if minded.coupling is None} == {"tok_emb.weight"}
    for name, minded in found.items():
        if minded.coupling is not None:
            assert torch.allclose(minded.coupling.diagonal(), minded.rows), name
            assert torch.linalg.eigvalsh(minded.coupling).min() > 0, name


def test_a_tied_embedding_is_minded_by_head_and_lookups(fisher_stats: Stats, sites: dict[str, Site]) -> None:
    name, fisher = "tok_emb.weight", fisher_stats.fisher
    assert fisher is not None
    both = sensitivity(name, sites[name], fisher_stats, RAW)
    head, lookups = fisher.mean_weighted(name), fisher.lookup_hessians[name] / fisher.num_tokens
    assert torch.allclose(both.moments, head + lookups / len(both.rows), rtol=1e-6, atol=1e-12)
    assert both.moments.trace() > head.trace()


def test_rows_keep_their_mean_and_their_limits(view: View, fisher_stats: Stats, sites: dict[str, Site]) -> None:
    found = sensitivities(sites, sites.values(), fisher_stats, FitSettings())
    for name, minded in found.items():
        assert float(minded.rows.mean()) == pytest.approx(1), name
        assert float(minded.rows.max() / minded.rows.min()) <= LARGEST_ROW_RATIO**2 * 1.001, name
        assert torch.linalg.eigvalsh(minded.moments).min() > 0, (
            name
        )  # rank-deficient ones too: fewer tokens than inputs


def test_a_rank_deficient_hessian_is_handled(fisher_stats: Stats, sites: dict[str, Site], view: View) -> None:
    name = "blocks.0.attn.q.weight"
    fisher = fisher_stats.fisher
    assert fisher is not None
    direction = torch.zeros(view.tensors[name].size(1), dtype=torch.float64)
    direction[2] = 1
    rank_one = torch.outer(direction, direction)
    stats = replace(
        fisher_stats, hessians={sites[name].name: rank_one}, fisher=replace(fisher, weighted={name: rank_one})
    )
    minded = sensitivity(name, sites[name], stats, FitSettings())
    assert 0 < minded.least <= torch.linalg.eigvalsh(minded.moments).min() * (1 + 1e-9)


def test_statistics_without_the_backward_half_are_refused(stats: Stats, sites: dict[str, Site]) -> None:
    name = "blocks.0.attn.q.weight"
    with pytest.raises(MismatchError, match="no backward half") as caught:
        sensitivity(name, sites[name], replace(stats, fisher=None), FitSettings())
    assert caught.value.hint == "pgolf-post calibrate --fisher"


def test_a_matrix_that_nothing_reached_costs_nothing(view: View, fisher_stats: Stats, sites: dict[str, Site]) -> None:
    name = "blocks.0.attn.q.weight"
    fisher = fisher_stats.fisher
    assert fisher is not None
    empty = replace(fisher, weighted={name: torch.zeros(16, 16, dtype=torch.float64)})
    minded = sensitivity(name, sites[name], replace(fisher_stats, fisher=empty), RAW)
    assert minded.loss(view.tensors[name]) == 0


def test_a_table_that_only_the_head_uses_has_the_heads_sensitivity(fisher_stats: Stats, sites: dict[str, Site]) -> None:
    """A side that no gradient reaches adds nothing, not 0/0."""
    name, fisher = "tok_emb.weight", fisher_stats.fisher
    assert fisher is not None
    nothing = replace(
        fisher,
        lookup_rows={name: torch.zeros_like(fisher.lookup_rows[name])},
        lookup_hessians={name: torch.zeros_like(fisher.lookup_hessians[name])},
    )
    minded = sensitivity(name, sites[name], replace(fisher_stats, fisher=nothing), RAW)
    assert torch.allclose(minded.moments, fisher.mean_weighted(name), rtol=1e-6, atol=1e-12)
    assert torch.isfinite(minded.rows).all()
