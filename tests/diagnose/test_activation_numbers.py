"""The numbers of activations: what is planted in a model is found by name, and what does nothing measures 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.base.divergence import divergences_of
from pgolf_post.calibrate.forward import hooks
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.diagnose.activations import activation_numbers, dead_units, on_device, saturated_units
from pgolf_post.diagnose.numbers import Number
from pgolf_post.diagnose.removal import log_probs, removal_numbers, short_windows
from pgolf_post.diagnose.rules import find_marks
from pgolf_post.diagnose.watch import UnitSums, attention_weights, sampled_queries

Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def trained(pico_run_original: Path) -> View:
    """The EMA weights of the pico run; only read here."""
    return Checkpoint.open(pico_run_original / "latest").load()


@pytest.fixture(scope="module")
def text(pico_data: DataFolder) -> Tensor:  # (16, 16)
    return torch.from_numpy(pico_data.tokens("train", 256).astype("int64")).view(16, 16)


def changed(view: View, change: Change) -> View:
    tensors = {name: tensor.clone() for name, tensor in view.tensors.items()}
    change(tensors)
    return replace(view, tensors=tensors)


def measured(view: View, text: Tensor) -> list[Number]:
    return activation_numbers(view, on_device(view), text)


def removed(view: View, text: Tensor) -> dict[int, float]:
    numbers = removal_numbers(view, on_device(view), text, 256)
    return {n.layer: n.value for n in numbers if n.metric == "removal_divergence" and n.layer is not None}  # type: ignore[misc]


def marked(numbers: list[Number], rule: str) -> list[Number]:
    return [mark.number for mark in find_marks(numbers) if mark.rule.name == rule]


def test_every_visit_and_every_head_is_measured_and_nothing_changes(trained: View, text: Tensor) -> None:
    module = on_device(trained)
    with torch.no_grad():
        before = module.logits(module.hidden(text))  # type: ignore[operator]
        numbers = activation_numbers(trained, module, text)
        assert torch.equal(before, module.logits(module.hidden(text)))  # type: ignore[operator]
    entered = [n.subject for n in numbers if n.metric == "norm_before"]
    assert entered == ["block 0", "block 1, visit 1", "block 1, visit 2", "block 2"]
    heads = [n.subject for n in numbers if n.metric == "attention_entropy"]
    assert len(heads) == 4 * 2
    assert "block 1, visit 2, head 1" in heads
    assert {n.subject for n in numbers if n.metric == "dead_units"} == {f"blocks.{i}.mlp" for i in range(3)}
    sites = {site.name for site in trained.family.sites(module)}
    assert {n.subject for n in numbers if n.metric == "input_max"} == sites


def test_the_residual_after_a_visit_is_that_before_the_next(trained: View, text: Tensor) -> None:
    """In the encoder half, where no skip comes between."""
    numbers = {(n.metric, n.subject): n.value for n in measured(trained, text)}
    assert numbers["norm_after", "block 0"] == numbers["norm_before", "block 1, visit 1"]


def test_a_branch_without_output_adds_nothing(trained: View, text: Tensor) -> None:
    numbers = measured(changed(trained, lambda tensors: tensors["blocks.2.attn.proj.weight"].zero_()), text)
    shares = {n.subject: n.value for n in numbers if n.metric == "attention_share"}
    assert shares.pop("block 2") == 0.0
    assert all(share and share > 0 for share in shares.values())
    assert marked(numbers, "quiet-attention")[0].subject == "block 2"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_removing_a_block_with_zero_output_projections_changes_nothing_at_all(
    trained: View, text: Tensor, layer: int
) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        tensors[f"blocks.{layer}.attn.proj.weight"].zero_()
        tensors[f"blocks.{layer}.mlp.proj.weight"].zero_()

    divergences = removed(changed(trained, silence), text)
    assert divergences[layer] == 0.0
    assert sorted(divergences) == [0, 1, 2]
    assert all(divergence > 0 for other, divergence in divergences.items() if other != layer)


def test_replaying_what_came_before_a_block_changes_no_bit(trained: View, text: Tensor) -> None:
    module: Any = on_device(trained)
    branches = trained.family.branches(module)
    with torch.no_grad():
        reference, expected = log_probs(module, text), {}
        for layer, paths in branches.items():
            parts = [module.get_submodule(path) for path in paths]
            with hooks(part.register_forward_hook(lambda _, __, output: 0 * output) for part in parts):
                expected[layer] = float(divergences_of(reference, log_probs(module, text)).mean(dim=1).double().mean())
    assert removed(trained, text) == expected


def test_a_planted_dead_unit_is_found_by_its_number(trained: View, text: Tensor) -> None:
    numbers = measured(changed(trained, lambda tensors: tensors["blocks.1.mlp.fc.weight"][17].zero_()), text)
    (found,) = marked(numbers, "dead-units")
    assert (found.subject, found.value, found.at, found.note) == ("blocks.1.mlp", 1.0, 17, "17")


def test_a_planted_saturated_head_is_found_by_name(trained: View, text: Tensor) -> None:
    def sharpen(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.2.attn.q_gain"][1] = 1e4

    found = marked(measured(changed(trained, sharpen), text), "saturated-head")
    assert [n.subject for n in found] == ["block 2, head 1"]


def test_a_head_without_a_gain_is_uniform_and_two_of_them_are_twins(trained: View, text: Tensor) -> None:
    numbers = measured(changed(trained, lambda tensors: tensors["blocks.0.attn.q_gain"].zero_()), text)
    found = {n.subject: n.value for n in numbers if n.metric == "attention_entropy_share"}
    assert found["block 0, head 0"] == pytest.approx(1.0, abs=1e-6)
    assert "block 0, head 0" in [n.subject for n in marked(numbers, "uniform-head")]
    twins = {n.subject: n for n in marked(numbers, "twin-heads")}
    assert twins["block 0, head 0"].at == 1
    assert twins["block 0, head 0"].value == pytest.approx(1.0, abs=1e-5)  # of normalised float32 weights


def test_a_planted_outlier_channel_is_found_by_its_number(trained: View, text: Tensor) -> None:
    def plant(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.2.mlp.fc.weight"][5] *= 1000

    (found,) = marked(measured(changed(trained, plant), text), "activation-outlier")
    assert (found.subject, found.at) == ("blocks.2.mlp.out", 5)


def test_logits_at_the_cap_are_counted(trained: View, text: Tensor) -> None:
    numbers = {n.metric: n.value for n in measured(trained, text) if n.part == "logits"}
    assert numbers["softcap_top_share"] == 0.0
    capped = measured(changed(trained, lambda tensors: tensors["tok_emb.weight"].mul_(1e4)), text)
    assert {n.metric: n.value for n in capped if n.part == "logits"}["logit_max"] == pytest.approx(1.0)
    assert marked(capped, "softcap-saturation")[0].value == 1.0


def test_attention_weights_are_those_of_softmax_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    chosen = sampled_queries(9, q.device)
    assert chosen.tolist() == list(range(9))
    document = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    within = torch.tril(document[:, :, None] == document[:, None, :])[:, None]
    for mask in (None, within):
        weights, reach = attention_weights(q, k, mask, chosen)
        causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9) if mask is None else mask
        values = torch.eye(9).expand(2, 2, 9, 9)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, values, attn_mask=causal, enable_gqa=True)
        assert torch.allclose(weights, wanted, atol=1e-6)
        assert torch.equal(reach, causal.sum(-1))


def test_queries_are_spread_over_a_long_window() -> None:
    chosen = sampled_queries(2048, torch.device("cpu"))
    assert len(chosen) == 64
    assert (chosen[0], chosen[-1]) == (0, 2047)
    assert int(chosen.diff().min()) >= 32


def test_units_are_dead_or_saturated_by_their_own_measure() -> None:
    sums = UnitSums(0, torch.tensor([5.0, 0.004, 6.0, 4.0]), torch.tensor([100, 0, 996, 1000]), 1000)
    assert dead_units(sums) == [1]
    assert saturated_units(sums) == [2, 3]


def test_short_windows_are_spread_over_the_text() -> None:
    tokens = torch.arange(4 * 600).view(4, 600)
    windows = short_windows(tokens, 1024)
    assert windows.shape == (4, 256)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 3 * 600 + 511
    assert short_windows(tokens[:, :100], 10).shape == (1, 100)
