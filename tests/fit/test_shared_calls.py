"""Models that differ in one matrix share what comes before it, and lose nothing by that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.shared_calls import SharedCalls
from trainer.family import GolfGPTFamily
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT

SHAPES: dict[str, dict[str, Any]] = {
    "loops": {"loop_start": 1, "loop_end": 2, "num_loops": 2},
    "loops with MLPs of their own": {"loop_start": 1, "loop_end": 2, "num_loops": 2, "untied_loop_mlps": True},
    "lanes": {"lanes_start": 2, "lane_kind": "separate"},
    "values from the embedding": {"value_embed_layers": [1, 3], "value_embed_dim": 8},
    "a head and projections": {"tie_embeddings": False, "embedding_dim": 16},
}


def pico(**settings: Any) -> GolfGPT:
    config = ModelConfig(
        num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=8, vocab_size=64,
        train_seq_len=16, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GolfGPT(config, GraphState(active_loops=config.num_loops))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return model.eval().requires_grad_(False)


def counted(model: nn.Module) -> list[str]:
    """Return a list that grows by the name of every matrix product that is computed from now on."""
    names: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            forward = part.forward

            def count(x: Tensor, name: str = name, forward: Any = forward) -> Tensor:
                names.append(name)
                result: Tensor = forward(x)
                return result

            part.forward = count  # type: ignore[method-assign]
    return names


@pytest.mark.parametrize("shape", SHAPES)
def test_every_change_gives_the_same_bits_as_a_whole_pass(shape: str) -> None:
    model = pico(**SHAPES[shape])
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    family = GolfGPTFamily()
    names = {name for site in family.sites(model) for name in site.tensors}
    names |= {lookup.tensor for lookup in family.lookups(model)}
    shared, own = SharedCalls(model, lambda: model.hidden(tokens)), model.hidden(tokens)
    head = "tok_emb.weight" if model.config.tie_embeddings else "lm_head.weight"
    for name in sorted(names):
        parameter = model.get_parameter(name)
        before = parameter.data.clone()
        parameter.data.copy_(1.5 * before)
        with shared.given([name]):
            given = model.hidden(tokens)
        whole = model.hidden(tokens)
        parameter.data.copy_(before)
        assert torch.equal(given, whole), name
        assert torch.equal(given, own) == (name == head == "lm_head.weight"), name
    assert torch.equal(model.hidden(tokens), own)  # nothing stays replaced
    assert not any("forward" in vars(part) for part in model.modules())


def test_nothing_before_the_changed_weight_is_computed_again() -> None:
    model = pico()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    products = counted(model)
    shared = SharedCalls(model, lambda: model.hidden(tokens))
    products.clear()
    with shared.given(["blocks.2.mlp.fc.weight"]):
        model.hidden(tokens)
    assert {name.split(".")[1] for name in products} == {"2", "3"}
    products.clear()
    with shared.given(["blocks.3.mlp.fc.weight", "blocks.1.attn.q.weight"]):
        model.hidden(tokens)
    assert {name.split(".")[1] for name in products} == {"1", "2", "3"}


class Parts(nn.Module):
    """Two parts; the first one's output is changed in place where asked, and they may be called the other way round."""

    in_place, reverse = False, False

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.two, self.one) if self.reverse else (self.one, self.two)
        x = first(x)
        result: Tensor = second(x.mul_(2) if self.in_place else x) @ self.free
        return result


@torch.no_grad()
def test_an_output_that_was_changed_in_place_is_not_given() -> None:
    model = Parts()
    assert SharedCalls(model, lambda: model(torch.ones(1, 4))).num_shared(["two.weight"]) == 1
    model.in_place = True
    assert SharedCalls(model, lambda: model(torch.ones(1, 4))).num_shared(["two.weight"]) == 0


@torch.no_grad()
def test_a_weight_that_no_part_reads_shares_nothing() -> None:
    model = Parts()
    shared = SharedCalls(model, lambda: model(torch.ones(1, 4)))
    assert shared.num_shared(["free"]) == 0
    assert shared.num_shared(["free", "two.weight"]) == 0
    assert shared.num_shared([]) == 2


@torch.no_grad()
def test_parts_in_another_order_are_an_error() -> None:
    model = Parts()
    shared = SharedCalls(model, lambda: model(torch.ones(1, 4)))
    model.reverse = True
    with shared.given(["two.weight"]), pytest.raises(RuntimeError, match="Linear was called where Linear was before"):
        model(torch.ones(1, 4))
    assert "forward" not in vars(model.one)


def test_divergences_together_are_those_alone(view: View, pico_data: DataFolder) -> None:
    probe = Probe(view, probe_text(view, pico_data, 512, 0))
    names = ["tok_emb.weight", "blocks.0.attn.v.weight", "blocks.2.mlp.proj.weight"]
    changes = [{name: 1.2 * view.tensors[name]} for name in names]
    passes: list[None] = []
    together = probe.divergences(changes, lambda: passes.append(None))
    assert together == [probe.divergence(change) for change in changes]
    assert len(passes) == len(changes) * len(probe.batches)
    assert all(one.mean > 0 for one in together)
