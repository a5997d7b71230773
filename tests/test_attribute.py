"""Attribution: exchanging a group changes what it should and nothing else, costs are marginal, and work goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.artifacts import quantize_by_plan
from pgolf_post.attribute import stage
from pgolf_post.attribute.groups import ALL, groups
from pgolf_post.attribute.measure import GroupMeasurer
from pgolf_post.attribute.stage import Attribution, attribute
from pgolf_post.cache import list_entries
from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError
from pgolf_post.families import get_family, load_module, train_seq_len
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import Plan, read_plan
from pgolf_post.quantize.model import quantize_beside_floats, quantize_view
from pgolf_post.score.plain import PlainProtocol, score_folder

COARSE = ("*.bits=3", "mlp.clip=3", "attention.clip=3", "embedding.clip=3")


def coarse(*overrides: str) -> Plan:
    return read_plan("record-1855", [*COARSE, *overrides])


def run(view: View, stats: Stats, data: DataFolder, plan: Plan, **settings: Any) -> Attribution:
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=400)
    return attribute(view, stats, plan, data, protocol, **settings)


def test_the_row_of_all_is_the_float_model_and_every_group_is_a_row(
    view: View, stats: Stats, pico_data: DataFolder
) -> None:
    result = run(view, stats, pico_data, coarse())
    roles = ["embedding", "q", "k", "v", "attn_proj", "mlp_fc", "mlp_proj"]
    assert sorted(row["group"] for row in result.rows) == sorted([*roles, ALL])
    assert result.rows[-1]["group"] == ALL
    assert result.rows[-1]["weights"] == sum(row["weights"] for row in result.rows[:-1])
    kept = quantize_view(view, stats, coarse()).passthrough
    tensors = {name: torch.from_numpy(kept[name]).float() if name in kept else t for name, t in view.tensors.items()}
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=400)
    whole = score_folder(load_module(view.config, tensors, "float"), pico_data, protocol)
    assert result.rows[-1]["bpb"] == pytest.approx(whole.bpb, abs=1e-7)
    assert result.control["bpb"] - result.rows[-1]["gain_bpb"] == pytest.approx(whole.bpb, abs=1e-7)
    for row in result.rows:
        assert row["low_bpb"] <= row["gain_bpb"] <= row["high_bpb"]
        assert row["group_bytes"] > 0
        assert not row["no_op"]


def test_expected_gains_are_divergences_from_the_unquantized_model(
    view: View, stats: Stats, pico_data: DataFolder
) -> None:
    plan = coarse("lqer.top_k=0")
    result = run(view, stats, pico_data, plan, expected=True)
    protocol = PlainProtocol(seq_len=train_seq_len(view.config), max_tokens=400)
    whole = score_folder(load_module(view.config, view.tensors, "float"), pico_data, protocol)
    assert result.rows[-1]["bpb"] == pytest.approx(whole.bpb, abs=1e-5)  # but for floats kept in fewer bits
    assert result.control["bpb"] > whole.bpb
    assert all(row["bpb"] >= whole.bpb - 1e-7 for row in result.rows)
    measured = run(view, stats, pico_data, plan)
    assert measured.folder != result.folder
    assert measured.control["bpb"] != pytest.approx(result.control["bpb"], abs=1e-6)


@pytest.mark.parametrize("by", ["role", "layer", "tensor"])
def test_groups_part_the_quantized_tensors(view: View, stats: Stats, by: Any) -> None:
    model = quantize_view(view, stats, coarse())
    assert any(name.endswith(".lqA") for name in model.quantized)
    found = groups(model, get_family("golf_gpt"), by)
    members = [name for group, names in found.items() if group != ALL for name in names]
    assert sorted(members) == sorted(model.quantized)
    for names in found.values():
        assert {name for name in names if ".lq" in name} == {
            name for name in model.quantized if ".lq" in name and name[: name.index(".lq")] in names
        }


def test_bytes_of_a_group_are_what_the_artifact_loses_without_it(
    view: View, stats: Stats, pico_data: DataFolder
) -> None:
    plan = coarse("lqer.top_k=0")
    result = run(view, stats, pico_data, plan, by="tensor")
    model = quantize_view(view, stats, plan)
    whole = len(pack(model, PackSettings()))
    assert result.control["artifact_bytes"] == whole
    name = result.rows[0]["group"]
    rest = {key: tensor for key, tensor in model.quantized.items() if key != name}
    smaller = replace(model, quantized=rest)
    assert result.rows[0]["group_bytes"] == whole - len(pack(smaller, PackSettings()))


@pytest.mark.parametrize("fold", ["true", "false"])
def test_floats_beside_a_stretched_model_are_the_same_function(view: View, stats: Stats, fold: str) -> None:
    plan = coarse("*.awq_alpha=0.5", f"*.awq_fold={fold}")
    _, floats = quantize_beside_floats(view, stats, plan)
    tokens = torch.arange(2, 34)[None]
    same = load_module(view.config, floats, "floats")(tokens)
    assert torch.allclose(same, load_module(view.config, view.tensors, "view")(tokens), atol=2e-4)
    changed = [name for name, tensor in floats.items() if not torch.allclose(tensor, view.tensors[name])]
    assert bool(changed) == (fold == "true")


def test_a_group_that_float_does_not_change_is_marked_no_op(
    view: View, stats: Stats, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exact(*arguments: Any) -> Any:
        model, floats, report = quantize_by_plan(*arguments)
        name = "blocks.0.attn.q.weight"
        return model, {**floats, name: torch.from_numpy(model.quantized[name].dequantize())}, report

    monkeypatch.setattr(stage, "quantize_by_plan", exact)
    rows = {row["group"]: row for row in run(view, stats, pico_data, coarse("lqer.top_k=0"), by="tensor").rows}
    assert [name for name, row in rows.items() if row["no_op"]] == ["blocks.0.attn.q.weight"]
    assert rows["blocks.0.attn.q.weight"]["gain_bpb"] == 0


def test_interrupted_work_goes_on_after_the_last_row_and_then_is_cached(
    view: View, stats: Stats, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    usual = GroupMeasurer._score

    def score(self: Any, name: str, tensors: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(name)
        return usual(self, name, tensors)

    monkeypatch.setattr(GroupMeasurer, "_score", score)
    with pytest.raises(KeyboardInterrupt):
        run(view, stats, pico_data, coarse())
    assert len(scored) == 3
    scored_before, scored[:] = list(scored), ["again"] * 4  # never 3 again
    again = run(view, stats, pico_data, coarse())
    assert not set(scored_before) & set(scored)
    assert len(scored) - 4 + len(scored_before) == len(again.rows) + 1
    monkeypatch.setattr(GroupMeasurer, "_score", usual)
    fresh = run(view, stats, pico_data, coarse(), fresh=True)
    assert (again.rows, again.control) == (fresh.rows, fresh.control)
    assert run(view, stats, pico_data, coarse()).cached
    assert not list(Path(again.folder).parent.glob("*.partial"))
    [entry] = [entry for entry in list_entries(view.checkpoint.path.parents[1]) if entry.stage == stage.STAGE]
    assert entry.state == "complete"


def test_a_plan_that_quantizes_nothing_is_refused(view: View, stats: Stats, pico_data: DataFolder) -> None:
    rule = {"name": "everything", "method": "keep"}
    plan = plan_from({"rules": [rule]})
    with pytest.raises(PgolfError, match="quantizes no tensor"):
        run(view, stats, pico_data, plan)


def plan_from(tree: dict[str, Any]) -> Plan:
    from pgolf_post.plan import parse_plan

    return parse_plan(tree, "test")
