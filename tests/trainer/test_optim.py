"""Optimizer laws: Muon's update is orthogonal, batching changes nothing, every parameter has one group."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.trainer.test_model import pico_model
from trainer.optim import EMA, NewtonSchulz, Optimizer, OptimSettings, group_of, muon_updates, orthogonalize

SETTINGS = OptimSettings(momentum_warmup_steps=0)
SHAPES = [(8, 8), (6, 16), (16, 6), (1, 5)]


@pytest.mark.parametrize("scheme", get_args(NewtonSchulz))
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_brings_singular_values_near_one(scheme: NewtonSchulz, shape: tuple[int, int]) -> None:
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(matrices, scheme))
    if min(shape) < 8:  # a random square matrix may be nearly singular; the others are well conditioned
        assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_batched_update_equals_one_by_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients, momenta = (torch.randn(3, *shape, generator=generator) for _ in range(2))
    apart = torch.cat([muon_updates(gradients[i : i + 1], momenta[i : i + 1].clone(), 0.9, SETTINGS) for i in range(3)])
    torch.testing.assert_close(muon_updates(gradients, momenta.clone(), 0.9, SETTINGS), apart, rtol=1e-4, atol=1e-5)


def test_update_is_invariant_to_the_gradient_scale() -> None:
    gradient = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(2))
    updates = [muon_updates(scale * gradient, torch.zeros(1, 6, 9), 0.9, SETTINGS) for scale in (1.0, 1e3)]
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    model = pico_model(tie_embeddings=tied)
    optimizer = Optimizer(model, SETTINGS)
    stepped = [name for names in optimizer.matrices.values() for name in names]
    stepped += [name for names in optimizer.adam_names.values() for name in names]
    assert sorted(stepped) == sorted(name for name, _ in model.named_parameters())
    assert group_of("blocks.0.attn.q.weight", torch.zeros(2, 2)) == "matrix"
    assert group_of("skip_weights", torch.zeros(2, 2)) == "scalar"


def test_a_step_moves_matrices_by_the_learning_rate_and_clips_the_rest() -> None:
    model = pico_model()
    optimizer = Optimizer(model, OptimSettings(matrix_lr=0.1, matrix_weight_decay=0.0, grad_clip=0.3))
    before = model.blocks[0].mlp.fc.weight.detach().clone()
    (model(torch.arange(12)[None]).square().mean() * 1e3).backward()
    norm = optimizer.step(1.0, 0.0)
    assert norm > 0.3
    moved = (model.blocks[0].mlp.fc.weight - before).detach()
    scale = 0.1 * (moved.shape[0] / moved.shape[1]) ** 0.5
    assert float(torch.linalg.svdvals(moved).max()) == pytest.approx(scale, rel=0.3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ema_follows_its_recurrence() -> None:
    model = pico_model()
    ema = EMA(model, 0.9)
    expected = model.tok_emb.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.tok_emb.weight.add_(1.0)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.tok_emb.weight.detach()
    torch.testing.assert_close(ema.shadow["tok_emb.weight"], expected)
