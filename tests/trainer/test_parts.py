"""Parts that most models lack: off they leave no trace, on they have a law, and what could not act is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.families import build_module
from pgolf_post.plan import make_plan, read_plan
from pgolf_post.score.breakdown.token_text import CLASSES, token_kinds
from pgolf_post.settings import parse_settings
from tests.trainer.test_oracle import KINDS, LOOP, PART_CASES, PICO, draw_tokens, pico_config, random_model
from trainer.family import GolfGPTFamily
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.model.ngrams import HEADS, class_hash, ngram_hash, token_classes
from trainer.model.parts import settings_of_parts
from trainer.optim.optimizer import assign_groups
from trainer.start.from_text import affinity, first_tokens, start_from_text, unigram_bias

ALL_PARTS: dict[str, Any] = {
    **LOOP,
    "mlp_mult": [1.5, 1.5, 3.0, 0.0],
    "activation": ["relu2", "swiglu", "silu2", "relu2"],
    "attn_layers": [0, 1, 3],
    "xsa_layers": [1, 3],
    "xsa_alpha": 0.8,
    "pass_embeddings": "visit",
    "pass_embedding_rank": 2,
    "pass_norm": True,
    "pass_film": "pass",
    "value_x0_layers": [1, 3],
    "bigram_buckets": 9,
    "bigram_dim": 3,
    "bigram_heads": 2,
    "bigram_gate": True,
    "bigram_classes": "word_start",
    "word_start_boost": True,
    "trigram_buckets": 7,
    "trigram_dim": 3,
    "token_type_dim": 3,
    "output_bias": "zeros",
    "head_residual_rank": 2,
}


# ---- off ---------------------------------------------------------------------------------------------------------


def test_a_part_that_a_model_lacks_is_not_in_its_config() -> None:
    family = GolfGPTFamily()
    written = family.complete({**PICO, **LOOP})
    assert not written.keys() & settings_of_parts(ModelConfig)
    assert len(settings_of_parts(ModelConfig)) > 20
    part = family.complete({**PICO, "skip_norm": "after", "nope_layers": [1]})
    assert part.keys() - written.keys() == {"skip_norm", "nope_layers"}
    assert family.complete(json.loads(json.dumps(part))) == part


# ---- on: beside the oracle's cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("active_loops", [0, 2])
def test_every_matrix_of_a_part_has_a_role_a_group_and_a_site(active_loops: int) -> None:
    model, family = random_model(ALL_PARTS), GolfGPTFamily()
    model.set_graph(GraphState(active_loops=active_loops))
    sites, seen = family.sites(model), {}
    for site in sites:
        hook = lambda _, x, name=site.name: seen.__setitem__(name, x[0].shape[-1])  # noqa: E731
        model.get_submodule(site.module).register_forward_pre_hook(hook)
    model(draw_tokens(23, 7))
    for site in sites:
        assert {model.get_parameter(tensor).shape[1] for tensor in site.tensors} == {seen[site.name]}, site.name
    plan = make_plan(model.state_dict(), family, model, read_plan("sdclip-1394", ["matrices.without_site=rtn"]))
    tables = {
        f"{part}.embed.weight" for part in ("bigram", "trigram", "token_type")
    }  # the tied embedding is the head's
    assert {row.name for row in plan if row.method == "rtn"} == tables
    assert not [row.name for row in plan if row.method == "keep" and row.name.endswith(".weight")]
    groups = assign_groups(model)
    assert {"head_residual.up.weight", "trigram.proj.weight", "token_type.proj.weight"} <= set(groups["matrix"])
    assert {"passes.code", "passes.basis", "passes.film", "passes.gain", "output_bias"} <= set(groups["scalar"])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_values_that_read_the_embedding_have_a_site_of_their_own() -> None:
    model = random_model({"value_x0_layers": [2]})
    by_tensor = {tensor: site.name for site in GolfGPTFamily().sites(model) for tensor in site.tensors}
    assert by_tensor["blocks.2.attn.v.weight"] == "blocks.2.attn.v_in"
    assert by_tensor["blocks.2.attn.q.weight"] == by_tensor["blocks.2.attn.k.weight"] == "blocks.2.attn.in"
    assert by_tensor["blocks.1.attn.v.weight"] == "blocks.1.attn.in"


def test_folds_follow_each_layers_activation() -> None:
    model = random_model({"activation": ["relu2", "silu2", "relu3", "swiglu"]})
    powers = {name: fold.power for name, fold in GolfGPTFamily().folds(model).items()}
    at = "blocks.{}.mlp.proj.weight".format
    assert powers == {at(0): 2.0, at(2): 3.0, at(3): 1.0}


def test_a_module_without_weights_knows_the_kinds_of_tokens() -> None:
    model = pico_config({"token_type_dim": 2}).model_dump(mode="json")
    module: Any = build_module({"family": "golf_gpt", "model": model, "graph": {}})
    assert module.tok_emb.weight.is_meta
    assert module.token_kinds(torch.tensor([[2, 6]])).tolist() == [[0, 8 + 7]]
    assert "token_kinds.table" not in module.state_dict()


def test_kinds_are_the_tokenizers(pico_data: DataFolder) -> None:
    kinds = [int(digit, 16) for digit in token_kinds(pico_data.tokenizer)]
    assert len(kinds) == pico_data.vocab_size
    assert [kind >= 8 for kind in kinds] == pico_data.byte_table.has_leading_space.tolist()
    assert CLASSES[kinds[1] % 8] == "BOS"


def test_hashes_split_by_class_by_hand() -> None:
    tokens = torch.tensor([[3, 8, 8, 6]])
    pairs = [(36313 * b) ^ (27191 * a) for a, b in ((3, 8), (8, 8), (8, 6))]
    found = class_hash(tokens, 2, 100, 0, torch.tensor([[0, 1, 0, 1]]), 2)
    assert found.tolist() == [[99, 49 + pairs[0] % 49, pairs[1] % 49, 49 + pairs[2] % 49]]
    second = [(HEADS[1][0] * b) ^ (HEADS[1][1] * a) for a, b in ((3, 8), (8, 8), (8, 6))]
    assert ngram_hash(tokens, 2, 100, 1).tolist() == [[99, *(value % 99 for value in second)]]
    kinds = torch.tensor([[8, 0, 1, 9, 0]])  # a word of three tokens, one of two
    assert token_classes(kinds, "word_start").tolist() == [[0, 1, 1, 0, 1]]
    assert token_classes(kinds, "word_position").tolist() == [[0, 1, 2, 0, 1]]


def test_starting_values_are_those_of_the_settings() -> None:
    model = GolfGPT(ModelConfig(**{**PICO, "q_gain_init": [[1.0, 2.5]], "xsa_alpha": 0.75, "value_residual": True,
                                   "value_residual_init": 0.25, "value_x0_layers": [1], "value_x0_init": 0.5}),
                    GraphState())  # fmt: skip
    state = model.state_dict()
    assert state["blocks.3.attn.q_gain"].tolist() == [1.0, 2.5]
    assert torch.sigmoid(state["blocks.3.attn.xsa_alpha"]).item() == pytest.approx(0.75)
    assert "blocks.1.attn.xsa_alpha" not in state  # no XSA there
    assert state["blocks.0.attn.value_mix"].tolist() == [0.25, 0.75]
    assert state["blocks.1.attn.x0_share"].item() == 0.5


# ---- starts that read text -----------------------------------------------------------------------------------------


def test_the_unigram_bias_gives_the_frequencies_of_the_text(pico_data: DataFolder) -> None:
    settings = {**PICO, "vocab_size": pico_data.vocab_size, "output_bias": "unigram"}
    model = GolfGPT(ModelConfig(**settings), GraphState()).double()
    model.initialise()
    start_from_text(model, pico_data)
    counts = np.bincount(np.concatenate([tokens for _, tokens in pico_data.shards("train")]), minlength=320)
    with torch.no_grad():
        probabilities = torch.softmax(model.logits(torch.zeros(1, 16, dtype=torch.float64)), -1)[0].numpy()
    np.testing.assert_allclose(probabilities, (counts + 1) / (counts.sum() + 320), rtol=1e-9)
    assert np.abs(unigram_bias(np.array([10**9, 0]), 3.0)).max() <= 3.0 * np.arctanh(0.99) + 1e-12


def test_affinity_by_hand() -> None:
    found = affinity(np.array([0, 1, 1, 0, 1]), 2)  # 1 after 0 twice, 1 after 1 once, 0 after 1 once
    logs = np.log1p([[0.0, 1.0], [2.0, 1.0]])
    middle = logs - logs.mean(0, keepdims=True) - logs.mean(1, keepdims=True) + logs.mean()
    np.testing.assert_allclose(found, middle, atol=1e-15)


def test_queries_and_keys_begin_at_the_cooccurrence(pico_data: DataFolder) -> None:
    settings = {**PICO, "vocab_size": pico_data.vocab_size, "num_heads": 4, "num_kv_heads": 2, "embedding_dim": 12}
    settings |= {"qk_init": "cooccurrence"}
    plain = GolfGPT(ModelConfig(**settings), GraphState()).double()
    plain.initialise()
    began = plain.blocks[0].attn.q.weight.detach().clone()
    start_from_text(plain, pico_data)
    attention, width = plain.blocks[0].attn, 4
    # the same from the definition, in NumPy
    rows = plain.tok_emb.weight.detach().numpy()
    rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + np.finfo(np.float32).eps)
    rows = rows @ plain.embed_proj.weight.detach().numpy().T
    u, s, vh = np.linalg.svd(rows.T @ affinity(first_tokens(pico_data), 320) @ rows)
    for group in range(2):
        part = slice(group * width, (group + 1) * width)
        wanted = (u[:, part] * s[part]) @ vh[part]
        query = attention.q.weight.detach().numpy()[2 * group * width : (2 * group + 1) * width]
        key = attention.k.weight.detach().numpy()[part]
        found = query.T @ key
        np.testing.assert_allclose(found / np.linalg.norm(found), wanted / np.linalg.norm(wanted), atol=1e-9)
        assert np.linalg.norm(query) == pytest.approx(2.0)
        assert np.linalg.norm(key) == pytest.approx(2.0)
    others = slice(width, 2 * width)  # the second query head of the first group stays orthogonal
    assert torch.equal(attention.q.weight[others], began[others])


def test_only_the_first_tokens_are_counted(pico_data: DataFolder) -> None:
    whole = np.concatenate([tokens for _, tokens in pico_data.shards("train")])
    assert first_tokens(pico_data, 100).tolist() == whole[:100].tolist()
    assert len(first_tokens(pico_data)) == len(whole)


# ---- what could not act ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mlp_mult": [1.0, 2.0]}, "mlp_mult lists 2 values; num_layers is 4"),
        ({"mlp_mult": -1.0}, "mlp_mult -1.0 of layer 0 must be 0 .no MLP. or"),
        ({"mlp_mult": [1.0, 1.0, 0.01, 1.0]}, "mlp_mult 0.01 of layer 2 must be"),
        ({"mlp_hidden": [8, 8, 8, -8]}, "mlp_hidden -8 of layer 3 must be at least 0"),
        ({"mlp_mult": [1, 1, 1, 0], "attn_layers": [0, 1]}, "layer 3 has neither attention nor an MLP"),
        ({"attn_layers": [0, 4]}, "attn_layers: 4 is not a layer; layers are 0..3"),
        ({"attn_layers": [1, 1]}, r"attn_layers names a layer twice: \[1, 1\]"),
        ({**LOOP, "visit_controls": True, "attn_layers": [0, 1]}, "visit_controls gives gains to every visit"),
        ({**LOOP, "visit_controls": True, "xsa_alpha": 0.5}, "xsa_alpha is one share for each layer"),
        ({**LOOP, "visit_controls": True, "x0_mix": False}, "x0_mix = false leaves none"),
        ({"xsa_alpha": 1.0}, "xsa_alpha = 1.0: Input should be less than 1"),
        ({"xsa_alpha": 0.5, "xsa_layers": []}, "xsa_alpha 0.5 does nothing without XSA"),
        ({"xsa_layers": [9]}, "xsa_layers: 9 is not a layer"),
        ({"nope_layers": [-1]}, "nope_layers: -1 is not a layer"),
        ({"rope_base": [10.0, 10.0, 1.0, 10.0]}, "rope_base 1.0 of layer 2 must be above 1"),
        ({"rope_base": 0.5}, "rope_base 0.5 of layer 0 must be above 1"),
        ({"rope_dims": [4, 4, 4, 10]}, "rope_dims 10 must be even and at most"),
        ({"q_gain_init": [1.0, 2.0]}, "q_gain_init lists 2 values; num_layers is 4"),
        ({"q_gain_init": [1.0]}, "q_gain_init lists 1 values; num_layers is 4"),
        ({"q_gain_init": [[1.0, 2.0, 3.0]]}, "q_gain_init lists 3 heads; num_heads is 2"),
        ({"activation": ["relu2", "relu2", "relu2", "relu9"]}, "unknown activation 'relu9'; choose one of relu2"),
        ({**LOOP, "carry": "frozen", "carry_beta": [[1.0, 1.0]]}, "carry_beta lists passes, which needs carry_per"),
        (
            {**LOOP, "carry": "frozen", "carry_per_pass": True, "carry_beta": [[1.0, 1.0]]},
            "carry_beta lists 1 passes; layers are re-visited 2 times",
        ),
        (
            {**LOOP, "carry": "frozen", "carry_per_pass": True, "carry_alpha": [[[1, 0], [0, 1]], [[1, 0]]]},
            "carry_alpha has 1 rows, must have 2",
        ),
        ({"pass_norm": True}, "need a layer that is visited twice"),
        ({**LOOP, "pass_embedding_rank": 2}, "pass_embedding_rank 2 does nothing"),
        ({**LOOP, "pass_embeddings": "pass", "pass_embedding_rank": 4}, "exceeds that of its table, 3 rows of 16"),
        ({"visits": [0, 1, 2, 3, 2, 3], "lanes_start": 2, "pass_film": "pass"}, "layer [23] is re-visited after lanes"),
        ({"value_residual_from": "previous"}, "do nothing without value_residual = true"),
        ({"value_x0_layers": [1], "attn_layers": [0]}, "value_x0_layers: layer 1 has no attention"),
        ({"value_x0_init": 0.5}, "value_x0_init 0.5 does nothing without value_x0_layers"),
        ({"bigram_heads": 2}, "bigram_heads needs a bigram table"),
        ({"bigram_heads": 5, "bigram_buckets": 9}, "bigram_heads = 5"),
        ({"bigram_gate": True, "bigram_buckets": 9, "bigram_hash": "product"}, "bigram_gate needs a bigram table with"),
        ({"bigram_classes": "word_position", "bigram_buckets": 3}, "too few for bigram_classes .*: at least 4"),
        ({"trigram_dim": 3}, "trigram_dim 3 does nothing with trigram_buckets 0"),
        ({"trigram": True, "bigram_buckets": 9, "trigram_buckets": 9}, "in one of their own; set one"),
        ({"trigram_buckets": 1}, "trigram_buckets 1 leaves no bucket"),
        ({"head_residual_rank": 17}, "head_residual_rank 17 exceeds model_dim 16"),
        ({"qk_init": "cooccurrence", "first_attention": False}, "qk_init 'cooccurrence' starts block 0's attention"),
        ({"token_type_dim": 2}, "need token_kinds, from the tokenizer"),
        ({"token_type_dim": 2, "token_kinds": "00"}, "token_kinds has 2 digits, vocab_size is 23"),
        ({"token_kinds": KINDS}, "token_kinds is read by"),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused_by_name_and_limit(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(ModelConfig, {**PICO, **overrides}, "config.json: model")


def test_every_part_is_among_the_oracles_cases() -> None:
    named = {key for overrides in PART_CASES.values() for key in overrides}
    elsewhere = {"token_kinds", "qk_init", "value_residual_init"}  # in the config of those that read them; starts
    assert settings_of_parts(ModelConfig) - named == elsewhere
