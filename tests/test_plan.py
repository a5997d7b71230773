"""Plans: first match wins, nothing is left over, and a mistyped rule, key or value never passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.errors import NotFoundError, SettingsError
from pgolf_post.families import get_family
from pgolf_post.plan import GridRule, Plan, depth_name, make_plan, parse_plan, read_plan
from pgolf_post.presets import preset_names
from tests.conftest import PICO_RECIPE
from trainer.architecture import GraphState, ModelConfig
from trainer.model import GolfGPT


def pico_model(**settings: object) -> GolfGPT:
    config = ModelConfig(**{**PICO_RECIPE["model"], "vocab_size": 40, "train_seq_len": 16, **settings})
    return GolfGPT(config, GraphState(active_loops=config.max_active_loops))


def rows(plan: Plan, **settings: object) -> dict[str, object]:
    module = pico_model(**settings)
    return {row.name: row for row in make_plan(module.state_dict(), get_family("golf_gpt"), module, plan)}


def plan_of(*rules: dict[str, object]) -> Plan:
    return parse_plan({"rules": list(rules)}, "test")


KEEP = {"name": "rest", "method": "keep"}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_covers_the_model(preset: str) -> None:
    planned = rows(read_plan(preset), attn_gate="sparse")
    matrices = [row for row in planned.values() if row.method != "keep"]  # type: ignore[attr-defined]
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
    assert rows(plan_of(narrow, wide, KEEP))["blocks.0.mlp.fc.weight"].rule.name == "narrow"  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="'narrow' matches no tensor"):
        rows(plan_of(wide, narrow, KEEP))
    assert rows(plan_of(wide, {**narrow, "optional": True}, KEEP))["tok_emb.weight"].rule.name == "rest"  # type: ignore[attr-defined]


def test_conditions_on_layer_loop_and_size() -> None:
    looped = {"name": "looped", "roles": ["mlp_fc"], "looped": True, "method": "rtn", "bits": 4}
    late = {"name": "late", "roles": ["mlp_fc"], "layers": "2-9", "method": "rtn", "bits": 5}
    small = {"name": "small", "max_values": 2, "method": "keep", "dtype": "bf16"}
    planned = rows(plan_of(looped, late, small, KEEP), num_layers=3, loop_start=1, loop_end=1, num_loops=1)
    found = {name: row.rule.name for name, row in planned.items()}  # type: ignore[attr-defined]
    assert [found[f"blocks.{layer}.mlp.fc.weight"] for layer in range(3)] == ["rest", "looped", "late"]
    assert found["blocks.0.attn.q_gain"] == "small"


def test_a_tensor_without_a_rule_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"no rule covers .*tok_emb\.weight \(role 'embedding'\)"):
        rows(plan_of({"name": "blocks", "tensors": "blocks.*", "method": "keep"}))


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


def test_a_plan_is_read_from_a_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nname = "all"\nmethod = "keep"\n')
    assert set(rows(read_plan(str(path)))) == set(pico_model().state_dict())
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
    planned = rows(plan, num_layers=3)
    assert planned["blocks.0.mlp.fc.weight"].clip == 20  # type: ignore[attr-defined]
    assert planned["blocks.2.mlp.fc.weight"].clip == 10  # type: ignore[attr-defined]
