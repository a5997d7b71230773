"""Quantizing a whole view: strict plans, evidence per tensor, and an artifact that decodes to what was meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, NumericsError, SettingsError
from pgolf_post.families import build_module, get_family
from pgolf_post.pack.artifact import read_artifact
from pgolf_post.plan import Plan, TensorPlan, make_plan, read_plan
from pgolf_post.quantize.awq import Stretched
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.model import quantize_view
from pgolf_post.quantize.rows import entropy_bits, keep_tensor, quantize_entries
from pgolf_post.rules import KeepRule
from tests.conftest import pico_recipe
from trainer.run.loop import Trainer

pytestmark = pytest.mark.slow


def plan_of(*overrides: str, source: str = "sdclip-1394") -> Plan:
    return read_plan(source, overrides)


SETTINGS = plan_of("*.hessian_lambda=0.1")


def test_every_matrix_is_quantized_and_everything_else_kept(view: View, stats: Stats) -> None:
    model = quantize_view(view, stats, SETTINGS)
    assert {*model.quantized, *model.passthrough} == set(view.tensors)
    assert all(name.endswith(".weight") for name in model.quantized)
    assert model.quantized["tok_emb.weight"].facts["bits"] == 8
    assert model.quantized["blocks.0.mlp.fc.weight"].facts["bits"] == 6
    facts = model.quantized["blocks.0.mlp.fc.weight"].facts
    assert {"method", "bits", "clip", "damp_used", "error", "entropy_bits", "clipped", "seconds"} <= facts.keys()


def test_weights_and_hessians_are_left_bit_identical(view: View, stats: Stats) -> None:
    weights = {name: tensor.clone() for name, tensor in view.tensors.items()}
    hessians = {site: hessian.clone() for site, hessian in stats.hessians.items()}
    quantize_view(view, stats, SETTINGS)
    assert all(torch.equal(weights[name], tensor) for name, tensor in view.tensors.items())
    assert all(torch.equal(hessians[site], hessian) for site, hessian in stats.hessians.items())


def test_artifact_decodes_to_the_quantized_model_bit_for_bit(view: View, stats: Stats) -> None:
    model, artifact = quantize_view(view, stats, SETTINGS), requant(view, stats, SETTINGS)
    decoded = read_artifact(artifact.path)
    assert artifact.symbols_sha256 == model.symbols_sha256() == decoded.manifest["symbols_sha256"]
    expected = model.tensors()
    assert decoded.tensors.keys() == expected.keys()
    assert all(np.array_equal(decoded.tensors[name], array) for name, array in expected.items())
    assert decoded.manifest["config"]["graph"] == {"active_loops": 1}


def test_same_settings_same_artifact_other_settings_another(view: View, stats: Stats) -> None:
    first, again = requant(view, stats, SETTINGS), requant(view, stats, SETTINGS)
    assert (first.cached, again.cached) == (False, True)
    assert first.folder == again.folder
    fresh = requant(view, stats, SETTINGS, fresh=True)
    assert not fresh.cached
    assert fresh.symbols_sha256 == first.symbols_sha256
    other = requant(view, stats, plan_of("*.hessian_lambda=0.4"))
    assert other.folder != first.folder
    assert other.symbols_sha256 != first.symbols_sha256


def test_more_bits_come_closer(view: View, stats: Stats) -> None:
    def error(bits: int) -> float:
        settings = plan_of(f"matrices.bits={bits}", "matrices.clip=3.0")
        return float(quantize_view(view, stats, settings).quantized["blocks.1.mlp.fc.weight"].facts["error"])

    assert error(8) < error(6) < error(4) < error(2)


def test_an_uncovered_role_is_an_error_naming_the_tensor(view: View) -> None:
    family = get_family("golf_gpt")

    class Odd(type(family)):  # type: ignore[misc]
        def role(self, tensor_name: str) -> str:
            return "mystery" if tensor_name == "skip_weights" else str(super().role(tensor_name))

    with pytest.raises(SettingsError, match=r"no rule covers skip_weights \(role 'mystery'\)"):
        make_plan(view.tensors, Odd(), build_module(view.config), SETTINGS)


def test_a_matrix_without_a_site_is_rounded_only_where_the_plan_allows_it(view: View, stats: Stats) -> None:
    family, module = get_family("golf_gpt"), build_module(view.config)
    sites = [site for site in family.sites(module) if site.name != "head.in"]
    entries = {entry.name: entry for entry in make_plan(view.tensors, family, module, SETTINGS, sites)}
    assert entries["tok_emb.weight"].method == "rtn"
    made = quantize_entries([entries["tok_emb.weight"]], Stretched(dict(view.tensors)), stats, StatsFactors(stats))
    assert "no site" in made["tok_emb.weight"].facts["reason"]
    with pytest.raises(SettingsError, match=r"no site feeds tok_emb\.weight"):
        make_plan(view.tensors, family, module, plan_of("embedding.without_site=error"), sites)


def test_statistics_without_a_site_are_an_error(view: View, stats: Stats) -> None:
    partial = dataclasses.replace(stats, hessians={s: h for s, h in stats.hessians.items() if s != "blocks.0.mlp.in"})
    with pytest.raises(MismatchError, match=r"blocks\.0\.mlp\.in"):
        quantize_view(view, partial, SETTINGS)


def test_fp16_overflow_names_the_tensor() -> None:
    entry = TensorPlan("skip_weights", "control", KeepRule(name="control"), None, None)
    with pytest.raises(NumericsError, match=r"skip_weights.*7e\+04"):
        keep_tensor(entry, torch.tensor([1.0, 7e4]))


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(np.zeros(10, dtype=np.int8)) == 0.0
    assert entropy_bits(np.array([0, 1, 2, 3] * 5, dtype=np.int8)) == pytest.approx(2.0)
    assert entropy_bits(np.array([0, 0, 0, 1], dtype=np.int8)) == pytest.approx(0.8112781)


@pytest.mark.parametrize(
    "loop", [{"num_loops": 1}, {"loop_start": 0, "loop_end": 0, "num_loops": 0, "visits": [0, 1, 1, 2]}]
)
def test_a_model_with_every_feature_is_trained_calibrated_and_packed(
    tmp_path: Path, pico_data: DataFolder, loop: dict[str, object]
) -> None:
    features: dict[str, object] = {
        **loop,
        "embedding_dim": 12,
        "activation": "swiglu",
        "tie_embeddings": False,
        "smear_gate": True,
        "attn_gate": "sparse",
        "lanes_start": 2,
        "encoder_visits": 1,
        "carry": "frozen",
        "carry_beta": [1.56],
        "carry_alpha": [[0.23]],
        "untied_loop_mlps": True,
        "value_residual": True,
        "value_embed_layers": [0, 2],
        "value_embed_dim": 5,
        "bigram_buckets": 31,
        "bigram_dim": 7,
        "trigram": True,
    }
    checkpoint = Trainer(pico_recipe(pico_data, tmp_path / "checkpoints", model=features)).run()
    assert checkpoint.config["graph"] == {"active_loops": 1}
    for view in (checkpoint.load("raw"), checkpoint.load("ema")):
        assert float(view.tensors["recur_beta"]) == pytest.approx(1.56)  # frozen: neither trained nor averaged away
        stats = calibrate(view, pico_data, CalibrationSettings(tokens=640))
        model, artifact = quantize_view(view, stats, SETTINGS), requant(view, stats, SETTINGS)
        assert {*model.quantized, *model.passthrough} == set(view.tensors)
        assert all(name.endswith(".weight") for name in model.quantized)
        methods = {name: tensor.facts["method"] for name, tensor in model.quantized.items()}
        tables = ("tok_emb.weight", "bigram.embed.weight", "value_embed.embed.weight")
        assert {name for name, method in methods.items() if method == "rtn"} == set(tables)
        assert {"override_mlps.1_p1.fc.weight", "blocks.2.mlp.gate.weight", "bigram.proj.weight"} <= methods.keys()
        expected, decoded = model.tensors(), read_artifact(artifact.path)
        assert decoded.tensors.keys() == expected.keys()
        assert all(np.array_equal(decoded.tensors[name], array) for name, array in expected.items())
