"""Plans: first match wins, nothing is left over, and a mistyped rule, key or value never passes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import pytest

from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.families import get_family
from pgolf_post.plan import Plan, TensorPlan, depth_name, make_plan, parse_plan, read_plan
from pgolf_post.presets import preset_names
from pgolf_post.quantize.gptq.trellis import POLYNOMIALS
from pgolf_post.quantize.rounding import ROUNDING
from pgolf_post.rules import CLIP_RULES, METHODS, GptqRule, GridRule
from pgolf_post.settings import canonical_json
from tests.conftest import PICO_RECIPE
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT


def pico_model(**settings: object) -> GolfGPT:
    config = ModelConfig(**{**PICO_RECIPE["model"], "vocab_size": 40, "train_seq_len": 16, **settings})
    return GolfGPT(config, GraphState(active_loops=config.max_active_loops))


def planned(plan: Plan, **settings: object) -> dict[str, TensorPlan]:
    module = pico_model(**settings)
    return {entry.name: entry for entry in make_plan(module.state_dict(), get_family("golf_gpt"), module, plan)}


def plan_of(*rules: dict[str, object]) -> Plan:
    return parse_plan({"rules": list(rules)}, "test")


KEEP = {"name": "rest", "method": "keep"}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_covers_the_model(preset: str) -> None:
    entries = planned(read_plan(preset), attn_gate="sparse")
    matrices = [entry for entry in entries.values() if entry.method != "keep"]
    assert len(matrices) >= 6 * 2 + 1


def test_presets_hold_the_published_values() -> None:
    record = {rule.name: rule for rule in read_plan("record-1855").rules}
    assert (record["mlp"].clip, record["attention"].clip, record["embedding"].clip) == (11.5, 13.0, 14.0)
    assert (record["mlp"].bits, record["embedding"].bits, record["gates"].bits) == (6, 7, 8)
    lqer = read_plan("record-1855").lqer
    assert lqer is not None
    assert (lqer.rank, lqer.top_k, lqer.asymmetric) == (4, 3, True)


def test_the_first_matching_rule_wins() -> None:
    wide = {"name": "wide", "tensors": "blocks.*", "method": "rtn", "bits": 8}
    narrow = {"name": "narrow", "roles": ["mlp_fc"], "method": "rtn", "bits": 4}
    assert planned(plan_of(narrow, wide, KEEP))["blocks.0.mlp.fc.weight"].rule.name == "narrow"
    with pytest.raises(SettingsError, match="'narrow' matches no tensor"):
        planned(plan_of(wide, narrow, KEEP))
    assert planned(plan_of(wide, {**narrow, "optional": True}, KEEP))["tok_emb.weight"].rule.name == "rest"


def test_conditions_on_layer_loop_and_size() -> None:
    looped = {"name": "looped", "roles": ["mlp_fc"], "looped": True, "method": "rtn", "bits": 4}
    late = {"name": "late", "roles": ["mlp_fc"], "layers": "2-9", "method": "rtn", "bits": 5}
    small = {"name": "small", "max_values": 2, "method": "keep", "dtype": "bf16"}
    entries = planned(plan_of(looped, late, small, KEEP), num_layers=3, loop_start=1, loop_end=1, num_loops=1)
    rules = {name: entry.rule.name for name, entry in entries.items()}
    assert [rules[f"blocks.{layer}.mlp.fc.weight"] for layer in range(3)] == ["rest", "looped", "late"]
    assert rules["blocks.0.attn.q_gain"] == "small"


def test_a_tensor_without_a_rule_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"no rule covers .*tok_emb\.weight \(role 'embedding'\)"):
        planned(plan_of({"name": "blocks", "tensors": "blocks.*", "method": "keep"}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mlp.clip=12", r"no rule 'mlp'; its rules: control, embedding, matrices"),
        ("matrices.clop=12", r"rule 'matrices': unknown key 'clop' \(did you mean 'clip'\?\)"),
        ("matrices.clip=-1", r"clip = -1"),
        ("matrices.method=awk", r"method = 'awk'; valid methods: keep, rtn, gptq"),
        ("*.colour=1", r"no rule of sdclip-1394 has a key 'colour'"),
        ("matrices.clip", r"expected key=value"),
        ("matrices.bits=1", r"1 bit leaves only the symbol 0"),
        ("matrices.group_size=4", r"per = 'row' with group_size = 4"),
        ("matrices.scale=percentil", "no such clip rule; valid: " + ", ".join(CLIP_RULES)),
        ("matrices.trellis_states=7", r"trellis_states = 7.*4, 8, 16, 32, 64, 128 or 256"),
        ("matrices.lane_rows=64", r"lane_rows acts on a trellis only"),
    ],
)
def test_bad_overrides_name_the_rule_and_what_is_valid(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_plan("sdclip-1394", [override])


def test_overrides_change_one_rule_or_all_that_have_the_key() -> None:
    rules = {rule.name: rule for rule in read_plan("sdclip-1394", ["*.hessian_lambda=0.2", "matrices.clip=11"]).rules}
    assert rules["matrices"].clip == 11
    assert rules["embedding"].clip == 20
    assert [rule.hessian_lambda for rule in rules.values() if isinstance(rule, GridRule)] == [0.2, 0.2]


def test_names_do_not_enter_the_identity_but_values_do() -> None:
    first = plan_of({"name": "a", "method": "rtn"}, KEEP)
    assert first.identity() == plan_of({"name": "b", "method": "rtn"}, KEEP).identity()
    assert first.identity() != plan_of({"name": "a", "method": "rtn", "bits": 5}, KEEP).identity()


# sha256 of identity() as canonical JSON, recorded before trellis_states, lane_rows and row_feedback existed.
IDENTITIES = {
    ("baseline-int8", ()): "b9f85312b427c237c7178c81508008bf34c755ef4f6d6f451b20fa982a4515fd",
    ("record-1855", ()): "88cc44cdffb6a70f36c434dc644fd4c2fc797117bf42116467631ac3c9210bce",
    ("rtn", ()): "c349a323757bc9869df645a4503c3a65f0698f319d3ec257bed9bea07c87d9d2",
    ("sdclip-1394", ()): "2aa860161a5977e7f779cf7fac6a96b6566c8cf2c091209d242d15d45742f94d",
    ("sdclip-1394", ("*.hessian_lambda=0.1",)): "f12a9cbefd3e70d8501310c8a2511fc6a935d880cb328fd039d87fa629c61b50",
    ("sdclip-1394", ("sequential=true",)): "75d9836e58ad3311c247f215d13318b6be15954be153eb490a1fb1718a1c7631",
}


@pytest.mark.parametrize(("preset", "overrides"), IDENTITIES)
def test_plans_that_name_no_new_setting_keep_the_identity_they_had(preset: str, overrides: tuple[str, ...]) -> None:
    """So that artifacts cached before are still found."""
    identity = canonical_json(read_plan(preset, overrides).identity())
    assert hashlib.sha256(identity).hexdigest() == IDENTITIES[preset, overrides]


def test_settings_that_are_off_are_not_in_the_identity_and_those_that_are_on_are() -> None:
    usual = read_plan("sdclip-1394").identity()
    off = ["matrices.trellis_states=0", "matrices.row_feedback=false"]
    assert read_plan("sdclip-1394", off).identity() == usual
    on = [["trellis_states=8"], ["trellis_states=8", "lane_rows=16"], ["row_feedback=true"]]
    plans = [read_plan("sdclip-1394", [f"matrices.{change}" for change in changes]) for changes in on]
    identities = [canonical_json(plan.identity()) for plan in plans]
    assert len({canonical_json(usual), *identities}) == 4
    assert [plan.reads_fisher for plan in plans] == [False, False, True]
    assert plans[0].identity()["rules"][2]["lane_rows"] == 512


def test_the_states_that_a_rule_accepts_are_those_that_have_a_code() -> None:
    assert get_args(GptqRule.model_fields["trellis_states"].annotation) == (0, *POLYNOMIALS)


def test_every_method_has_a_rule_of_its_name_and_those_that_round_a_function() -> None:
    assert {name: method.rule.model_fields["method"].default for name, method in METHODS.items()} == {
        name: name for name in METHODS
    }
    assert ROUNDING.keys() == {name for name, method in METHODS.items() if issubclass(method.rule, GridRule)}
    assert all(method.source for method in METHODS.values())


GPTQ = {"name": "all", "tensors": "*.weight", "method": "gptq", "without_site": "rtn"}


def test_what_cannot_act_on_a_tensor_is_refused_before_any_work() -> None:
    with pytest.raises(SettingsError, match=r"row_feedback cannot act on tok_emb\.weight"):
        planned(plan_of({**GPTQ, "row_feedback": True}, KEEP))
    with pytest.raises(SettingsError, match=r"no site feeds tok_emb\.weight, so it is rounded to nearest, and neither"):
        planned(plan_of({**GPTQ, "trellis_states": 8}, KEEP), tie_embeddings=False)
    with pytest.raises(SettingsError, match=r"a trellis has no zero in every state"):
        plan_of({**GPTQ, "trellis_states": 8, "prune": "ones", "prune_share": 0.1})
    tok_emb = {**KEEP, "name": "table", "tensors": "tok_emb.weight"}
    coupled = plan_of(tok_emb, {**GPTQ, "row_feedback": True, "awq_alpha": 0.5}, KEEP)
    with pytest.raises(SettingsError, match=r"AWQ of blocks\.0\.mlp\.proj\.weight is undone in the rows of .*fc"):
        planned(coupled)
    planned(plan_of(tok_emb, {**GPTQ, "row_feedback": True, "awq_alpha": 0.5, "awq_fold": False}, KEEP))


def test_a_plan_is_read_from_a_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nname = "all"\nmethod = "keep"\n')
    assert set(planned(read_plan(str(path)))) == set(pico_model().state_dict())
    with pytest.raises(NotFoundError, match="sdclip-1394"):
        read_plan("no-such-preset")
    path.write_text('[[rules]]\nname = "all"\nmethod = "keep"\n[[rules]]\nname = "all"\nmethod = "rtn"\n')
    with pytest.raises(SettingsError, match="used twice: all"):
        read_plan(str(path))


def test_depths_follow_the_loop() -> None:
    looped = [depth_name(layer, frozenset({3, 4, 5}), 11) for layer in range(11)]
    assert looped == ["early"] * 3 + ["loop"] * 3 + ["mid"] * 3 + ["late"] * 2
    assert [depth_name(layer, frozenset(), 6) for layer in range(6)] == ["early", "early", "mid", "mid", "late", "late"]
    assert depth_name(None, frozenset(), 6) is None


def test_depth_multiplies_the_clip() -> None:
    plan = plan_of({"name": "fc", "roles": ["mlp_fc"], "method": "rtn", "clip": 10, "depth_clip": {"early": 2.0}}, KEEP)
    entries = planned(plan, num_layers=3)
    assert entries["blocks.0.mlp.fc.weight"].clip == 20
    assert entries["blocks.2.mlp.fc.weight"].clip == 10
