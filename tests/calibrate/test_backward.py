"""The backward half against brute force: one backward pass per token, label by label."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.calibrate.backward import fisher_batch, sample_labels
from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.packed import mirror_upper
from pgolf_post.calibrate.randomness import uniforms
from pgolf_post.calibrate.stage import observe
from pgolf_post.calibrate.sums import Sums
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.errors import SettingsError
from tests.calibrate.conftest import TOY_LOOKUPS, TOY_SITES, Toy

Visits = dict[str, list[tuple[Tensor, Tensor]]]  # tensor → for each visit (x, δ) of all tokens


def traced(observed: Observed, tokens: Tensor) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Logits with a graph, and for each matrix (and looked-up table) each visit's input and the product itself."""
    module: Any = observed.module
    made: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    handles = []
    for lookup in observed.lookups:

        def start(_: Any, inputs: Any, rows: Tensor, name: str = lookup.tensor) -> Tensor:
            rows = rows.detach().requires_grad_()
            made[f"lookup {name}"].append((inputs[0], rows))
            return rows

        handles.append(module.get_submodule(lookup.module).register_forward_hook(start))
    for site in observed.sites:
        for tensor in site.tensors:

            def product(_: Any, inputs: Any, output: Tensor, name: str = tensor) -> None:
                made[name].append((inputs[0].detach(), output))

            handles.append(module.get_submodule(site.output_of(tensor)).register_forward_hook(product))
    with torch.enable_grad():
        hidden = module.hidden(tokens)
        logits = module.logits(hidden)
    for handle in handles:
        handle.remove()
    head = next(site for site in observed.sites if site.is_head).tensors[0]
    made[head] = [(hidden.detach(), output) for _, output in made[head]]
    return logits, made


