"""Kinds of model that the public scripts train: each is inferred from its file and its script's own words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import build_module, get_family, load_module
from pgolf_post.importers import FORMATS, recognise
from pgolf_post.importers.foreign_config import Inferred, infer_model
from pgolf_post.importers.importing import import_file
from pgolf_post.importers.log_file import read_log
from pgolf_post.importers.script_words import split_log, translate
from pgolf_post.importers.visits import name_visits
from pgolf_post.score.breakdown.token_text import token_kinds
from tests.trainer import oracle

SMALL = {  # in our words; what every script says in its own
    "vocab_size": 32, "train_seq_len": 16, "num_layers": 6, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1,
    "mlp_mult": 2.0, "rope_dims": 4, "xsa_last_n": 6,
}  # fmt: skip
SAID = {
    "activation": "leaky_relu2", "logit_softcap": 30.0, "rope_base": 10000.0, "rope_dims": 4, "rope_ntk": True,
    "xsa_last_n": 6, "ln_scale": True, "num_loops": 0, "train_seq_len": 16,
}  # fmt: skip
LOG_0403 = {  # the settings of the model in the log of 2026-04-03, at this size
    "disable_layer0_attn": False, "embedding_dim": 16, "eval_seq_len": 16, "ln_scale": True, "logit_softcap": 30.0,
    "mlp_mult": 2.0, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "num_layers": 6, "parallel_residual": False,
    "parallel_start_layer": 4, "parallel_start_layer_is_physical": True, "qk_gain_init": 4.0, "recur_layers_str": "2,3",
    "recur_start_step": 3000, "repeat_untie_mlp": "none", "repeat_untie_mlp_layers": "", "rope_base": 10000.0,
    "rope_dims": 4, "rope_train_seq_len": 16, "skip_gates_enabled": True, "tie_embeddings": True, "train_seq_len": 16,
    "ve_dim": 5, "ve_enabled": True, "ve_layers": "4,5", "vocab_size": 32, "xsa_last_n": 6,
}  # fmt: skip
LOG_0404 = {  # of 2026-04-04
    "embedding_dim": 16, "eval_seq_len": 16, "ln_scale": True, "logit_softcap": 30.0, "mlp_mult": 2.0, "model_dim": 16,
    "num_heads": 2, "num_kv_heads": 1, "num_layers": 6, "parallel_start_layer": 4, "qk_gain_init": 5.0,
    "recur_layers": "2,3", "recur_start_step": 3000, "rope_base": 10000.0, "rope_dims": 4, "rope_train_seq_len": 16,
    "skip_gates_enabled": True, "tie_embeddings": True, "train_seq_len": 16, "ve_dim": 5, "ve_enabled": True,
    "ve_layers": "4,5", "vocab_size": 32, "xsa_last_n": 6,
}  # fmt: skip
NOT_LOGGED = {"activation": "leaky_relu2", "rope_ntk": True, "reuse_last_skip": True}
VALUES = {"value_embed_dim": 5, "value_embed_layers": [4, 5], "q_gain_init": 4.0}
LATE = {"gate_window": 6, "skip_gates": True, "smear_gate": True, "lanes_start": 0}

# kind: (what the model is beyond SMALL, what its script says beyond SAID, a tensor of its file, format)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "one share per channel, March": (
        {"channel_smear": "after_norm", "skip_gates": False, "bigram_buckets": 12, "bigram_dim": 4, "rope_ntk_from": 8},
        {"bigram_vocab_size": 12, "bigram_dim": 4, "rope_ntk_from": 8},
        "smear.gate",
        "flat",
    ),
    "one share per channel, in banks": (
        {"channel_smear": "after_norm", "skip_gates": False, **VALUES, "rope_ntk": False},
        {"ve_enabled": True, "ve_dim": 5, "ve_layers": "4,5", "qk_gain_init": 4.0, "rope_ntk": False},
        "smear.gate",
        "banked",
    ),
    "the token's own share": (
        {"channel_smear": "before_norm", "skip_gates": False, "rope_ntk": False, "ln_scale": False}
        | {"bigram_buckets": 12, "bigram_dim": 4, "bigram_hash": "product"},
        {"use_smeargate": True, "rope_ntk": False, "ln_scale": False, "bigram_hash_buckets": 12, "bigram_hash_dim": 4},
        "smeargate.gate",
        "flat",
    ),
    "smear across BOS": (
        {**LATE, "smear_across_bos": True},
        {
            "smear_gate_enabled": True,
            "smear_across_bos": True,
            "parallel_start_layer": 0,
            "parallel_final_lane": "mean",
        },
        "smear_gate.weight",
        "banked",
    ),
    "an artifact of the banked line, named as flat files are": (
        {**LATE, "lanes_start": 4, "loop_start": 3, "loop_end": 5, "num_loops": 2},  # the lanes split inside the loop
        {"smear_across_bos": False, "parallel_start_layer": 4, "parallel_final_lane": "mean"}
        | {"loop_start": 3, "loop_end": 5, "num_loops": 2},
        "parallel_post_lambdas",
        "flat",
    ),
    "lanes that begin nowhere": (
        {**LATE, "lanes_start": 0},
        {"smear_across_bos": False, "parallel_start_layer": -1, "parallel_final_lane": "mean"},
        "parallel_resid_lambdas",
        "flat",
    ),
    "2026-04-03 as it was run": (
        {**VALUES, "num_loops": 1, "loop_start": 2, "loop_end": 3, "stored_skips": 3, "reuse_last_skip": True},
        {**LOG_0403, **NOT_LOGGED},
        "ve_layer_scales.1",
        "flat",
    ),
    "2026-04-03 without recurrence": (
        VALUES,
        {**LOG_0403, **NOT_LOGGED, "recur_layers_str": ""},
        "ve_shared.scale",
        "flat",
    ),
    "2026-04-04 as it was run": (
        {**VALUES, "q_gain_init": 5.0, "num_loops": 1, "loop_start": 2, "loop_end": 3, "stored_skips": 3}
        | {"lanes_start": 4, "lane_kind": "separate"},
        {**LOG_0404, **NOT_LOGGED, "reuse_last_skip": False},
        "lane_merge",
        "flat",
    ),
    "lanes of which the MLP's reads the other's update": (
        {"lanes_start": 4, "lane_kind": "sequential"},
        {"parallel_residual": True, "parallel_start_layer": 4, "lane_output": "mean"},
        "parallel_post_lambdas",
        "banked",
    ),
    "2026-03-31 as it was run, without its attention of block 0": (
        {"num_loops": 1, "loop_start": 2, "loop_end": 3, "visit_controls": True, "first_attention": False}
        | {"untied_loop_mlps": True, "lanes_start": 4, "lane_kind": "sequential", "channel_smear": "after_norm"}
        | {"value_embed_dim": 5, "value_embed_layers": [6, 7], "rope_ntk_from": 8},
        {"recur_layers_str": "2,3", "disable_layer0_attn": True, "repeat_untie_mlp": "full", "parallel_residual": True}
        | {"parallel_start_layer": 4, "lane_output": "mean", "ve_layers": "6,7", "ve_dim": 5, "rope_ntk_from": 8},
        "blocks.7.attn.q_gain",
        "flat",
    ),
    "gains of visits, in banks": (
        {"num_loops": 1, "loop_start": 2, "loop_end": 3, "visit_controls": True},
        {"recur_layers": [2, 3]},
        "blocks.6.resid_mix",
        "banked",
    ),
    "layers that do not follow each other": (
        {"visits": [0, 1, 2, 3, 4, 1, 2, 4, 5], "stored_skips": 3},
        {"recur_layers": "4,1,2", "reuse_last_skip": False},
        "skip_gates",
        "flat",
    ),
    "value embeddings in descending order": (
        {"value_embed_dim": 5, "value_embed_layers": [5, 2]},
        {"ve_layers": "5,2", "ve_dim": 5},
        "ve_layer_scales.1",
        "flat",
    ),
    "value embeddings switched off": (
        {},
        {"ve_enabled": False, "ve_dim": 128, "ve_layers": "9,10"},
        "skip_gates",
        "flat",
    ),
    "MLPs untied of no loops": ({}, {"untie_loop_mlps": True}, "skip_gates", "flat"),
    "a hidden width that is no multiple": (
        {"model_dim": 22, "num_heads": 1, "mlp_hidden": 49, "mlp_mult": 49 / 22},
        {"mlp_hidden": 49},
        "skip_gates",
        "flat",
    ),
    "a multiple that is rounded down": (
        {"mlp_mult": 3.3, "model_dim": 512, "num_heads": 8},
        {"mlp_mult": 3.3},
        "skip_gates",
        "flat",
    ),
    "a hidden width beside an idle multiple": (
        {"mlp_mult": 31 / 16},
        {"mlp_mult": 2, "mlp_hidden": 31},
        "skip_gates",
        "flat",
    ),
    "cubed activation": ({"activation": "relu3"}, {"activation": "relu3"}, "skip_gates", "flat"),
    "a thinner MLP in the last block": (
        {"mlp_mult": [2.0, 2.0, 2.0, 2.0, 2.0, 1.0]},
        {"mlp_mult": 2.0, "layer_mlp_mult_schedule": "2,2,2,2,2,1"},
        "skip_gates",
        "flat",
    ),
    "no MLP in the first block": (
        {"mlp_mult": [0.0, 2.0, 2.0, 2.0, 2.0, 2.0]},
        {"mlp_mult": [0, 2, 2, 2, 2, 2]},
        "skip_gates",
        "flat",
    ),
    "attention in chosen blocks": ({"attn_layers": [0, 1, 3, 5]}, {"attn_layers": "0,1,3,5"}, "skip_gates", "flat"),
    "a vector for each pass": (
        {"num_loops": 2, "loop_start": 2, "loop_end": 3, "pass_embeddings": "pass"},
        {"num_loops": 2, "loop_start": 2, "loop_end": 3, "loop_pass_emb_enabled": True},
        "loop_pass_emb.weight",
        "banked",
    ),
    "bigrams split at words": (
        {"bigram_buckets": 12, "bigram_dim": 4, "bigram_classes": "word_start", "token_kinds": "08" * 16},
        {"bigram_vocab_size": 12, "bigram_dim": 4, "pos_conditional_bigram": True, "token_kinds": "08" * 16},
        "bigram.scale",
        "flat",
    ),
    "another slope": ({"leaky_slope": 0.3}, {"negative_slope": 0.3}, "skip_gates", "flat"),
}


def foreign_of(overrides: Mapping[str, Any], form: str) -> dict[str, Tensor]:
    """A state dict, without values, of the model that our settings describe."""
    model = get_family("golf_gpt").complete({**SMALL, **overrides})
    module = build_module({"family": "golf_gpt", "model": model, "graph": {"active_loops": 0}})
    return FORMATS[form].from_canonical(module.state_dict())


def infer(foreign: Mapping[str, Tensor], said: Mapping[str, Any]) -> Inferred:
    return infer_model(FORMATS[recognise(foreign, "x")].to_canonical(foreign), split_log({**SAID, **said})[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_inferred_from_its_file_and_its_scripts_words(kind: str) -> None:
    overrides, said, tensor, form = KINDS[kind]
    if "recur_layers" in said or "recur_layers_str" in said:
        said = {**said, "num_loops": None}
    foreign = foreign_of(overrides, form)
    assert tensor in foreign
    found = infer(foreign, {key: value for key, value in said.items() if value is not None})
    assert found.model == get_family("golf_gpt").complete({**SMALL, **overrides})
    canonical = FORMATS[form].to_canonical(foreign)
    module = build_module({"family": "golf_gpt", "model": dict(found.model), "graph": {"active_loops": 0}})
    assert {name: t.shape for name, t in module.state_dict().items()} == {n: t.shape for n, t in canonical.items()}
    assert FORMATS[form].from_canonical(canonical).keys() == foreign.keys()


def test_settings_that_say_nothing_are_named() -> None:
    overrides, said, _, form = KINDS["2026-04-03 without recurrence"]
    found = infer(foreign_of(overrides, form), said)
    assert found.unused == ["lanes_start", "reuse_last_skip"]


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # what: (the model, what is said, the message, the hint)
    "smear": (LATE, {"parallel_start_layer": 0, "parallel_final_lane": "mean"}, "smear_across_bos", "#1797.*not_bos"),
    "rotary": ({"channel_smear": "after_norm"}, {}, "nobody gave them: rope_ntk_from", "1024 for the 11-layer scripts"),
    "skips": (
        {"num_loops": 1, "loop_start": 2, "loop_end": 3, "stored_skips": 3},
        {"num_loops": 1, "loop_start": 2, "loop_end": 3},
        "skip_weights has 3 rows, and the visits could use 4: nobody gave reuse_last_skip",
        "2026-04-03",
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_no_file_and_no_log_shows_is_asked_for(what: str) -> None:
    overrides, said, message, hint = ASKED[what]
    with pytest.raises(SettingsError, match=message) as caught:
        infer(foreign_of(overrides, "flat"), said)
    assert re.search(hint, str(caught.value.hint))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no attention in block 0": ({"first_attention": False}, {}, "block 0 has no attention"),
    "no attention in others": ({"attn_layers": [0, 1]}, {}, r"blocks \[0, 1\] alone have attention"),
    "no MLP in one": ({"mlp_mult": [2, 2, 2, 0, 2, 2]}, {}, r"not a whole model: blocks \[3\] have no MLP"),
    "no MLP in another": (
        {"mlp_mult": [2, 2, 2, 0, 2, 2]},
        {"mlp_mult": [2, 2, 0, 2, 2, 2]},
        r"blocks \[3\] have no MLP",
    ),
    "another width in one": (
        {"mlp_mult": [2, 2, 2, 1, 2, 2]},
        {"mlp_mult": [2, 2, 2, 1.5, 2, 2]},
        r"mlp_mult: shapes say \[32, 32, 32, 16, 32, 32\], given",
    ),
    "widths in words": ({}, {"layer_mlp_mult_schedule": "two"}, "mlp_mult = 'two' is no list of numbers"),
    "lanes off but there": ({**LATE, "lanes_start": 4}, {"parallel_residual": False}, "but the file has lanes"),
    "lanes without tensors": (
        {},
        {"parallel_start_layer": 4},
        "given as 4, but the file has no parallel_post_lambdas or lane_merge",
    ),
    "values switched off but there": (
        {"value_embed_dim": 5, "value_embed_layers": [1]},
        {"ve_enabled": False},
        "ve_enabled = False, but value_embed_dim = 5",
    ),
    "another width": ({}, {"mlp_hidden": 33}, "mlp_hidden: shapes say 32, given 33"),
    "another multiple": ({}, {"mlp_mult": 3}, r"mlp_mult: shapes say 2.0, given 3 \(int\(3 · 16\) = 48, not 32\)"),
    "an option that is not computed": (
        {},
        {"dtg_enabled": True},
        "dtg_enabled = True .a gate on each block's update",
    ),
    "layers that are none": (
        {},
        {"recur_layers": "4,9"},
        r"recur_layers: \[4, 9\] are not all layers; layers are 0..5",
    ),
    "layers in words": ({}, {"recur_layers": "all"}, "recur_layers = 'all' is no list of layers"),
    "loops said twice": ({}, {"recur_layers": "4", "num_loops": 2}, "recur_layers and num_loops both say"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_the_file_is_refused_by_name(what: str) -> None:
    overrides, said, message = REFUSED[what]
    with pytest.raises((MismatchError, SettingsError), match=message):
        infer(foreign_of(overrides, "flat"), said)


def test_kinds_of_tokens_come_from_the_tokenizer_where_the_model_reads_them(pico_data: DataFolder) -> None:
    split = {"bigram_buckets": 12, "bigram_classes": "word_start", "token_kinds": "0" * 32}
    canonical = FORMATS["flat"].to_canonical(foreign_of(split, "flat"))
    canonical["tok_emb.weight"] = torch.zeros(pico_data.vocab_size, 16)
    words = {**SAID, "bigram_vocab_size": 12, "pos_conditional_bigram": True}
    found = infer_model(canonical, words, pico_data.tokenizer)
    assert found.model["token_kinds"] == token_kinds(pico_data.tokenizer)
    assert "token_kinds" not in infer_model(canonical, {**words, "pos_conditional_bigram": False}).model


def test_layers_with_xsa_are_a_number_or_a_list() -> None:
    assert translate({"xsa_layers": 4}) == {"xsa_last_n": 4}
    assert translate({"xsa_layers": "1,3"}) == translate({"xsa_layers": [1, 3]}) == {"xsa_layers": [1, 3]}


def test_tensors_of_visits_are_named_by_their_layers() -> None:
    overrides = {"num_loops": 1, "loop_start": 2, "loop_end": 3, "untied_loop_mlps": True}
    whole = FORMATS["banked"].to_canonical(foreign_of(overrides, "banked"))
    theirs = {
        name.replace("override_mlps.2_p1", "repeat_mlp.0").replace("override_mlps.3_p1", "repeat_mlp.1"): tensor
        for name, tensor in foreign_of(overrides, "banked").items()
    }
    canonical = FORMATS["banked"].to_canonical(theirs)
    named, notes = name_visits(canonical, translate({"recur_layers_str": "2,3", "disable_layer0_attn": False}))
    assert named.keys() == whole.keys()
    assert all(named[name] is canonical.get(name, named[name]) for name in named)
    assert notes == ["MLPs of repeated layers named by their layers: 2, 3"]
    with pytest.raises(MismatchError, match="recur_layers is not given"):
        name_visits(canonical, {})
    dead, notes = name_visits(whole, translate({"disable_layer0_attn": True}))
    assert whole.keys() - dead.keys() == {
        f"blocks.0.{part}"
        for part in ("attn_scale", "attn.q_gain", *(f"attn.{m}.weight" for m in ("q", "k", "v", "proj")))
    }
    assert "attention of block 0 is off" in notes[0]


def test_a_file_of_2026_03_31_scores_as_its_script_does(pico_data: DataFolder, tmp_path: Path) -> None:
    overrides = KINDS["2026-03-31 as it was run, without its attention of block 0"][0]
    model = {**SMALL, **overrides, "vocab_size": pico_data.vocab_size, "first_attention": True}
    module = get_family("golf_gpt").build(model, {"active_loops": 1})
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.5 * torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}
    theirs = FORMATS["banked"].from_canonical(state)  # with an attention of block 0 that the script does not use
    for i, layer in enumerate((2, 3)):
        for part in ("fc", "proj"):
            theirs[f"repeat_mlp.{i}.{part}.weight"] = theirs.pop(f"override_mlps.{layer}_p1.{part}.weight")
    torch.save(theirs, tmp_path / "final_model.pt")
    words = {key: value for key, value in SAID.items() if key != "num_loops"}
    words |= KINDS["2026-03-31 as it was run, without its attention of block 0"][1]
    arguments = (tmp_path / "final_model.pt", words, pico_data, "x", None, 64, tmp_path / "checkpoints")
    imported = import_file(*arguments)
    view = imported.checkpoint.load("raw")
    tokens = torch.randint(pico_data.vocab_size, (1, 12), generator=generator)
    tokens[0, 5] = 1
    with torch.no_grad():
        found = load_module(view.config, view.tensors, "x")(tokens).numpy()
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    config = {**view.config["model"], "first_attention": False}
    expected = oracle.forward(weights, config, 1, tokens.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert any("attention of block 0 is off" in note for note in imported.notes)


# ---- what the script's source says, where the log begins with it ---------------------------------------------------

GUARDED = """
        if self.smear_gate_enabled:
            sl = self.smear_lambda.to(dtype=x.dtype)
            g = sl * torch.sigmoid(self.smear_gate(x[:, 1:, : self.smear_window]))
            inside = (input_ids[:, 1:] != BOS_ID).to(x.dtype).unsqueeze(-1)
            x = torch.cat([x[:, :1], x[:, 1:] + g * x[:, :-1] * inside], dim=1)
"""
UNGUARDED = "".join(line for line in GUARDED.splitlines(True) if "inside =" not in line).replace("* inside", "# BOS")
SETTINGS = "Hyperparameters:\n  smear_gate_enabled: True\n  num_layers: 11\nstep:1/2\n"


@pytest.mark.parametrize(
    ("source", "across"),
    [
        (GUARDED, False),
        (UNGUARDED, True),
        (GUARDED + UNGUARDED.replace("\n", "\n\n"), None),
        (GUARDED.replace("\n        ", "; ") * 2, None),
        ("", None),
    ],
    ids=["guarded", "unguarded", "one of two paths", "minified", "no source"],
)
def test_the_source_in_a_log_tells_whether_the_gate_stops_at_bos(
    tmp_path: Path, source: str, across: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.log").write_text(source + SETTINGS)
    read = read_log(tmp_path / "x.log")
    assert read.get("smear_across_bos") is across
    said = {None: "", True: "its smear gate mixes across BOS", False: "its smear gate stops at BOS"}[across]
    assert said in capsys.readouterr().err
    (tmp_path / "x.log").write_text(source + SETTINGS.replace("True", "False"))
    assert "smear_across_bos" not in read_log(tmp_path / "x.log")
