"""The model against a second, deliberately plain implementation, feature by feature and in drawn combinations."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf_post.errors import SettingsError
from pgolf_post.plan import make_plan, read_plan
from pgolf_post.settings import parse_settings
from tests.trainer import oracle
from tests.trainer.test_model import BANKED, FLAT, load_fixture
from trainer.family import GolfGPTFamily
from trainer.model.activations import ACTIVATIONS
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.model.ngrams import ngram_hash, product_hash
from trainer.model.visits import num_skips, split_visits, visit_list

PICO: dict[str, Any] = {
    "vocab_size": 23,
    "num_layers": 4,
    "model_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_mult": 1.5,
    "rope_dims": 4,
    "xsa_last_n": 2,
    "train_seq_len": 5,
    "gate_window": 6,
}
LOOP = {"loop_start": 1, "loop_end": 2, "num_loops": 2}
EVERYTHING: dict[str, Any] = {
    **LOOP,
    "embedding_dim": 12,
    "smear_gate": True,
    "attn_gate": "sparse",
    "lanes_start": 3,
    "carry": "learnable",
    "carry_per_pass": True,
    "untied_loop_mlps": True,
    "value_residual": True,
    "value_embed_layers": [1, 3],
    "value_embed_dim": 5,
    "bigram_buckets": 11,
    "bigram_dim": 7,
    "trigram": True,
    "activation": "swiglu",
    "tie_embeddings": False,
}
UNTIED = {"untied_loop_mlps": True, "visit_controls": True, "value_residual": True, "first_attention": False}
KINDS = "690018f1a2039b84570c1d8"  # of PICO's 23 tokens: classes 0 to 7, from 8 on after a space
PART_CASES: dict[str, dict[str, Any]] = {
    "hidden widths by layer, one without an MLP": {"mlp_mult": [1.5, 0.0, 3.0, 2.0]},
    "no MLP in a lane, no attention in another": {"mlp_mult": [2, 2, 2, 0], "attn_layers": [0, 1, 3], "lanes_start": 2},
    "no MLP in sequential lanes": {"mlp_hidden": [7, 7, 0, 9], "lanes_start": 2, "lane_kind": "sequential"},
    "attention in chosen layers": {"attn_layers": [1, 3], "value_residual": True},
    "gains by layer": {"q_gain_init": [1.0, 2.0, 3.0, 4.0]},
    "gains by head, in places too": {**LOOP, "visit_controls": True, "q_gain_init": [[1.0, 5.0]]},
    "gains by layer and head": {"q_gain_init": [[1, 2], [3, 4], [5, 6], [7, 8]]},
    "XSA in chosen layers, by a learned share": {"xsa_layers": [0, 2], "xsa_alpha": 0.9},
    "XSA in chosen places": {**LOOP, "visit_controls": True, "xsa_layers": [1, 5]},
    "rotary by layer": {"rope_base": [1000.0, 50.0, 1000.0, 9.0], "rope_dims": [0, 4, 8, 4], "nope_layers": [2]},
    "activations by layer": {**LOOP, "activation": ["swiglu", "relu2", "gelu2", "silu2"], "untied_loop_mlps": True},
    "a learned carry that starts by pass": {
        **LOOP,
        "carry": "frozen",
        "carry_per_pass": True,
        "carry_beta": [[1.5, 0.8], [1.2, 0.9]],
        "carry_alpha": [[[0.2, 0.1], [-0.3, 0.4]], [[0.0, 0.1], [0.3, 0.2]]],
    },
    "a vector for each pass": {**LOOP, "pass_embeddings": "pass"},
    "a vector for each visit, of rank 2": {**LOOP, "pass_embeddings": "visit", "pass_embedding_rank": 2},
    "norm, FiLM and vectors of passes": {**LOOP, "pass_norm": True, "pass_film": "pass", "pass_embeddings": "visit"},
    "FiLM of visits in an explicit list": {"visits": [0, 1, 2, 1, 2, 3, 1], "pass_film": "visit", "pass_norm": True},
    "a cascade of values": {**LOOP, "value_residual": True, "value_residual_from": "previous"},
    "the embedding in values": {**LOOP, "value_x0_layers": [0, 2], "value_x0_init": 0.3, "value_residual": True},
    "bigrams split at words": {"bigram_buckets": 12, "bigram_classes": "word_start", "trigram": True},
    "bigrams split by place in the word": {"bigram_buckets": 12, "bigram_classes": "word_position", "smear_gate": True},
    "gated bigrams of three hashes": {"bigram_buckets": 9, "bigram_dim": 3, "bigram_heads": 3, "bigram_gate": True},
    "boosted bigrams": {"bigram_buckets": 9, "word_start_boost": True, "embedding_dim": 12},
    "trigrams of their own": {"trigram_buckets": 9, "trigram_dim": 3, "bigram_buckets": 7, "smear_gate": True},
    "trigrams alone, as wide as the embedding": {"trigram_buckets": 5},
    "types of tokens": {"token_type_dim": 3, "embedding_dim": 12},
    "sandwich norm of attention": {"sandwich_norm": "attention"},
    "sandwich norms in lanes": {"sandwich_norm": "both", "lanes_start": 2},
    "skips normalised": {"skip_norm": "before", "skip_gates": False},
    "the stream normalised after skips": {**LOOP, "skip_norm": "after", "lanes_start": 3},
    "no path of the embedding": {"x0_mix": False},
    "no path of the embedding in lanes": {"x0_mix": False, "lanes_start": 2, "lane_kind": "sequential"},
    "a head with a bias and a residual": {"output_bias": "zeros", "head_residual_rank": 3, "embedding_dim": 12},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "explicit list": {"visits": [0, 1, 2, 1, 2, 3, 1], "encoder_visits": 2},
    "pure decoder": {**LOOP, "encoder_visits": 0, "skip_gates": False},
    "all encoder": {**LOOP, "encoder_visits": 8},
    "explicit list, carry before every block was seen": {"visits": [0, 1, 1, 2, 2, 3], "carry": "learnable"},
    "frozen carry": {**LOOP, "carry": "frozen", "carry_beta": [1.5, 0.8], "carry_alpha": [[0.2, 0.1], [-0.3, 0.4]]},
    "untied loop MLPs and GPT-J": {**LOOP, "untied_loop_mlps": True, "gptj_start": 2},
    "untied loop MLPs in lanes": {"visits": [0, 1, 2, 3, 2, 3], "untied_loop_mlps": True, "lanes_start": 2},
    "value residual in a loop from block 0": {"visits": [1, 0, 1, 2, 3, 0], "value_residual": True},
    "value embeddings as wide as the values": {"value_embed_layers": [0, 2], "value_embed_dim": 8, "num_kv_heads": 1},
    "bigrams as wide as the embedding": {"bigram_buckets": 9, "smear_gate": True},
    "bigrams hashed by a product": {"bigram_buckets": 9, "bigram_dim": 3, "bigram_hash": "product"},
    "bigrams hashed by a product, as wide": {"bigram_buckets": 1, "bigram_hash": "product", "bigram_dim": 16},
    "trigrams": {"bigram_buckets": 2, "trigram": True, "bigram_dim": 3},
    "double-sigmoid gate of the query": {"attn_gate": "double_sigmoid", "attn_gate_source": "query", "num_kv_heads": 2},
    "dense gate, one lane's output": {"attn_gate": "dense", "lanes_start": 2, "lane_output": "mlp"},
    "smear across BOS": {"smear_gate": True, "smear_across_bos": True},
    "channels smeared after the norm": {"channel_smear": "after_norm", "bigram_buckets": 9, "bigram_dim": 3},
    "channels smeared before the norm": {"channel_smear": "before_norm", "embedding_dim": 12},
    "an odd hidden width": {"mlp_hidden": 13, "mlp_mult": 2.0},
    "rotary stretched from before the training length": {"rope_ntk_from": 3, "train_seq_len": 6},
    "fewer skips stored than visits could use": {**LOOP, "stored_skips": 2},
    "the last stored skip used again": {**LOOP, "stored_skips": 2, "reuse_last_skip": True, "skip_gates": False},
    "no skip stored": {"stored_skips": 0, "reuse_last_skip": True},
    "value embeddings in descending order": {"value_embed_layers": [3, 0, 2], "value_embed_dim": 3},
    "lanes that split inside a loop": {"num_layers": 2, "loop_end": 1, "num_loops": 2, "lanes_start": 1},
    "lanes that split inside a listed loop": {"visits": [0, 1, 2, 3, 1, 2, 3, 0], "lanes_start": 3, **UNTIED},
    "lanes one after the other": {**LOOP, "lanes_start": 3, "lane_kind": "sequential", "lane_output": "attn"},
    "lanes of their own": {"lanes_start": 2, "lane_kind": "separate", "skip_gates": False},
    "lanes of their own, entered by a loop": {**LOOP, "lanes_start": 2, "lane_kind": "separate", "carry": "none"},
    "gains of each visit": {**LOOP, "visit_controls": True, "value_embed_layers": [5, 6], "value_embed_dim": 3},
    "gains of each visit, as #1204": {
        "loop_start": 1,
        "loop_end": 2,
        "num_loops": 1,
        "visit_controls": True,
        "first_attention": False,
        "lanes_start": 3,
        "lane_kind": "sequential",
        "untied_loop_mlps": True,
        "channel_smear": "after_norm",
        "bigram_buckets": 9,
        "value_embed_layers": [4, 5],
        "value_embed_dim": 3,
        "xsa_last_n": 4,
    },
    "gains of a list shorter than the layers before it": {"visits": [0, 1, 3, 2, 1, 3], "visit_controls": True},
    "no attention in block 0": {"first_attention": False, "value_residual": True, "gptj_start": 0},
    "full rotary, no stretch": {"rope_dims": 0, "rope_ntk": False, "ln_scale": False, "logit_softcap": 4.0},
    **{f"activation {kind}": {"activation": kind} for kind in tuple(ACTIVATIONS)},
    **PART_CASES,
}


def pico_config(overrides: dict[str, Any]) -> ModelConfig:
    """PICO with other settings, and the kinds of its tokens where they are read."""
    settings = {**PICO, **overrides}
    read = {"bigram_classes", "word_start_boost", "token_type_dim"} & overrides.keys()
    return ModelConfig(**settings, token_kinds=KINDS if read else None)


def random_model(overrides: dict[str, Any], seed: int = 0) -> GolfGPT:
    """A float64 model whose every parameter has been moved off its starting value."""
    torch.manual_seed(seed)
    model = GolfGPT(pico_config(overrides), GraphState())
    model.initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().requires_grad_(False)


def draw_tokens(vocab_size: int, seq_len: int, seed: int = 0, batch: int = 2) -> Tensor:
    tokens = torch.randint(vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))
    tokens[0, seq_len // 2] = 1  # a document begins
    return tokens


def assert_equals_the_oracle(model: GolfGPT, tokens: Tensor, document: Tensor | None = None) -> None:
    """In every graph state that the config can be in."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config.model_dump(mode="json")
    for active_loops in range(model.config.max_active_loops + 1):
        model.set_graph(GraphState(active_loops=active_loops))
        documents = None if document is None else document.numpy()
        expected = oracle.forward(weights, config, active_loops, tokens.numpy(), documents)
        found = model(tokens, document).numpy()
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=f"active_loops {active_loops}")


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_each_feature_equals_the_oracle(overrides: dict[str, Any]) -> None:
    assert_equals_the_oracle(random_model(overrides), draw_tokens(23, 7))


