"""The model: the public scripts' logits, causality, and runtime graph state."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.importers import FORMATS, recognise
from pgolf_post.importers.foreign_config import infer_model
from pgolf_post.importers.script_words import split_log
from pgolf_post.settings import parse_settings
from trainer.family import GolfGPTFamily
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT, document_pieces
from trainer.model.visits import visit_list

PARITY = Path(__file__).parent.parent / "parity"
FLAT = ("baseline", "flat_loops_gptj", "flat_untied_plain", "flat_embed_proj")
BANKED = ("banked_record", "banked_dense_gate", "banked_out_gate")
TOLERANCE = 2e-4  # absolute, float32 logits


def read_fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(PARITY / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load_fixture(name: str) -> tuple[GolfGPT, dict[str, Tensor]]:
    """The model imported from a fixture's state dict and settings, and the fixture's tokens and logits."""
    public, tensors = read_fixture(name)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    canonical = FORMATS[recognise(state, name)].to_canonical(state)
    stated = {"train_seq_len": 32, "rope_ntk": False, "num_loops": 0, "smear_across_bos": False, **split_log(public)[0]}
    model = GolfGPT(ModelConfig(**infer_model(canonical, stated).model), GraphState())
    model.load_state_dict(canonical)
    return model, tensors


@pytest.mark.parametrize("name", [*FLAT, *BANKED])
def test_logits_equal_the_public_scripts(name: str) -> None:
    model, tensors = load_fixture(name)
    expected = {key: value for key, value in tensors.items() if key.startswith("logits.T")}
    assert expected
    for key, logits in expected.items():
        _, length, *state = key.split(".")
        repeats = int(state[0].removeprefix("phase")) if state and state[0].startswith("phase") else 0
        if state == ["loops1"]:  # the banked scripts switch all repeats at once
            repeats = model.config.num_loops
        model.set_graph(GraphState(active_loops=min(repeats, model.config.num_loops)))
        with torch.no_grad():
            found = model(tensors[f"tokens.{length}"].long())
        assert float((found - logits).abs().max()) < TOLERANCE, key


@pytest.mark.parametrize("name", BANKED)
def test_isolated_documents_equal_the_public_scripts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = load_fixture(name)
    model.set_graph(GraphState(active_loops=model.config.num_loops))
    if name == "banked_dense_gate":
        # The script had scored 48 tokens before and kept that longer call's NTK-stretched rotary table for these 32.
        longer = model._rotary(48, torch.device("cpu"))
        monkeypatch.setattr(
            model, "_rotary", lambda seq_len, _: [(cos[:seq_len], sin[:seq_len]) for cos, sin in longer]
        )
    document = torch.searchsorted(tensors["cu_seqlens"].long(), torch.arange(32), right=True)[None]
    with torch.no_grad():
        found = model(tensors["tokens.T32"][:1].long(), document)
    assert float((found - tensors["logits.isolated_row0"]).abs().max()) < TOLERANCE


def test_isolated_documents_score_as_if_each_stood_alone() -> None:
    model = pico_model(smear_gate=True, attn_gate="sparse", lanes_start=1)
    tokens = torch.randint(2, 50, (1, 12), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 5]] = 1  # BOS opens each document
    document = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(tokens, document)[0]
        alone = torch.cat([model(tokens[:, :5])[0], model(tokens[:, 5:])[0]])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_cut_document_scores_as_if_each_piece_stood_alone() -> None:
    model = pico_model(isolate_documents=True, document_cut=4)
    tokens = torch.randint(2, 32, (1, 16), generator=torch.Generator().manual_seed(5))
    tokens[0, 3] = 1  # a window's first document has lost its BOS
    bounds = [0, 3, 7, 11, 15, 16]
    with torch.no_grad():
        whole = model(tokens)[0]
        alone = torch.cat([model(tokens[:, a:b])[0] for a, b in pairwise(bounds)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)
    document = document_pieces(tokens, 4)[0]
    assert document.tolist() == [i + 1 for i, (a, b) in enumerate(pairwise(bounds)) for _ in range(b - a)]
    assert torch.equal(document_pieces(tokens, None), (tokens == 1).cumsum(1))


def test_a_cut_without_isolation_is_refused() -> None:
    with pytest.raises(ValueError, match="document_cut does nothing"):
        pico_model(document_cut=4)


def test_a_model_that_isolates_documents_finds_them_by_their_bos() -> None:
    packed, isolated = pico_model(), pico_model(isolate_documents=True)
    tokens = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(4))
    tokens[0, [0, 5]] = tokens[1, 3] = 1
    document = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 9])
    with torch.no_grad():
        assert torch.equal(isolated(tokens), packed(tokens, document))
        assert not torch.equal(isolated(tokens), packed(tokens))


def pico_model(**overrides: Any) -> GolfGPT:
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "num_layers": 4,
        "model_dim": 24,
        "num_heads": 2,
        "num_kv_heads": 1,
        "rope_dims": 4,
        "xsa_last_n": 2,
        "train_seq_len": 12,
        "loop_start": 1,
        "loop_end": 2,
        "num_loops": 2,
        **overrides,
    }
    torch.manual_seed(0)
    model = GolfGPT(ModelConfig(**settings), GraphState())
    model.initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("active_loops", [0, 1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"smear_gate": True, "attn_gate": "sparse", "lanes_start": 1},
        {"attn_gate": "dense", "gptj_start": 1, "activation": "swiglu"},
        {"attn_gate": "double_sigmoid", "attn_gate_source": "query", "activation": "gelu2", "embedding_dim": 16},
    ],
)
def test_a_changed_token_never_changes_an_earlier_logit(overrides: dict[str, Any], active_loops: int) -> None:
    model = pico_model(**overrides)
    model.set_graph(GraphState(active_loops=active_loops))
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_batches_do_not_mix() -> None:
    model = pico_model()
    tokens = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_visit_lists() -> None:
    config = pico_model().config
    assert visit_list(config, 0) == [0, 1, 2, 3]
    assert visit_list(config, 1) == [0, 1, 2, 1, 2, 3]
    assert visit_list(config, 2) == [0, 1, 2, 1, 2, 1, 2, 3]


def test_loops_change_the_logits_but_not_the_weights() -> None:
    model = pico_model()
    tokens = torch.arange(12)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = []
    for loops in range(3):
        model.set_graph(GraphState(active_loops=loops))
        with torch.no_grad():
            outputs.append(model(tokens))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_softcap_bounds_every_logit() -> None:
    model = pico_model(logit_softcap=5.0)
    with torch.no_grad():
        assert float(model(torch.arange(12)[None]).abs().max()) <= 5.0


def test_loops_beyond_the_configured_are_refused() -> None:
    with pytest.raises(SettingsError, match="active_loops 3 exceeds the configured num_loops 2"):
        GolfGPTFamily().build(pico_model().config.model_dump(), {"active_loops": 3})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3, "num_heads": 4}, "not a multiple of num_kv_heads 3"),
        ({"rope_dims": 5}, "rope_dims 5"),
        ({"loop_end": 9}, "loop_end"),
        ({"leaky_slop": 0.1}, "did you mean 'leaky_slope'"),
    ],
)
def test_impossible_architectures_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(ModelConfig, {**pico_model().config.model_dump(), **overrides}, "config.json: model")


def test_every_matrix_has_a_site_and_sees_its_true_input() -> None:
    model, family = pico_model(), GolfGPTFamily()
    sites = family.sites(model)
    served = [tensor for site in sites for tensor in site.tensors]
    matrices = [name for name, p in model.named_parameters() if family.role(name) != "control" and p.ndim == 2]
    assert sorted(served) == sorted(matrices)
    seen: dict[str, np.ndarray] = {}
    for site in sites:
        module = model.get_submodule(site.module)
        module.register_forward_pre_hook(lambda _, x, name=site.name: seen.__setitem__(name, x[0].numpy()))
    with torch.no_grad():
        model(torch.arange(12)[None])
    for site in sites:
        width = {model.get_parameter(tensor).shape[1] for tensor in site.tensors}
        assert width == {seen[site.name].shape[-1]}, site.name
