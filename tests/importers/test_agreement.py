"""A tensor of a wrong shape is named, whichever it is and however it is wrong; no setting is computed from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import load_module
from pgolf_post.importers.agreement import require_agreement
from pgolf_post.importers.foreign_config import infer_model
from pgolf_post.importers.foreign_file import ForeignFile
from pgolf_post.importers.importing import canonical_views, import_file
from pgolf_post.importers.script_words import FAMILY
from tests.importers.test_import import FIXTURES, fixture_state, foreign_of, stated_of

SAMPLE = ("banked_record", "flat_embed_proj")
CANONICAL = {"c_q": "q", "c_k": "k", "c_v": "v", "attn_gate_w": "gate", "attn_gate_proj.weight": "double_gate"}
# what a message names instead of the tensor: its matrices, or the setting that it decides
MEANT = {
    "kv_bank": ("attn.k", "attn.v", "num_kv_heads"),
    "qo_bank": ("attn.q", "attn.proj"),
    "mlp_up_bank": ("mlp.fc", "mlp_mult"),
    "mlp_down_bank": ("mlp.proj",),
    "smear_gate.weight": ("smear_gate", "gate_window"),
    "blocks.0.attn.attn_gate_w": ("gate_window", "attn_gate"),
    "blocks.0.attn.attn_gate_proj.weight": ("gate_window", "attn_gate"),
    "lm_head.weight": ("tie_embeddings",),
    "parallel_post_lambdas": ("parallel_resid_lambdas",),
    "embed_proj.weight": ("embedding_dim",),
}


def misshapen(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what was done to a tensor's shape, and the tensor."""
    yield "scalar", tensor.new_tensor(4.0)
    yield "empty", tensor.new_zeros(0)
    yield "one dimension more", tensor.unsqueeze(0)
    yield "one dimension more, last", tensor.unsqueeze(-1)
    if tensor.ndim > 1:
        yield "flat", tensor.reshape(-1)
    if tensor.ndim == 2:
        yield "transposed", tensor.T.contiguous()
    for axis in range(tensor.ndim):
        size = tensor.size(axis)
        for kept in {0, 1, size // 2, size - 1}:
            yield f"{kept} of {size} along {axis}", tensor.narrow(axis, 0, kept)
        yield f"one more along {axis}", torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        yield f"doubled along {axis}", torch.cat([tensor, tensor], axis)


def import_shapes(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> None:
    """Do what import does with a state dict until its model is there."""
    _, views = canonical_views(ForeignFile({"raw": state}, None), "f.pt")
    require_agreement(views["raw"], "f.pt")
    model = infer_model(views["raw"], given).model
    config = {"family": FAMILY, "model": dict(model), "graph": {"active_loops": model["num_loops"]}}
    load_module(config, views["raw"], "f.pt")


def words_for(name: str) -> tuple[str, ...]:
    """Return the words of which a message about a tensor has one."""
    canonical = name
    for foreign, ours in CANONICAL.items():
        canonical = canonical.replace(foreign, ours)
    return (name, canonical, *MEANT.get(name, ()))


def require_named(state: Mapping[str, Tensor], given: Mapping[str, Any], name: str, what: str) -> None:
    with pytest.raises((MismatchError, SettingsError)) as raised:
        import_shapes(state, given)
    assert any(word in str(raised.value) for word in words_for(name)), f"{name} {what}: {raised.value}"


@pytest.mark.parametrize(
    "fixture", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.long) for name in FIXTURES]
)
def test_every_misshapen_or_missing_tensor_is_named(fixture: str, request: pytest.FixtureRequest) -> None:
    given, state = fixture_state(fixture)
    whole = request.config.getoption("--long")
    names = [name for name in state if whole or not name.startswith(("blocks.1", "blocks.2", "blocks.3", "blocks.4"))]
    for name in names:
        shape = state[name].shape
        for number, (what, tensor) in enumerate(misshapen(state[name])):
            same = tensor.shape == shape or (name == "tok_emb.weight" and tensor.shape[1:] == shape[1:] and len(tensor))
            if not same and (whole or number % 4 == len(name) % 4):
                require_named({**state, name: tensor}, given, name, what)
        require_named({key: tensor for key, tensor in state.items() if key != name}, given, name, "missing")


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (torch.tensor(4.0), r"blocks.0.attn.q_gain is \(\), expected \(heads,\)"),
        (torch.ones(1), r"blocks.0.attn.q_gain is \(1,\): its dimension 0 is the heads, of which 2 others say 2"),
        (torch.ones(3), r"blocks.0.attn.q_gain is \(3,\)"),
        (torch.ones(0), r"blocks.0.attn.q_gain is \(0,\), expected \(heads,\)"),
    ],
)
def test_a_query_gain_of_another_shape_is_named_with_what_is_expected(
    pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Any, gain: Tensor, said: str
) -> None:
    torch.save({**foreign_of(pico_checkpoint), "blocks.0.attn.q_gain": gain}, tmp_path / "model.pt")
    with pytest.raises(MismatchError, match=said):
        import_file(tmp_path / "model.pt", stated_of(pico_checkpoint), pico_data, "again", root=tmp_path)


@pytest.mark.parametrize(
    ("heads", "said"), [(1, "1 gain, one"), (3, "do not divide the width of 32"), (16, "16 gains")]
)
def test_gains_that_all_agree_on_heads_that_keys_have_not_are_named_with_the_keys(heads: int, said: str) -> None:
    given, state = fixture_state("baseline")
    gains = {name: torch.ones(heads) for name in state if name.endswith("q_gain")}
    wide = {name: torch.zeros(24, 32) for name in state if name.endswith(("c_k.weight", "c_v.weight"))}
    with pytest.raises(MismatchError, match=said) as raised:
        import_shapes({**state, **gains, **(wide if heads == 16 else {})}, given)
    assert "q_gain" in str(raised.value)


def test_each_view_is_looked_at(pico_checkpoint: Checkpoint, pico_data: DataFolder, tmp_path: Any) -> None:
    average = {**foreign_of(pico_checkpoint, "ema"), "tok_emb.weight": torch.tensor(1.0)}
    torch.save({"model": foreign_of(pico_checkpoint), "ema": average}, tmp_path / "model.pt")
    with pytest.raises(MismatchError, match=r"\(ema\): shapes do not go together: tok_emb.weight is \(\)"):
        import_file(tmp_path / "model.pt", stated_of(pico_checkpoint), pico_data, "again", root=tmp_path)
