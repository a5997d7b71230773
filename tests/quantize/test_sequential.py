"""Sequential GPTQ: one block is the ordinary method, several differ, and nothing that went in is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.calibrate.collect import Observed, collect
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import get_family, load_module, train_seq_len
from pgolf_post.plan import Plan, read_plan
from pgolf_post.quantize import sequential
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.sequential import blocks_in_order
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer

COARSE = ("*.bits=3", "matrices.clip=3", "embedding.clip=3")


def plan_of(*overrides: str, source: str = "sdclip-1394") -> Plan:
    return read_plan(source, [*COARSE, *overrides])


def symbols(view: View, stats: Stats, plan: Plan, text: CalibrationSet | None = None) -> Mapping[str, np.ndarray]:
    return {name: t.symbols for name, t in quantize_view(view, stats, plan, text=text).quantized.items()}


def different(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not np.array_equal(first[name], second[name])}


@pytest.mark.parametrize("overrides", [(), ("*.awq_alpha=0.5",), ("*.scale=percentile-hessian",)])
def test_one_block_is_the_ordinary_method(tmp_path: Path, pico_data: DataFolder, overrides: tuple[str, ...]) -> None:
    model = {"num_layers": 1, "xsa_last_n": 0, "loop_start": 0, "loop_end": 0, "num_loops": 1}
    view = Trainer(pico_recipe(pico_data, tmp_path / "checkpoints", model=model)).run().load()
    settings = CalibrationSettings(tokens=640)
    stats = calibrate(view, pico_data, settings)
    text = calibration_text(view, pico_data, settings, train_seq_len(view.config))
    ordinary = symbols(view, stats, plan_of(*overrides))
    assert not different(ordinary, symbols(view, stats, plan_of(*overrides, "sequential=true"), text))


def test_later_blocks_differ_the_first_and_what_is_outside_do_not(
    view: View, stats: Stats, text: CalibrationSet
) -> None:
    changed = different(symbols(view, stats, plan_of()), symbols(view, stats, plan_of("sequential=true"), text))
    assert changed
    assert {name.split(".")[1] for name in changed} <= {"1", "2"}
    assert "2" in {name.split(".")[1] for name in changed}


def test_a_block_is_rounded_on_what_the_quantized_blocks_before_it_give(
    view: View, stats: Stats, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessians used for the last block are those of the model whose other blocks are the final, decoded ones."""
    seen: dict[str, Tensor] = {}
    usual = sequential._of_block

    def of_block(*arguments: Any) -> Stats:
        found = usual(*arguments)
        seen.update(found.hessians)
        return found

    monkeypatch.setattr(sequential, "_of_block", of_block)
    model = quantize_view(view, stats, plan_of("sequential=true"), text=text)
    decoded = {n: torch.from_numpy(t.dequantize()) for n, t in model.quantized.items() if n.startswith("blocks.")}
    last = {n: tensor for n, tensor in view.tensors.items() if n.startswith("blocks.2.")}
    module = load_module(view.config, {**view.tensors, **decoded, **last}, "mixed")
    sites = [site for site in get_family("golf_gpt").sites(module) if site.name.startswith("blocks.2.")]
    sums = collect(Observed(module, sites), text.tokens)
    for site in sites:
        upper = torch.triu(sums[f"hessian.{site.name}"])
        assert torch.allclose(torch.triu(seen[site.name]), upper, rtol=1e-6, atol=1e-6 * float(upper.abs().max()))
        assert not torch.allclose(seen[site.name], stats.hessians[site.name], rtol=1e-4)


def test_it_rounds_the_last_block_better_for_the_inputs_it_will_get(
    view: View, stats: Stats, text: CalibrationSet
) -> None:
    """Σ e H eᵀ under the inputs of the quantized model, summed over the last block, is no higher than the usual one."""

    def error(plan: Plan) -> float:
        model = quantize_view(view, stats, plan, text=text)
        tensors = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
        module = load_module(view.config, tensors, "quantized")
        sites = [site for site in get_family("golf_gpt").sites(module) if site.name.startswith("blocks.2.")]
        sums, total = collect(Observed(module, sites), text.tokens), 0.0
        for site in sites:
            upper = sums[f"hessian.{site.name}"]
            hessian = torch.triu(upper) + torch.triu(upper, 1).mT
            for name in site.tensors:
                off = (view.tensors[name] - tensors[name]).double()
                total += float(((off @ hessian) * off).sum())
        return total

    assert error(plan_of("sequential=true")) <= error(plan_of()) * 1.02