def test_isolated_documents_equal_the_oracle() -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    assert_equals_the_oracle(random_model(EVERYTHING), draw_tokens(23, 7), document)


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    """Any legal combination of settings: features are drawn alone, what they need is added."""
    drawn: dict[str, Any] = {
        key: draw(st.sampled_from(values))
        for key, values in {
            "num_kv_heads": (1, 2),
            "embedding_dim": (None, 12),
            "activation": tuple(ACTIVATIONS),
            "leaky_slope": (0.0, 0.5),
            "tie_embeddings": (True, False),
            "rope_dims": (0, 4),
            "rope_ntk": (True, False),
            "xsa_last_n": (0, 2, 4),
            "ln_scale": (True, False),
            "skip_gates": (True, False),
            "smear_gate": (True, False),
            "channel_smear": ("none", "after_norm", "before_norm"),
            "mlp_hidden": (None, 13),
            "rope_ntk_from": (None, 3),
            "stored_skips": (None, 0, 1),
            "attn_gate": ("none", "sparse", "dense", "double_sigmoid"),
            "attn_gate_source": ("input", "query"),
            "lane_output": ("mean", "attn", "mlp"),
            "value_residual": (True, False),
            "first_attention": (True, False),
        }.items()
    }
    kinds = [{"lanes_start": 3, "lane_kind": kind} for kind in ("routed", "sequential", "separate")]
    drawn |= draw(st.sampled_from([{}, {"gptj_start": 1}, *kinds, {"lanes_start": 0}]))
    drawn |= draw(
        st.sampled_from(
            [
                {},
                {"value_embed_layers": [0, 2], "value_embed_dim": 8},
                {"value_embed_layers": [3, 1], "value_embed_dim": 3},
            ]
        )
    )
    drawn |= draw(
        st.sampled_from(
            [
                {},
                {"bigram_buckets": 7},
                {"bigram_buckets": 12, "bigram_dim": 5, "trigram": True},
                {"bigram_buckets": 5, "bigram_hash": "product"},
            ]
        )
    )
    lists = [{}, LOOP, {"loop_start": 0, "loop_end": 0, "num_loops": 1}, {"visits": [0, 1, 2, 0, 2, 1, 3]}]
    chosen = draw(st.sampled_from(lists))
    drawn |= chosen
    if chosen:
        drawn["untied_loop_mlps"] = draw(st.booleans())
        drawn["carry"] = draw(st.sampled_from(["none", "frozen", "learnable"]))
        drawn["visit_controls"] = draw(st.booleans())
        if drawn.get("lane_kind") == "routed" and (start := draw(st.sampled_from([1, 2, 3]))) < 3:
            drawn |= {"lanes_start": start, "carry": "none"}  # within the loop: carries of what is re-visited are none
        drawn["carry_per_pass"] = drawn["carry"] != "none" and draw(st.booleans())
    drawn["encoder_visits"] = draw(st.sampled_from([None, 0, 1, 4]))
    if drawn.get("lane_kind") == "sequential" and drawn["encoder_visits"] == 4:
        drawn["encoder_visits"] = None
    drawn["smear_across_bos"] = drawn["smear_gate"] and draw(st.booleans())
    if drawn["encoder_visits"] in (0, 4):  # the plain list then has no skips
        drawn["stored_skips"] = None
    drawn["reuse_last_skip"] = drawn["stored_skips"] is not None and draw(st.booleans())
    return drawn


