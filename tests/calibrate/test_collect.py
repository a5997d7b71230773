"""The forward half: sums of what each site sees, additive, over all visits, the same for every batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.packed import mirror_upper, pack_upper, unpack_upper
from pgolf_post.calibrate.products import magnitudes, panel_gram, token_means, upper_gram
from pgolf_post.calibrate.stage import calibration_text, observe
from pgolf_post.calibrate.sums import Sums
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import NumericsError
from pgolf_post.families import Site
from tests.calibrate.conftest import SETTINGS, TOY_LOOKUPS, TOY_SITES, Toy


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10, shape)


def meaningful(sums: Tensor) -> Tensor:
    """Of a matrix the upper triangle."""
    return sums.triu() if sums.ndim == 2 else sums


def inputs_of(toy: Toy, tokens: np.ndarray) -> list[Tensor]:
    """The linear layer's input at each visit, in float64."""
    seen: list[Tensor] = []
    handle = toy.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    toy.hidden(torch.from_numpy(tokens))
    handle.remove()
    return seen


def test_the_hessian_of_a_linear_layer_is_its_inputs_xtx_over_all_visits(toy: Toy) -> None:
    tokens = draw((6, 5))
    sums, seen = collect(Observed(toy, TOY_SITES), tokens), inputs_of(toy, tokens)
    x = torch.cat(seen)
    assert len(seen) == toy.visits
    torch.testing.assert_close(mirror_upper(sums["hessian.linear.in"]), x.mT @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["abs.linear.in"], x.abs().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(sums["max.linear.in"], x.abs().amax(0))
    torch.testing.assert_close(
        sums["trace.linear.in"], torch.stack([v.square().sum() for v in seen]), rtol=1e-5, atol=0
    )
    assert float(sums["tokens.all"]) == 30


@pytest.mark.parametrize("fisher", [False, True])
def test_the_sums_of_two_texts_add_up_to_those_of_both(toy: Toy, fisher: bool) -> None:
    """With the backward half too: labels are drawn per window, so the second text is given its own windows' labels."""
    text = draw((9, 5), seed=1)
    observed = Observed(toy, TOY_SITES, TOY_LOOKUPS, fisher)
    whole, parts, second = collect(observed, text), Sums(), Sums()
    observed.add_batch(text, range(4), parts)
    observed.add_batch(text, range(4, 9), second)
    parts.merge(second)
    assert set(whole) == set(parts)
    for key in whole:
        torch.testing.assert_close(meaningful(whole[key]), meaningful(parts[key]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 7), (130, 65), (64, 130)])
def test_every_way_of_making_a_triangle_is_xtx(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width)
    expected = (x.double().mT @ x.double()).triu()
    for found in (upper_gram(x), panel_gram(x, 32), panel_gram(x, 512)):
        torch.testing.assert_close(found.triu().double(), expected, rtol=1e-4, atol=1e-4)
    total, largest = magnitudes(x)
    torch.testing.assert_close(total, x.abs().sum(0))
    assert torch.equal(largest, x.abs().amax(0))
    torch.testing.assert_close(token_means(x), x.square().mean(1))
    torch.testing.assert_close(Sums().add_gram("outputs.x", x), x.square().sum(0))


@pytest.mark.parametrize("n", [1, 7, 128, 300])
def test_packing_a_symmetric_matrix_loses_nothing_but_float64(n: int) -> None:
    a = torch.randn(n, n, dtype=torch.float64)
    symmetric = (a + a.mT).float().double()
    assert torch.equal(unpack_upper(pack_upper(symmetric)), symmetric)
    assert torch.equal(unpack_upper(pack_upper(symmetric.triu())), symmetric)
    assert torch.equal(mirror_upper(symmetric.triu() + 5 * torch.ones(n, n).tril(-1)), symmetric)


def test_a_site_and_its_neighbours_are_seen_in_the_real_model(
    pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    """Block 1 is looped: two visits, and its traces add up to the Hessian's; q, k and v share one site."""
    view = pico_checkpoint.load()
    observed = observe(view, SETTINGS)
    text = calibration_text(view, pico_data, SETTINGS, 16).tokens
    sums = collect(observed, text)
    for site in observed.sites:
        traces = sums[f"trace.{site.name}"]
        assert len(traces) == (2 if site.name.startswith("blocks.1.") else 1)
        assert (traces > 0).all()
        torch.testing.assert_close(float(traces.sum()), float(sums[f"hessian.{site.name}"].trace()), rtol=1e-6, atol=0)
    qkv = tuple(f"blocks.0.attn.{part}.weight" for part in "qkv")
    assert [site.tensors for site in observed.sites].count(qkv) == 1
    with torch.no_grad():
        x = observed.module.hidden(torch.from_numpy(text)).flatten(0, 1).double()  # type: ignore[operator]
    torch.testing.assert_close(mirror_upper(sums["hessian.head.in"]), x.mT @ x, rtol=1e-5, atol=1e-4)


def test_weights_that_overflow_name_the_site_they_break(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    view = pico_checkpoint.load()
    observed = observe(view, SETTINGS)
    weight = observed.module.get_parameter("blocks.2.mlp.fc.weight")
    weight.data = torch.full_like(weight, 1e30)
    with pytest.raises(NumericsError, match=r"'hessian' of 'blocks\.2\.mlp\.out' hold \d+ of 1024 values"):
        collect(observed, calibration_text(view, pico_data, SETTINGS, 16).tokens)


def test_observing_leaves_no_hooks_behind(toy: Toy) -> None:
    for fisher in (False, True):
        collect(Observed(toy, TOY_SITES, TOY_LOOKUPS, fisher), draw((2, 5)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in toy.modules())


def test_one_site_may_serve_several_matrices() -> None:
    site = Site("in", "q", ("q.weight", "k.weight"))
    assert [site.output_of(tensor) for tensor in site.tensors] == ["q", "k"]
