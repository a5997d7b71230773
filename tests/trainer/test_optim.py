"""Optimizer laws: Muon's update is orthogonal, batching changes nothing, every parameter has one group."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from tests.trainer.test_model import pico_model
from trainer.config import CompileChoice
from trainer.optim.averages import EMA, RunningMean
from trainer.optim.compiled_updates import CompiledUpdates, iterations, updates_for
from trainer.optim.muon import (
    COEFFICIENTS,
    Coefficients,
    NewtonSchulz,
    Scheme,
    muon_updates,
    narrow_dtype,
    narrow_iterations,
    orthogonalize,
)
from trainer.optim.optimizer import Optimizer, assign_groups
from trainer.optim.settings import OptimSettings
from trainer.step.compiled import num_compiled_graphs
from trainer.step.distributed import TrainingRanks, Transfer

CHOICES: tuple[CompileChoice, ...] = ("auto", True, False)
SETTINGS = OptimSettings(momentum_warmup_steps=0)
MUON = (Scheme("polar_express"), True)  # Newton-Schulz scheme, row normalisation
SHAPES = [(8, 8), (6, 16), (16, 6), (1, 5)]


@pytest.mark.parametrize("scheme", get_args(NewtonSchulz))
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_brings_singular_values_near_one(scheme: NewtonSchulz, shape: tuple[int, int]) -> None:
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(matrices, scheme))
    if min(shape) < 8:  # a random square matrix may be nearly singular; the others are well conditioned
        assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3


@pytest.mark.parametrize("scheme", get_args(NewtonSchulz))
@pytest.mark.parametrize("narrow_form", [narrow_iterations, iterations])
def test_newton_schulz_in_bfloat16_is_near_that_in_float32(
    scheme: NewtonSchulz, narrow_form: Callable[[Tensor, Coefficients], Tensor]
) -> None:
    gradients = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(gradients, scheme)
    narrow = orthogonalize(gradients, scheme, torch.bfloat16, narrow=narrow_form)
    assert narrow.dtype == torch.bfloat16
    error = (narrow.float() - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.025  # measured: 1.0 to 1.7 %, over shapes from 64 × 256 to 2,048 × 512
    singular, theirs = torch.linalg.svdvals(narrow.float()), torch.linalg.svdvals(exact)
    assert float((singular - theirs).abs().max()) < 0.03
    assert torch.equal(
        orthogonalize(gradients.double(), scheme, torch.bfloat16), orthogonalize(gradients.double(), scheme)
    )


def test_compiled_updates_are_one_graph_whatever_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.step.compiled.COMPILER", "aot_eager")
    updates, before = CompiledUpdates(), num_compiled_graphs()
    generator = torch.Generator().manual_seed(3)
    momenta, expected = torch.zeros(2, 6, 16), torch.zeros(2, 6, 16)
    for momentum in (0.85, 0.9, 0.95):
        gradients = torch.randn(2, 6, 16, generator=generator)
        torch.testing.assert_close(
            updates(gradients, momenta, momentum, *MUON), muon_updates(gradients, expected, momentum, *MUON)
        )
        torch.testing.assert_close(momenta, expected)
    assert num_compiled_graphs() == before + 1


def test_updates_are_compiled_on_a_gpu_alone_and_only_where_a_run_compiles() -> None:
    chosen = {(choice, kind): updates_for(choice, torch.device(kind)) for choice in CHOICES for kind in ("cpu", "cuda")}
    assert {key for key, updates in chosen.items() if updates is not muon_updates} == {("auto", "cuda"), (True, "cuda")}


def test_newton_schulz_is_bfloat16_on_a_gpu_unless_asked_otherwise() -> None:
    assert [narrow_dtype(choice, on_gpu) for choice in ("auto", "fp32", "bf16") for on_gpu in (False, True)] == [
        *(None, torch.bfloat16),
        *(None, None),
        *(torch.bfloat16, torch.bfloat16),
    ]


def test_a_step_with_bfloat16_updates_moves_every_matrix_as_float32_does() -> None:
    moved = []
    for dtype in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = pico_model()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model(torch.arange(2, 26).view(2, 12)).square().mean().backward()
        Optimizer(model, OptimSettings(newton_schulz_dtype=dtype)).step(1.0, 0.9)
        moved.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    for name, ours in moved[0].items():
        # directions that the gradient hardly has are where the two differ; measured: at most 6 % of the step
        assert float((moved[1][name] - ours).norm()) <= 0.15 * float(ours.norm()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_batched_update_equals_one_by_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients, momenta = (torch.randn(3, *shape, generator=generator) for _ in range(2))
    apart = torch.cat([muon_updates(gradients[i : i + 1], momenta[i : i + 1].clone(), 0.9, *MUON) for i in range(3)])
    torch.testing.assert_close(muon_updates(gradients, momenta.clone(), 0.9, *MUON), apart, rtol=1e-4, atol=1e-5)


def test_update_is_invariant_to_the_gradient_scale() -> None:
    gradient = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(2))
    updates = [muon_updates(scale * gradient, torch.zeros(1, 6, 9), 0.9, *MUON) for scale in (1.0, 1e3)]
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    model = pico_model(tie_embeddings=tied)
    optimizer = Optimizer(model, SETTINGS)
    stepped = [name for bank in optimizer.banks for name in bank.names]
    stepped += [name for names in optimizer.adam_names.values() for name in names]
    assert sorted(stepped) == sorted(name for name, _ in model.named_parameters())
    groups = assign_groups(model)
    assert ("head" in groups) == (not tied)
    assert "blocks.0.attn.q.weight" in groups["matrix"]
    assert "skip_weights" in groups["scalar"]  # two dimensions, but no matrix of a linear map


def test_a_parameter_in_no_group_is_an_error() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 3, 4, bias=False)})
    with pytest.raises(SettingsError, match=r"parameter conv\.weight of shape \(3, 2, 4\) is in no group"):
        Optimizer(model, SETTINGS)


def test_a_parameter_in_two_groups_is_an_error() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5, bias=False)})
    model["lm_head"].weight = model["table"].weight
    with pytest.raises(SettingsError, match=r"table\.weight = lm_head\.weight .* is in groups embed and head"):
        Optimizer(model, SETTINGS)


def test_a_tensor_under_two_names_of_one_group_steps_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert assign_groups(model) == {"matrix": ["a.weight"]}


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


@given(every=st.integers(1, 7), rounds=st.integers(1, 5))
def test_an_ema_updated_every_n_steps_forgets_as_fast(every: int, rounds: int) -> None:
    model = nn.Linear(2, 2)
    each, sparse = EMA(model, 0.1), EMA(model, 0.1, every)  # 0.1: below the ramp from the first step on
    with torch.no_grad():
        model.weight.add_(1.0)
    for step in range(1, every * rounds + 1):
        each.update(step)
        sparse.update(step)
    torch.testing.assert_close(sparse.shadow["weight"], each.shadow["weight"])


@given(every=st.integers(1, 5), steps=st.integers(0, 20))
def test_a_running_mean_is_the_mean_of_the_models_that_entered(every: int, steps: int) -> None:
    model = nn.Linear(3, 2)
    running, entered = RunningMean(model, every), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.full_like(model.weight, 1.0 / step))
        running.update(step)
        if step % every == 0:
            entered.append(model.weight.detach().clone().double())
    assert running.count == len(entered)
    if entered:
        expected = torch.stack(entered).mean(0).float()
        torch.testing.assert_close(running.mean["weight"], expected)
        assert running.mean["weight"].dtype == torch.float32


def test_tapered_weight_decay_is_smaller_weight_decay() -> None:
    halved = {"matrix_weight_decay": 0.05, "embed_weight_decay": 0.04, "scalar_weight_decay": 0.03}
    stepped = []
    for decays, multiplier in ((halved, 1.0), ({key: 2 * decay for key, decay in halved.items()}, 0.5)):
        model = pico_model()
        (model(torch.arange(12)[None]).square().mean() * 1e3).backward()
        Optimizer(model, OptimSettings(**decays)).step(1.0, 0.9, multiplier)
        stepped.append(model.state_dict())
    for name, tensor in stepped[0].items():
        torch.testing.assert_close(tensor, stepped[1][name], msg=name)


def test_every_embedding_table_is_stepped_by_adam() -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.proj = nn.Embedding(5, 4), nn.Linear(4, 4, bias=False)

    optimizer = Optimizer(WithTable(), SETTINGS)
    assert optimizer.adam_names == {"embed": ["table.weight"]}
    assert [bank.names for bank in optimizer.banks] == [["proj.weight"]]
    assert optimizer.learning_rates(0.5) == {"matrix": 0.01, "embed": 0.015}


def test_a_matrix_that_a_step_did_not_use_stays_as_it_is() -> None:
    model = nn.ModuleList([*(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Embedding(2, 2)])
    optimizer = Optimizer(model, OptimSettings(matrix_weight_decay=0.5))
    before = [layer.weight.detach().clone() for layer in model]  # of the table too, which is not used either
    (model[0].weight.square().sum() + model[2].weight.sum()).backward()
    optimizer.step(1.0, 0.9)
    changed = [not torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True)]
    assert changed == [True, False, True, False]
    assert [bool(momentum.any()) for momentum in optimizer.banks[0].momenta] == [True, False, True]


def test_clipping_each_ranks_own_gradients_is_clipping_all_on_one_rank() -> None:
    states = []
    for whose in ("all", "each"):
        torch.manual_seed(0)
        model = pico_model()
        (model(torch.arange(12)[None]).square().mean() * 1e3).backward()
        optimizer = Optimizer(model, OptimSettings(grad_clip=0.3, clip_norm_of=whose))
        assert optimizer.step(1.0, 0.9) > 0.3
        states.append(optimizer.state())
    for name, moment in states[0].items():
        torch.testing.assert_close(states[1][name], moment, rtol=1e-5, atol=1e-9, msg=name)


def test_a_ranks_own_gradients_are_clipped_as_the_mean_over_its_own_tokens() -> None:
    class OneOfFour(TrainingRanks):
        """A rank whose three neighbours are silent: what it sends comes back."""

        def begin_sum_(self, tensors):  # type: ignore[no-untyped-def]
            return lambda: None

        def reduce_scatter(self, rows):  # type: ignore[no-untyped-def]
            return Transfer(rows[: len(rows) // self.world_size])

        def all_gather(self, rows):  # type: ignore[no-untyped-def]
            return Transfer(rows.repeat(self.world_size, 1, 1))

    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Embedding(2, 2)])
    optimizer = Optimizer(model, OptimSettings(grad_clip=0.5, clip_norm_of="each"), OneOfFour(0, 4))
    model[0].weight.grad, model[1].weight.grad = torch.full((4, 4), 0.25), torch.zeros(2, 2)  # norm 1, a fourth of 4
    assert float(optimizer.step(1.0, 0.9)) == pytest.approx(4.0)
    torch.testing.assert_close(optimizer.banks[0].momenta[0], torch.full((4, 4), 0.25 * 0.5 / 4), rtol=1e-5, atol=0)


def test_a_clip_that_cannot_act_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_norm_of each acts only with grad_clip above 0"):
        OptimSettings(grad_clip=0.0, clip_norm_of="each")


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e9])
def test_the_norm_is_of_all_gradients_and_clipping_scales_them_all(clip: float) -> None:
    model = pico_model()
    (model(torch.arange(12)[None]).square().mean() * 1e3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    total = float(torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt())
    optimizer = Optimizer(model, OptimSettings(grad_clip=clip))
    assert optimizer.step(1.0, 0.9) == pytest.approx(total, rel=1e-5)
    scale = min(1.0, clip / total) if clip else 1.0
    state = optimizer.state()
    for name, gradient in gradients.items():  # the first step's moments are the gradients
        moment = state[f"momentum.{name}"] if f"momentum.{name}" in state else state[f"exp_avg.{name}"] / 0.1
        torch.testing.assert_close(moment, scale * gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_newton_schulz_takes_as_many_steps_as_asked() -> None:
    matrices = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    start = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for scheme, steps in (("classic", 7), ("polar_express", 3)):
        x = start
        for a, b, c in (COEFFICIENTS[scheme] * 2)[:steps]:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        assert torch.equal(orthogonalize(matrices, scheme, None, steps), x)
        assert torch.equal(orthogonalize(matrices, scheme, None, 5), orthogonalize(matrices, scheme))
    torch.manual_seed(0)
    moved = []
    for steps in (5, 1):
        model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Embedding(2, 2)])
        nn.init.eye_(model[0].weight)
        model[0].weight.grad = torch.arange(16.0).view(4, 4)
        Optimizer(model, OptimSettings(newton_schulz="classic", newton_schulz_steps=steps)).step(1.0, 0.9)
        moved.append(model[0].weight.detach())
    assert not torch.equal(*moved)
    with pytest.raises(ValueError, match="newton_schulz_steps 6: polar_express has coefficients for 5 iterations"):
        OptimSettings(newton_schulz_steps=6)