@settings(
    max_examples=settings.default.max_examples * 3 // 2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(architectures(), st.integers(1, 8), st.integers(0, 5))
def test_drawn_combinations_equal_the_oracle(overrides: dict[str, Any], seq_len: int, seed: int) -> None:
    assert_equals_the_oracle(random_model(overrides, seed), draw_tokens(23, seq_len, seed, batch=1))


def returns_below_the_split(overrides: dict[str, Any]) -> bool:
    """Whether a layer below lanes_start is visited after one from there on: it is to go through both lanes."""
    config = pico_config(overrides)
    visits, start = visit_list(config, config.max_active_loops), config.lanes_start
    split = next((place for place, layer in enumerate(visits) if start and layer >= start), len(visits))
    return config.lane_kind == "routed" and any(layer < start for layer in visits[split:])


def test_lanes_that_split_inside_a_loop_are_among_what_is_drawn() -> None:
    generated = settings(max_examples=2000, phases=[Phase.generate], database=None, deadline=None)
    overrides = find(architectures(), returns_below_the_split, settings=generated, random=Random(0))
    assert_equals_the_oracle(random_model(overrides), draw_tokens(23, 7))


@pytest.mark.parametrize("name", [*FLAT, *BANKED])
def test_the_oracle_gives_the_public_scripts_logits(name: str) -> None:
    model, tensors = load_fixture(name)
    weights = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    config = model.config.model_dump(mode="json")
    checked = 0
    for key, logits in tensors.items():
        if not key.startswith("logits.T"):
            continue
        _, length, *state = key.split(".")
        repeats = 0
        if state:
            repeats = model.config.num_loops if state[0] == "loops1" else int(state[0][-1])
        if repeats > model.config.num_loops:
            continue
        tokens = tensors[f"tokens.{length}"][:1].numpy()
        found = oracle.forward(weights, config, repeats, tokens)
        assert np.abs(found - logits[:1].numpy()).max() < 2e-4, key
        checked += 1
    assert checked


@pytest.mark.parametrize("active_loops", [0, 1, 2])
def test_with_everything_on_a_changed_token_never_changes_an_earlier_logit(active_loops: int) -> None:
    model = random_model(EVERYTHING)
    model.set_graph(GraphState(active_loops=active_loops))
    tokens = draw_tokens(23, 9)
    before = model(tokens)
    for position in range(9):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 5) % 23
        after = model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position] != after[:, position]).any(dim=-1).all()


