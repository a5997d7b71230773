"""What another architecture has is called what it is, whether all of a file is strange or a part of it."""

from __future__ import annotations

import pytest
import torch

from pgolf_post.errors import MismatchError
from pgolf_post.importers import recognise
from pgolf_post.importers.foreign_file import ForeignFile
from pgolf_post.importers.importing import canonical_views
from pgolf_post.importers.strangers import call_parts
from tests.importers.test_import import FIXTURES, fixture_state

STRANGE = {
    "shared_blocks.0.attn.c_q.weight": "weights shared between layers",
    "blocks.0.mlp.gate_up.weight": "a gated MLP",
    "gate_up_bank": "a gated MLP",
    "blocks.1.mlp.gate_proj.weight": "a gated MLP",
    "blocks.1.mlp.experts.0.fc.weight": "a mixture of experts",
    "blocks.1.attn.c_qkv.weight": "queries, keys and values in one matrix",
    "transformer.h.0.attn.c_attn.weight": "queries, keys and values",
    "model.layers.0.self_attn.q_proj.weight": "a Llama-style model",
    "blocks.0.mixer.A_log": "a state-space model",
    "rotary.inv_freq": "rotary tables",
    "blocks.0.attn.c_q.weight_scale": "scales of a quantized matrix",
    "blocks.0.attn.c_q.bias": "biases",
    "mtp_heads.0.weight": "heads that predict further tokens",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_part_of_another_architecture_is_called_what_it_is(name: str) -> None:
    with pytest.raises(
        MismatchError, match=f"m.pt: an unknown architecture.* It has {name}: {STRANGE[name]}"
    ) as caught:
        recognise({name: torch.zeros(1)}, "m.pt")
    assert "families.md" in str(caught.value.hint)
    _, state = fixture_state("baseline")
    mixed = ForeignFile({"raw": {**state, name: torch.zeros(1)}}, None)
    with pytest.raises(MismatchError, match=rf"m\.pt \(raw\): .*{name}.* Of these {name}: {STRANGE[name]}"):
        canonical_views(mixed, "m.pt")


@pytest.mark.parametrize("fixture", FIXTURES)
def test_no_part_of_the_known_formats_is_called_strange(fixture: str) -> None:
    assert call_parts(fixture_state(fixture)[1]) == ""
