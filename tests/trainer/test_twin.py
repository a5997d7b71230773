"""The bfloat16 twin: its gradients are the model's to bfloat16, and what is trained stays float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from trainer.model.attention import Attention
from trainer.model.block import Block
from trainer.model.gpt import GolfGPT
from trainer.run.loop import Trainer
from trainer.run.warm_up import synthetic_batch
from trainer.step.compiled import training_loss
from trainer.step.twin import Folded, narrow_stream

WHOLE: dict[str, Any] = {
    "num_layers": 5, "loop_end": 2, "lanes_start": 3, "smear_gate": True, "attn_gate": "sparse", "carry": "learnable",
    "isolate_documents": True, "bigram_buckets": 64, "value_embed_layers": (1,), "value_embed_dim": 8,
}  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def trainer(data: DataFolder, root: Path, stream: str, **tables: dict[str, Any]) -> Trainer:
    run = {"precision": "bf16", "stream": stream, **tables.pop("run", {})}
    return Trainer(pico_recipe(data, root, run=run, **{"model": WHOLE, **tables}))


def gradients(run: Trainer, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    run.model.zero_grad(set_to_none=True)
    run.gradients.accumulate(batches)
    return {name: p.grad.double() for name, p in run.model.named_parameters() if p.grad is not None}


def disturb(run: Trainer) -> None:
    """Change every weight, so that no product of theirs is zero."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