# ---- details that the oracle cannot show ---------------------------------------------------------------------------


def test_hashes_by_hand() -> None:
    tokens = torch.tensor([[3, 8, 8, 65535]], dtype=torch.int32)
    expected = [(36313 * b) ^ (27191 * a) for a, b in ((3, 8), (8, 8), (8, 65535))]
    assert ngram_hash(tokens, 2, 100).tolist() == [[99, *(value % 99 for value in expected)]]
    trigrams = [(36313 * c) ^ (27191 * b) ^ (51497 * a) for a, b, c in ((3, 8, 8), (8, 8, 65535))]
    assert max(trigrams) > 2**31  # int32 would have wrapped
    assert ngram_hash(tokens, 3, 100).tolist() == [[99, 99, *(value % 99 for value in trigrams)]]
    assert ngram_hash(tokens[:, :1], 3, 100).tolist() == [[99]]
    products = [3, 92821 * 3 + 8, 92821 * 8 + 8, 92821 * 8 + 65535]
    assert product_hash(tokens, 100).tolist() == [[value % 100 for value in products]]


def test_the_carry_sends_no_gradient_into_the_first_visit() -> None:
    overrides = {"visits": [0, 1, 1], "num_layers": 2, "encoder_visits": 0, "carry": "learnable", "xsa_last_n": 0}
    model = random_model({**overrides, "carry_beta": [0.0], "carry_alpha": [[1.0]]}).requires_grad_(True)
    with torch.no_grad():
        model.recur_beta.zero_()  # what is left of the re-visit is the carry alone
    model.set_graph(GraphState(active_loops=1))
    model(draw_tokens(23, 5)).sum().backward()
    assert float(model.blocks[1].attn.q.weight.grad.abs().max()) == 0.0
    assert float(model.recur_alpha.grad.abs().max()) > 0.0


