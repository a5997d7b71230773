"""Steps of any size are stored: a power of two takes what fp16 has no room for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.errors import NumericsError
from pgolf_post.pack.artifact import unpack
from pgolf_post.pack.container import pack
from pgolf_post.plan import read_plan
from pgolf_post.quantize.clip import grid_steps, max_symbol
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.rtn import round_to_nearest
from pgolf_post.quantize.stored_steps import octaves_of, step_factors, to_stored
from pgolf_post.quantize.tensor import LOW_RANK, scale_of
from pgolf_post.rules import CLIP_RULES, RtnRule

STEPS = torch.tensor([0.3, 1.7, 2.0 - 2.0**-12, 40.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e-9, 1.0, 1e4, 1e6, 1e20])
def test_factors_are_the_stored_steps_bit_for_bit(size: float) -> None:
    stored = to_stored("w", STEPS * size, "row")
    assert torch.allclose(stored.double(), STEPS * size, rtol=1e-3)
    factors = step_factors("row", stored)
    assert np.array_equal(scale_of(factors, 4, 1)[:, 0], stored.numpy())
    assert len(factors) == (2 if octaves_of(stored) else 1)


def test_steps_that_fp16_holds_have_no_power_beside_them() -> None:
    [factor] = step_factors("row", to_stored("w", STEPS, "row"))
    assert factor.values.dtype == np.float16
    assert np.array_equal(factor.values, STEPS.to(torch.float16).numpy())


def test_a_step_that_rounds_up_to_a_power_of_two_takes_its_neighbours_along() -> None:
    steps = torch.tensor([(2.0 - 2.0**-13) * 2.0**-40, 3.0 * 2.0**-77], dtype=torch.float64)
    stored = to_stored("w", steps, "row")
    assert np.array_equal(scale_of(step_factors("row", stored), 2, 1)[:, 0], stored.numpy())


def test_steps_too_far_apart_name_tensor_and_unit() -> None:
    with pytest.raises(
        NumericsError, match=r"tok_emb\.weight: the step of group 1 is 1e-20 and the largest 1"
    ) as caught:
        to_stored("tok_emb.weight", torch.tensor([1.0, 1e-20], dtype=torch.float64), "group")
    assert caught.value.hint is not None
    assert 'tensors = "tok_emb.weight" and method = "keep"' in caught.value.hint


@pytest.mark.parametrize("scale", CLIP_RULES)
@pytest.mark.parametrize("octaves", [-90, -40, 30, 70])
def test_a_matrix_times_a_power_of_two_has_the_same_symbols(scale: str, octaves: int) -> None:
    """A rule chooses steps by proportion, whatever the size of the weights."""
    generator = torch.Generator().manual_seed(0)
    weight, diagonal = torch.randn(5, 64, generator=generator), torch.rand(64, generator=generator)
    weight[2] = 0
    rule = RtnRule(name="r", bits=6, scale=scale)
    symbols = []
    for matrix in (weight, weight * 2.0**octaves):
        steps = grid_steps("w", matrix, rule, 12.85, diagonal)
        symbols.append(round_to_nearest(matrix, steps, max_symbol(6)))
    assert torch.equal(*symbols)
    assert symbols[0][0].any()
    assert not symbols[0][2].any()


def test_weights_that_float32_hardly_holds_are_zeros() -> None:
    weight = torch.full((3, 8), 1e-42)
    steps = grid_steps("w", weight, RtnRule(name="r", bits=6), 12.85)
    assert not round_to_nearest(weight, steps, 31).any()


PLANS = {
    "sdclip": ("sdclip-1394", []),
    "trellis": ("sdclip-1394", ["matrices.trellis_states=4"]),
    "percentile": ("sdclip-1394", ['*.scale="percentile"']),
    "low-rank corrections": ("record-1855", []),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_with_small_and_large_matrices_is_decoded(view: View, stats: Stats, plan: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in view.tensors.items()}
    small, large = "blocks.0.attn.q.weight", "blocks.1.mlp.fc.weight"
    tensors[small] *= 1e-9
    tensors[large][3] *= 1e7
    changed = replace(view, tensors=tensors)
    model = quantize_view(changed, stats, read_plan(*PLANS[plan]))
    decoded = unpack(pack(model)).tensors
    for name in (small, large):
        restored, weight = torch.from_numpy(decoded[name]).double(), tensors[name].double()
        if not model.quantized.keys() & {name + suffix for suffix in LOW_RANK}:
            assert np.array_equal(decoded[name], model.quantized[name].dequantize())
        assert float((restored - weight).norm() / weight.norm()) < 0.75, name  # zeros would be 1