def test_it_is_deterministic_and_leaves_its_inputs_alone(view: View, stats: Stats, text: CalibrationSet) -> None:
    weights = {name: tensor.clone() for name, tensor in view.tensors.items()}
    hessians = {site: hessian.clone() for site, hessian in stats.hessians.items()}
    tokens = text.tokens.copy()
    first = symbols(view, stats, plan_of("sequential=true", "*.awq_alpha=0.5"), text)
    assert not different(first, symbols(view, stats, plan_of("sequential=true", "*.awq_alpha=0.5"), text))
    assert all(torch.equal(weights[name], tensor) for name, tensor in view.tensors.items())
    assert all(torch.equal(hessians[site], hessian) for site, hessian in stats.hessians.items())
    assert np.array_equal(tokens, text.tokens)


def test_blocks_come_in_the_order_of_the_forward_pass(tmp_path: Path, pico_data: DataFolder) -> None:
    model = {"loop_start": 0, "loop_end": 0, "num_loops": 0, "visits": [2, 0, 0, 1], "untied_loop_mlps": True}
    view = Trainer(pico_recipe(pico_data, tmp_path / "checkpoints", model=model)).run().load()
    module = load_module(view.config, view.tensors, "visits")
    blocks = blocks_in_order(module, get_family("golf_gpt"))
    assert [layer for layer, _ in blocks] == [2, 0, 1]
    names = [site.name for site in blocks[1][1]]
    assert names[-2:] == ["override_mlps.0_p1.in", "override_mlps.0_p1.out"]
    settings = CalibrationSettings(tokens=640)
    stats = calibrate(view, pico_data, settings)
    text = calibration_text(view, pico_data, settings, train_seq_len(view.config))
    made = quantize_view(view, stats, plan_of("sequential=true"), text=text)
    assert {*made.quantized, *made.passthrough} == set(view.tensors)


def test_everything_is_quantized_in_the_plans_order_with_corrections(
    view: View, stats: Stats, text: CalibrationSet
) -> None:
    plan = read_plan("record-1855", ["*.bits=3"])
    usual = quantize_view(view, stats, plan)
    made = quantize_view(view, stats, plan.model_copy(update={"sequential": True}), text=text)
    plain = [name for name in usual.quantized if ".lq" not in name]
    assert [name for name in made.quantized if ".lq" not in name] == plain
    assert sum(".lq" in name for name in made.quantized) == 6


def test_text_is_needed_and_must_be_that_of_the_statistics(view: View, stats: Stats, text: CalibrationSet) -> None:
    with pytest.raises(SettingsError, match="given no text"):
        quantize_view(view, stats, plan_of("sequential=true"))
    with pytest.raises(SettingsError, match="no calibration text"):
        requant(view, stats, plan_of("sequential=true"))
    shorter = CalibrationSet(text.spans[:-1], text.tokens[:-1])
    with pytest.raises(MismatchError, match="640 tokens"):
        quantize_view(view, stats, plan_of("sequential=true"), text=shorter)


def test_a_plan_without_gptq_cannot_be_sequential() -> None:
    with pytest.raises(SettingsError, match="no rule of this plan uses GPTQ"):
        read_plan("rtn", ["sequential=true"])


def test_it_is_part_of_the_artifacts_identity(view: View, stats: Stats, text: CalibrationSet) -> None:
    usual = requant(view, stats, plan_of())
    made = requant(view, stats, plan_of("sequential=true"), text=text)
    assert made.id != usual.id
    assert requant(view, stats, plan_of("sequential=true"), text=text).cached
    assert requant(view, stats, plan_of("sequential=false")).id == usual.id