def test_frozen_coefficients_are_saved_but_not_trained() -> None:
    beta, alpha = [1.56, 1.85], [[0.23, 0.04], [0.13, -0.34]]
    settings = {**PICO, **LOOP, "carry": "frozen", "carry_per_pass": True, "carry_beta": beta, "carry_alpha": alpha}
    model = GolfGPT(ModelConfig(**settings), GraphState(active_loops=2))
    assert not model.recur_beta.requires_grad
    assert not model.recur_alpha.requires_grad
    state = model.state_dict()
    torch.testing.assert_close(state["recur_beta"], torch.tensor([beta, beta]))
    torch.testing.assert_close(state["recur_alpha"], torch.tensor([alpha, alpha]))


@pytest.mark.parametrize(
    "feature", ["carry", "value_residual", "value_embed", "bigram", "trigram", "passes", "head", "values", "types"]
)
def test_a_fresh_feature_changes_nothing_yet(feature: str) -> None:
    overrides: dict[str, Any] = {
        "carry": {"carry": "learnable"},
        "value_residual": {"value_residual": True},
        "value_embed": {"value_embed_layers": [1], "value_embed_dim": 3},
        "bigram": {"bigram_buckets": 9, "bigram_dim": 3},
        "trigram": {"trigram_buckets": 9, "trigram_dim": 3},
        "passes": {"pass_embeddings": "visit", "pass_embedding_rank": 2, "pass_film": "pass"},
        "head": {"output_bias": "zeros", "head_residual_rank": 2},
        "values": {"value_x0_layers": [1, 2], "value_residual": True, "value_residual_from": "previous"},
        "types": {"token_type_dim": 3},
    }[feature]
    plain, extended = (GolfGPT(pico_config({**LOOP, **o}), GraphState(active_loops=2)) for o in ({}, overrides))
    for model in (plain, extended):
        torch.manual_seed(0)
        model.initialise()
    common = plain.state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in common.values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    extended.load_state_dict(common, strict=False)
    tokens = draw_tokens(23, 7)
    with torch.no_grad():
        assert torch.equal(plain(tokens), extended(tokens))


