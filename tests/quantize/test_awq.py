"""AWQ: α = 0 changes nothing, stretching keeps the function, and folding costs no bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.families import build_module, get_family, load_module
from pgolf_post.plan import read_plan
from pgolf_post.quantize.awq import FLOOR, column_scales, stored_factor, stretch, stretched_hessian
from pgolf_post.quantize.model import plan_view, quantize_view


def logits(view: View, tensors: dict[str, Tensor]) -> Tensor:
    module = load_module(view.config, tensors, "test")
    tokens = torch.arange(12)[None, :] % 40
    return module.logits(module.hidden(tokens))


def test_the_worked_example_of_the_docstring() -> None:
    scales = column_scales(torch.tensor([4.0, 1.0]), 0.5)
    torch.testing.assert_close(scales, torch.tensor([math.sqrt(2), 1 / math.sqrt(2)]), rtol=1e-3, atol=0)


def test_alpha_zero_is_the_identity(view: View, stats: Stats) -> None:
    assert torch.equal(column_scales(torch.rand(9), 0.0), torch.ones(9))
    plain = quantize_view(view, stats, read_plan("sdclip-1394"))
    same = quantize_view(view, stats, read_plan("sdclip-1394", ["*.awq_alpha=0.0"]))
    assert plain.symbols_sha256() == same.symbols_sha256()


def test_dead_inputs_are_floored_and_all_dead_are_left() -> None:
    scales = column_scales(torch.tensor([1.0, 0.0]), 1.0)
    assert float(scales[0] / scales[1]) == pytest.approx(1 / FLOOR, rel=2e-3)
    assert torch.equal(column_scales(torch.zeros(3), 1.0), torch.ones(3))


@pytest.mark.parametrize("fold", [True, False])
def test_stretching_keeps_the_function(view: View, stats: Stats, fold: bool) -> None:
    plan = read_plan("sdclip-1394", ["matrices.awq_alpha=0.5", f"matrices.awq_fold={str(fold).lower()}"])
    family, module = get_family("golf_gpt"), build_module(view.config)
    stretched = stretch(view.tensors, plan_view(view, plan), stats, family.folds(module))
    assert set(stretched.folded) == ({f"blocks.{i}.mlp.proj.weight" for i in range(3)} if fold else set())
    undone = dict(stretched.tensors)
    for name in stretched.stored:
        undone[name] = undone[name] * torch.from_numpy(stored_factor(stretched.scales[name])).float()
    changed = [name for name in view.tensors if not torch.allclose(undone[name], view.tensors[name].float(), rtol=1e-5)]
    assert ("blocks.0.mlp.fc.weight" in changed) == fold
    torch.testing.assert_close(logits(view, undone), logits(view, dict(view.tensors)), rtol=0, atol=2e-5)


def test_stored_scales_travel_with_the_tensor_and_folded_ones_do_not(view: View, stats: Stats) -> None:
    model = quantize_view(view, stats, read_plan("sdclip-1394", ["matrices.awq_alpha=0.5"]))
    axes = {name: [factor.axis for factor in tensor.factors] for name, tensor in model.quantized.items()}
    assert axes["blocks.0.attn.q.weight"] == ["row", "column"]
    assert axes["blocks.0.mlp.proj.weight"] == ["row"]
    restored = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
    before = logits(view, dict(view.tensors))
    assert float((logits(view, restored) - before).abs().max()) < 0.5 * float(before.std())


def test_the_hessian_follows_the_inputs() -> None:
    inputs = torch.randn(30, 4, dtype=torch.float64)
    scales = torch.tensor([2.0, 0.5, 1.0, 4.0])
    shrunk = inputs / scales
    torch.testing.assert_close(stretched_hessian(inputs.mT @ inputs, scales), shrunk.mT @ shrunk)
