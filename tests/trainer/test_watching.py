"""Watching a forward pass: what is reported adds up to the pass, and the pass is the one that nobody watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.model.visits import visit_list
from trainer.watching import watched

SMALL: dict[str, Any] = {
    "num_layers": 4, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_mult": 2.0, "rope_dims": 4,
    "xsa_last_n": 2, "vocab_size": 40, "train_seq_len": 12, "skip_gates": False,
}  # fmt: skip
LOOPS = {"loop_start": 1, "loop_end": 2, "num_loops": 1}


class Notes:
    """Everything that was reported, in order."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int, Sequence[Tensor]]] = []
        self.left: list[Sequence[Tensor]] = []
        self.added: list[dict[str, Tensor]] = []
        self.fired: list[tuple[str, Tensor, Tensor]] = []
        self.attended: list[tuple[int, int, Tensor, Tensor]] = []

    def enters(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        self.entered.append((layer, visit, streams))
        self.added.append({})

    def adds(self, layer: int, visit: int, branch: str, addition: Tensor) -> None:
        assert (layer, visit) == self.entered[-1][:2]
        self.added[-1][branch] = addition

    def leaves(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        self.left.append(streams)

    def fires(self, mlp: str, layer: int, inputs: Tensor, outputs: Tensor) -> None:
        self.fired.append((mlp, inputs, outputs))

    def attends(self, layer: int, visit: int, q: Tensor, k: Tensor, within: Tensor | None) -> None:
        self.attended.append((layer, visit, q, k))


def model(**settings: Any) -> GolfGPT:
    config = ModelConfig(**SMALL, **settings)
    torch.manual_seed(0)
    made = GolfGPT(config, GraphState(active_loops=config.max_active_loops))
    made.initialise()
    for name, parameter in made.named_parameters():
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)


def watch(made: GolfGPT, passes: int = 1) -> Notes:
    tokens = torch.randint(2, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    alone = made(tokens)
    notes, backend = Notes(), made.attention_backend
    with watched(made, notes):
        for _ in range(passes):
            assert torch.equal(made(tokens), alone)
    assert made.attention_backend is backend
    assert not any(part._forward_hooks for part in made.modules())
    return notes


@pytest.mark.parametrize(
    "settings",
    [{}, LOOPS, {"activation": "swiglu"}, {"lanes_start": 3}, LOOPS | {"untied_loop_mlps": True}, {"gptj_start": 2}],
    ids=["plain", "loops", "gated", "lanes", "untied", "parallel"],
)
def test_every_visit_is_reported_once_and_adds_up(settings: dict[str, Any]) -> None:
    made = model(**settings)
    notes = watch(made, passes=2)
    visits = visit_list(made.config, made.graph.active_loops)
    assert [layer for layer, _, _ in notes.entered] == visits * 2
    assert [visit for _, visit, _ in notes.entered[: len(visits)]] == [
        visits[: i + 1].count(layer) for i, layer in enumerate(visits)
    ]
    assert [(layer, visit) for layer, visit, *_ in notes.attended] == [(a, b) for a, b, _ in notes.entered]
    assert len(notes.fired) == len(notes.entered) == len(notes.left)
    for (_, _, before), added, after in zip(notes.entered, notes.added, notes.left, strict=True):
        whole = added["attention"] + added["mlp"]
        keep = 1.0 if len(before) == 1 else 1.1  # lanes begin with 1.1 of themselves, and both take both additions
        for stream, then in zip(before, after, strict=True):
            assert torch.allclose(then, keep * stream + whole, atol=1e-5)


def test_units_are_those_of_the_mlp_that_ran() -> None:
    made = model(**LOOPS, untied_loop_mlps=True)
    notes = watch(made)
    assert [name for name, _, _ in notes.fired] == [
        "blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "override_mlps.1_p1", "override_mlps.2_p1", "blocks.3.mlp",
    ]  # fmt: skip
    for name, inputs, outputs in notes.fired:
        mlp = made.get_submodule(name)
        assert torch.allclose(mlp.act(inputs), outputs, atol=1e-6)  # type: ignore[operator]


def test_queries_have_their_gain() -> None:
    made = model()
    with torch.no_grad():
        made.get_parameter("blocks.1.attn.q_gain")[1] = 7.0
    norms = {layer: q.norm(dim=-1).mean(dim=(0, 2)) for layer, _, q, _ in watch(made).attended}
    assert norms[1][1] == pytest.approx(7.0 * 8**0.5, rel=1e-3)
    assert norms[1][0] == pytest.approx(4.0 * 8**0.5, rel=1e-3)


def test_branches_are_what_blocks_add() -> None:
    from trainer.family import GolfGPTFamily

    made = model(**LOOPS, untied_loop_mlps=True)
    branches = GolfGPTFamily().branches(made)
    assert branches[1] == ("blocks.1.attn", "blocks.1.mlp", "override_mlps.1_p1")
    assert sorted(branches) == [0, 1, 2, 3]