def test_settings_of_older_checkpoints_build_the_same_model() -> None:
    old = {**PICO, **LOOP}
    model = GolfGPTFamily().build(old, {"active_loops": 1})
    new_names = {"recur_beta", "recur_alpha"} | {n for n in model.state_dict() if n.startswith(("override", "bigram"))}
    assert not new_names & model.state_dict().keys()
    per_block = ["attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.proj.weight", "attn.q_gain", "resid_mix"]
    per_block += ["mlp.fc.weight", "mlp.proj.weight", "attn_scale", "mlp_scale"]
    blocks = {f"blocks.{i}.{name}" for i in range(4) for name in per_block}
    assert set(model.state_dict()) == {"tok_emb.weight", "skip_weights", "skip_gates", *blocks}
    assert model.state_dict()["skip_weights"].shape == (4, 16)


def test_a_checkpoint_from_before_a_kind_existed_keeps_its_meaning() -> None:
    old = {**PICO, "smear_gate": True, "lanes_start": 3, "bigram_buckets": 9}  # as its config.json has it
    config = GolfGPTFamily().build(old, {}).config
    assert (config.smear_across_bos, config.channel_smear, config.lane_kind) == (False, "none", "routed")
    assert (config.bigram_hash, config.first_attention, config.visit_controls) == ("xor", True, False)
    assert (config.mlp_hidden, config.rope_ntk_from, config.stored_skips) == (None, None, None)


@pytest.mark.parametrize("active_loops", [0, 1, 2])
def test_every_matrix_that_the_graph_reaches_has_a_site(active_loops: int) -> None:
    model, family = random_model(EVERYTHING), GolfGPTFamily()
    model.set_graph(GraphState(active_loops=active_loops))
    sites, seen = family.sites(model), {}
    for site in sites:
        hook = lambda _, x, name=site.name: seen.__setitem__(name, x[0].shape[-1])  # noqa: E731
        model.get_submodule(site.module).register_forward_pre_hook(hook)
    model(draw_tokens(23, 7))
    for site in sites:
        assert {model.get_parameter(tensor).shape[1] for tensor in site.tensors} == {seen[site.name]}, site.name
    plan = make_plan(model.state_dict(), family, model, read_plan("sdclip-1394", ["matrices.without_site=rtn"]))
    rounded = {row.name for row in plan if row.method == "rtn"}
    tables = {"tok_emb.weight", "bigram.embed.weight", "value_embed.embed.weight"}
    unreached = {
        f"override_mlps.{layer}_p{k}.{part}.weight"
        for layer in (1, 2)
        for k in range(active_loops + 1, 3)
        for part in ("fc", "gate", "proj")
    }
    assert rounded == tables | unreached
    kept = {row.name for row in plan if row.method == "keep"}
    assert not [name for name in kept if name.endswith(".weight")]