def exact_gradients(run: Trainer, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model = run.model.double()
    model.zero_grad(set_to_none=True)
    for inputs, targets in batches:
        (training_loss(model, inputs, targets, model.reach(inputs)) * run.gradients.share).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_exact_ones_to_bfloat16(pico_data: DataFolder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [synthetic_batch(320, 2, 16, generator) for _ in range(2)]
    runs = {stream: trainer(pico_data, tmp_path / stream, stream) for stream in ("fp32", "bf16")}
    for run in runs.values():
        disturb(run)
        run.state.set_active_loops(1)
    found = {stream: gradients(run, batches) for stream, run in runs.items()}
    exact = exact_gradients(runs["fp32"], batches)
    assert found["bf16"].keys() == exact.keys()
    assert all(parameter.dtype == torch.float32 for parameter in runs["bf16"].model.parameters())
    assert all(parameter.grad is None for parameter in runs["bf16"].gradients.twin.module.parameters())  # type: ignore[union-attr]
    total = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    errors = {
        stream: float(torch.cat([(own[name] - exact[name]).flatten() for name in exact]).norm() / total)
        for stream, own in found.items()
    }
    assert errors["bf16"] < 0.02, errors
    assert errors["bf16"] < 4 * errors["fp32"], errors


def test_the_twin_projects_by_one_product_and_every_term_of_the_loss_reaches_it(
    pico_data: DataFolder, tmp_path: Path
) -> None:
    """Head diversity reads the weights of queries, which in the twin are rows of a larger parameter."""
    batches = [synthetic_batch(320, 4, 16, torch.Generator().manual_seed(1))]
    change = {}
    for stream in ("fp32", "bf16"):
        found = []
        for diversity in (0.0, 10.0):
            run = trainer(pico_data, tmp_path / f"{stream}{diversity}", stream, loss={"head_diversity": diversity})
            disturb(run)
            found.append(gradients(run, batches)["blocks.0.attn.q.weight"])
        change[stream] = found[1] - found[0]
    assert run.gradients.twin is not None
    names = {name for name, _ in run.gradients.twin.module.blocks[0].attn.named_parameters()}
    assert names == {"qkv", "proj.weight", "qk_gain", "gate"}
    # rounded weights alone make 5 % of it
    assert float((change["bf16"] - change["fp32"]).norm()) < 0.1 * float(change["fp32"].norm())


def few_kernels_of(model: GolfGPT) -> GolfGPT:
    """Return a copy that computes as a twin does, and rounds nothing; its scaled weights are leaves of their own."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, Attention):
            module.stack_projections()
    for own, block in zip(model.blocks, other.blocks, strict=True):
        assert isinstance(block, Block)
        for scale, weight in block.fold_scales().items():
            with torch.no_grad():
                block.get_parameter(weight).mul_(own.get_parameter(scale)[:, None])
    other.few_kernels = True
    return other


@pytest.mark.parametrize("more", [{}, {"skip_norm": "before", "sandwich_norm": "attention"}, {"xsa_alpha": 0.3}])
def test_forms_of_few_kernels_are_the_same_function(
    pico_data: DataFolder, tmp_path: Path, more: dict[str, Any]
) -> None:
    """In float64, without rounding; gradients too, of what both forms hold as it is."""
    run = trainer(pico_data, tmp_path, "fp32", model={**WHOLE, "xsa_last_n": 5, "skip_gates": True, **more})
    disturb(run)
    run.state.set_active_loops(1)
    model = run.model.double()
    other = few_kernels_of(model)
    inputs, targets = synthetic_batch(320, 2, 16, torch.Generator().manual_seed(1))
    losses = [training_loss(one, inputs, targets, one.reach(inputs)) for one in (model, other)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), abs=1e-12)
    for loss in losses:
        loss.backward()
    held = dict(other.named_parameters())
    wide = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in (
        "skip_gates",
        "skip_weights",
        "parallel_post_lambdas",
        "parallel_resid_lambdas",
        "blocks.4.mlp.fc.weight",
    ):
        torch.testing.assert_close(held[name].grad, wide[name], rtol=1e-9, atol=1e-14)
    gains, own = held["blocks.1.attn.qk_gain"].grad, wide["blocks.1.attn.q_gain"]
    assert gains is not None
    assert own is not None
    torch.testing.assert_close(gains[: len(own)], own, rtol=1e-9, atol=1e-14)


def test_gains_in_a_matrix_get_their_gradient_from_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    weights, scales = (
        [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(3)] for shape in ((4, 6), (4,))
    )
    exact = [scale[:, None] * weight for scale, weight in zip(scales, weights, strict=True)]
    sums = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    exact[0].mul(sums[0]).sum().backward()
    exact[2].mul(sums[2]).sum().backward()
    group = Folded(weights, scales, [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)])
    for found, expected in zip(group.scaled(torch.stack(scales).detach().unsqueeze(-1)), exact, strict=True):
        assert torch.equal(found, expected)
    group.holders[0].grad, group.holders[2].grad = sums[0], sums[2]  # the second has none
    given = list(group.gradients())
    assert [id(parameter) for parameter, _ in given] == [id(one) for own in (weights, scales) for one in own[::2]]
    for parameter, gradient in given:
        torch.testing.assert_close(gradient, parameter.grad)


def test_values_with_an_input_of_their_own_keep_their_projections(pico_data: DataFolder, tmp_path: Path) -> None:
    run = trainer(pico_data, tmp_path, "bf16", model={**WHOLE, "value_x0_layers": (2,)})
    assert run.gradients.twin is not None
    stacked = [block.attn.qkv is not None for block in run.gradients.twin.module.blocks]
    assert stacked == [True, True, False, True, True]
    run.gradients.accumulate([synthetic_batch(320, 4, 16, torch.Generator().manual_seed(1))])
    assert all(block.attn.v.weight.grad is not None for block in run.model.blocks)


def test_nothing_that_a_step_passes_on_is_float32(pico_data: DataFolder, tmp_path: Path) -> None:
    run = trainer(pico_data, tmp_path, "bf16")
    run.state.set_active_loops(1)
    seen: set[torch.dtype] = set()
    twin = run.gradients.twin
    assert twin is not None
    for block in twin.module.blocks:
        block.stream_out.register_forward_hook(
            lambda module, given, out: seen.update(x.dtype for x in (out if isinstance(out, tuple) else (out,)))
        )
    twin.module.head_in.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    run.gradients.accumulate([synthetic_batch(320, 4, 16, torch.Generator().manual_seed(1))])
    assert seen == {torch.bfloat16}


def test_a_run_with_a_narrow_stream_learns_the_same(pico_data: DataFolder, tmp_path: Path) -> None:
    losses = {}
    for stream in ("fp32", "bf16"):
        run = trainer(pico_data, tmp_path / stream, stream, schedule={"steps": 8}, model={})
        saved = run.run()
        assert saved.meta["stream"] == stream
        assert all(tensor.dtype == torch.float32 for tensor in saved.load("raw").tensors.values())
        losses[stream] = [json.loads(line)["loss"] for line in (saved.path.parent / "train.jsonl").open()]
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.1
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize(
    ("choice", "device", "autocast", "narrow"),
    [
        ("auto", CUDA, torch.bfloat16, True),
        ("auto", CUDA, None, False),
        ("auto", CPU, torch.bfloat16, False),
        ("bf16", CPU, torch.bfloat16, True),
        ("fp32", CUDA, torch.bfloat16, False),
    ],
)
def test_auto_narrows_on_a_gpu_alone(choice: Any, device: torch.device, autocast: Any, narrow: bool) -> None:
    assert narrow_stream(choice, device, autocast) == narrow


def test_a_narrow_stream_needs_narrow_products() -> None:
    with pytest.raises(SettingsError, match="acts only where products are bfloat16"):
        narrow_stream("bf16", CPU, None)