def brute_force(observed: Observed, tokens: Tensor, labels: Tensor) -> Visits:
    """δ of every product, as the sum of one backward pass per token."""
    logits, made = traced(observed, tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    products = [output for visits in made.values() for _, output in visits]
    totals = [torch.zeros_like(output) for output in products]
    for loss in losses:
        gradients = torch.autograd.grad(loss, products, retain_graph=True, allow_unused=True)
        totals = [total if g is None else total + g for total, g in zip(totals, gradients, strict=True)]
    deltas = iter(totals)
    return {name: [(x, next(deltas)) for x, _ in visits] for name, visits in made.items()}


def drawn_labels(observed: Observed, tokens: Tensor) -> Tensor:
    """What the collection draws: the label at which the cumulative distribution passes the token's number."""
    logits, _ = traced(observed, tokens)
    numbers = torch.from_numpy(uniforms(observed.seed, "labels", range(len(tokens)), tokens.size(1)))
    p = torch.softmax(logits.detach(), -1).double()
    return ((p.cumsum(-1) / p.sum(-1, keepdim=True)) <= numbers[..., None]).sum(-1)


def require_brute_force(observed: Observed, tokens: Tensor) -> None:
    sums = collect(observed, tokens.numpy())
    expected = brute_force(observed, tokens, drawn_labels(observed, tokens))
    head = next(site for site in observed.sites if site.is_head).tensors[0]
    seen = 0
    for site in observed.sites:
        for tensor in site.tensors:
            if tensor == head:
                continue
            rows, weighted, outputs = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for x, delta in expected[tensor]:
                x, delta = x.flatten(0, 1).double(), delta.flatten(0, 1).double()
                rows = rows + delta.square().sum(0)
                weighted = weighted + x.mT @ (delta.square().mean(1)[:, None] * x)
                outputs = outputs + delta.mT @ delta
            scale = float(weighted.abs().max())
            torch.testing.assert_close(sums[f"rows.{tensor}"], rows, rtol=1e-4, atol=1e-4 * float(rows.max()))
            torch.testing.assert_close(mirror_upper(sums[f"weighted.{tensor}"]), weighted, rtol=1e-4, atol=1e-4 * scale)
            largest = float(outputs.abs().max())
            torch.testing.assert_close(mirror_upper(sums[f"outputs.{tensor}"]), outputs, rtol=1e-4, atol=1e-4 * largest)
            seen += 1
    assert seen == sum(len(site.tensors) for site in observed.sites) - 1
    for lookup in observed.lookups:
        ((indices, g),) = expected[f"lookup {lookup.tensor}"]
        g, indices = g.flatten(0, 1).double(), indices.flatten()
        moment = mirror_upper(sums[f"lookup.{lookup.tensor}"])
        torch.testing.assert_close(moment, g.mT @ g, rtol=1e-4, atol=1e-4 * float(moment.abs().max()))
        one_hot = F.one_hot(indices, len(sums[f"counts.{lookup.tensor}"])).double()
        assert torch.equal(sums[f"counts.{lookup.tensor}"], one_hot.sum(0))
        by_row = one_hot.mT @ g.square().mean(1)
        torch.testing.assert_close(
            sums[f"lookup_rows.{lookup.tensor}"], by_row, rtol=1e-4, atol=1e-4 * float(by_row.max())
        )


def test_one_backward_pass_is_the_sum_of_one_per_token(toy: Toy) -> None:
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, 10, (3, 6)))
    require_brute_force(Observed(toy, TOY_SITES, TOY_LOOKUPS, fisher=True, seed=5), tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_real_models_sums_are_those_of_brute_force(pico_checkpoint: Checkpoint, seed: int) -> None:
    """Looped block included: every matrix of every site, over both visits."""
    observed = observe(pico_checkpoint.load(), CalibrationSettings(fisher=True, seed=seed))
    require_brute_force(observed, torch.from_numpy(np.random.default_rng(seed).integers(0, 320, (2, 16))))


def test_the_heads_rows_are_the_expectation_over_labels(toy: Toy) -> None:
    """Σ_ŷ p(ŷ)·δ_v² by enumerating every label, against p(1 - p)·cap'(z)²; and its s weighs the head's input."""
    tokens = torch.from_numpy(np.random.default_rng(4).integers(0, 10, (2, 5)))
    observed = Observed(toy, TOY_SITES, TOY_LOOKUPS, fisher=True)
    sums = collect(observed, tokens.numpy())
    logits, made = traced(observed, tokens)
    ((x, z),) = made["embedding.weight"]
    p, per_token = torch.softmax(logits.detach(), -1).double(), torch.zeros(2, 5, 10, dtype=torch.float64)
    for label in range(10):
        loss = F.cross_entropy(logits.flatten(0, 1), torch.full((10,), label), reduction="sum")
        (delta,) = torch.autograd.grad(loss, z, retain_graph=True)
        per_token += p[..., label : label + 1] * delta.double().square()
    torch.testing.assert_close(sums["rows.embedding.weight"], per_token.sum((0, 1)), rtol=1e-4, atol=1e-6)
    x, s = x.flatten(0, 1).double(), per_token.mean(-1).flatten()
    torch.testing.assert_close(
        mirror_upper(sums["weighted.embedding.weight"]), x.mT @ (s[:, None] * x), rtol=1e-4, atol=1e-6
    )


def test_over_many_draws_the_sums_tend_to_the_fisher_information() -> None:
    """Σ_t Σ_ŷ p_t(ŷ)·(∂(-log p_t(ŷ))/∂z)² at every position, by enumeration: cross terms between tokens cancel."""
    toy = Toy(2, vocab=5, dim=3).requires_grad_(False)
    observed = Observed(toy, TOY_SITES, TOY_LOOKUPS, fisher=True)
    tokens = torch.from_numpy(np.random.default_rng(6).integers(0, 5, (1, 4)))
    logits, made = traced(observed, tokens)
    p, exact = torch.softmax(logits.detach(), -1), torch.zeros(3, dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    for position in range(4):
        for label in range(5):
            products = [output for _, output in made["linear.weight"]]
            gradients = torch.autograd.grad(-log_p[0, position, label], products, retain_graph=True)
            squared = sum(g.double().square().sum((0, 1)) for g in gradients)
            exact += float(p[0, position, label]) * squared
    draws = 4000
    many = tokens.repeat(draws, 1)
    sums = Sums()
    numbers = torch.from_numpy(np.random.default_rng(7).random((draws, 4)))
    fisher_batch(toy, TOY_SITES, TOY_LOOKUPS, many, numbers, sums)
    torch.testing.assert_close(sums["rows.linear.weight"] / draws, exact, rtol=0.1, atol=0)


def test_labels_follow_the_distribution_and_their_numbers() -> None:
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    for number, label in ((0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (0.999999, 3)):
        assert int(sample_labels(p, torch.tensor([number], dtype=torch.float64))) == label
    numbers = uniforms(3, "labels", range(4, 7), 5)
    assert np.array_equal(numbers, np.concatenate([uniforms(3, "labels", range(w, w + 1), 5) for w in (4, 5, 6)]))
    assert not np.array_equal(numbers, uniforms(3, "generation", range(4, 7), 5))


def test_a_family_without_a_head_is_refused_by_name() -> None:
    observed = Observed(Toy(1).requires_grad_(False), TOY_SITES[:1], TOY_LOOKUPS, fisher=True)
    with pytest.raises(SettingsError, match="names 0 heads and 1 lookup tables"):
        collect(observed, np.zeros((1, 4), dtype=np.int64))