def test_the_encoder_split_holds_for_every_list_and_sizes_the_skips() -> None:
    config = ModelConfig(**PICO, visits=(0, 1, 2, 1, 2, 3), encoder_visits=5)
    assert split_visits(config, 0) == ([0, 1, 2, 3], [])
    assert split_visits(config, 1) == ([0, 1, 2, 1, 2], [3])
    assert num_skips(config) == 1
    assert num_skips(ModelConfig(**PICO, visits=(0, 1))) == 2  # the plain list is the longer one


def test_an_explicit_list_is_on_or_off() -> None:
    with pytest.raises(SettingsError, match="active_loops 2 exceeds 1, the explicit visits"):
        GolfGPTFamily().build({**PICO, "visits": [0, 1, 1, 2, 3]}, {"active_loops": 2})


LATE_LANES = {"lane_kind": "sequential", "lanes_start": 3}
OWN_LANES = {"lane_kind": "separate", "lanes_start": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"visits": [0, 4]}, "visits: 4 is not a layer; layers are 0..3"),
        ({"visits": [0, -1]}, "visits: -1 is not a layer"),
        ({"visits": []}, "visits is empty"),
        ({"visits": [0, 1], **LOOP}, "visits replaces loop_start, loop_end and num_loops"),
        ({**LATE_LANES, "visits": [0, 1, 2, 3, 1]}, "visits: layer 1 comes after the lanes split at lanes_start 3"),
        ({**LATE_LANES, **LOOP, "loop_end": 3, "encoder_visits": 3}, "loops: layer 1 comes after the lanes split"),
        ({"encoder_visits": 5}, "encoder_visits 5 exceeds the 4 visits"),
        ({"encoder_visits": -1}, "encoder_visits = -1"),
        ({"carry": "frozen"}, "need a layer that is visited twice"),
        ({"untied_loop_mlps": True, "visits": [0, 1]}, "need a layer that is visited twice"),
        ({**LOOP, "carry_per_pass": True}, "do nothing with carry 'none'"),
        ({**LOOP, "carry": "frozen", "carry_beta": [1.0]}, r"carry_beta must have 2 columns.*\[1, 2\]"),
        ({**LOOP, "carry": "frozen", "carry_alpha": [[1.0, 0.0]]}, "carry_alpha has 1 rows, must have 2"),
        ({**LOOP, "carry": "frozen", "carry_alpha": [[1.0], [0.0, 1.0]]}, "carry_alpha must have 2 columns"),
        ({**LOOP, "carry": "frozen", "lanes_start": 1}, "layer [12] is re-visited after lanes split"),
        ({"bigram_buckets": 1}, "bigram_buckets 1"),
        ({"bigram_hash": "product"}, "needs a bigram table"),
        ({"trigram": True}, "do nothing with bigram_buckets 0"),
        ({"value_embed_layers": [4], "value_embed_dim": 2}, "value_embed_layers: 4 is not a layer"),
        ({"value_embed_layers": [2, 1, 2], "value_embed_dim": 2}, r"names a layer twice: \[2, 1, 2\]"),
        ({"smear_across_bos": True}, "does nothing without smear_gate"),
        ({"lanes_start": 1, "lane_kind": "sequential"}, "layer 1 comes before the decoder half"),
        ({"visit_controls": True}, "needs a list with more visits than layers"),
        (
            {**OWN_LANES, "first_attention": False, "visits": [1, 2, 3, 0, 1], "encoder_visits": 0},
            "block 0 cannot be visited in lanes",
        ),
        (
            {"first_attention": False, "visits": [1, 0, 1, 2, 3], "visit_controls": True},
            "lists must begin with block 0",
        ),
        ({"stored_skips": 3}, "stored_skips 3 exceeds the 2 that visits can use"),
        ({"reuse_last_skip": True}, "does nothing without stored_skips"),
        ({"value_embed_layers": [2]}, "go together"),
        ({"value_embed_dim": 2}, "go together"),
    ],
)
def test_contradictions_are_refused_by_name(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(ModelConfig, {**PICO, **overrides}, "config.json: model")
