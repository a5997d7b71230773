"""Quantization-aware training: the weights of a step are the plan's, gradients go straight through, and it acts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.calibrate import Stats
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError, PgolfError, SettingsError
from pgolf_post.plan import read_plan
from pgolf_post.quantize.model import quantize_view
from pgolf_post.settings import parse_settings
from pgolf_post.submit.makeable import require_makeable
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from tests.trainer.test_model import pico_model
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.plan.dry_run import dry_run
from trainer.run.loop import Trainer
from trainer.schedule.step_times import StepTimes
from trainer.step import compiled
from trainer.step.compiled import num_compiled_graphs
from trainer.step.qat import WeightRounding, left_out, steps_of
from trainer.step.qat_settings import QatSettings

TOKENS = torch.arange(24).view(2, 12)
TRELLIS = """
[[rules]]
name = "all"
method = "gptq"
trellis_states = 4
without_site = "rtn"
"""


def settings(**values: Any) -> QatSettings:
    return parse_settings(QatSettings, {"at": 0.5, "plan": "sdclip-1394", **values}, "recipe.qat")


def rounding(model: GolfGPT, **values: Any) -> WeightRounding:
    return WeightRounding(model, settings(**values), seed=3)


def by_hand(name: str, weight: np.ndarray) -> np.ndarray:
    """What sdclip-1394 makes of a tensor: k·std(row)/largest in fp16, int6 with k = 12.85, embedding int8 with 20."""
    if weight.ndim != 2 or not name.endswith(".weight"):
        return weight.astype(np.float16).astype(np.float32)
    largest, k = (127, 20.0) if name == "tok_emb.weight" else (31, 12.85)
    steps = (k * weight.astype(np.float64).std(axis=1, ddof=1) / largest).astype(np.float16).astype(np.float32)
    return np.clip(np.round(weight / steps[:, None]), -largest, largest) * steps[:, None]


def test_the_weights_of_a_step_are_those_of_the_grid_and_then_as_before() -> None:
    model = pico_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with rounding(model).during(step=0, at=0.5):
        inside = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, tensor in before.items():
        np.testing.assert_array_equal(inside[name].numpy(), by_hand(name, tensor.numpy()), err_msg=name)
        assert torch.equal(model.get_parameter(name), tensor)
    assert not torch.equal(inside["blocks.0.mlp.fc.weight"], before["blocks.0.mlp.fc.weight"])
    with rounding(model).during(step=0, at=0.49):
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(KeyboardInterrupt), rounding(model).during(step=0, at=0.5):
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_forward_pass_is_that_of_the_quantized_model(view: View, stats: Stats) -> None:
    decoded = quantize_view(view, stats, read_plan("rtn")).tensors()
    graph = GraphState(**view.config["graph"])
    quantized, model = (GolfGPT(ModelConfig(**view.config["model"]), graph) for _ in range(2))
    quantized.load_state_dict({name: torch.from_numpy(array) for name, array in decoded.items()})
    model.load_state_dict(dict(view.tensors))
    with torch.no_grad(), rounding(model, plan="rtn").during(step=0, at=1.0):
        rounded = model(TOKENS)
    with torch.no_grad():
        assert torch.equal(rounded, quantized(TOKENS))
        assert not torch.equal(rounded, model(TOKENS))


def test_entries_are_those_of_the_model_with_all_its_loops() -> None:
    model = pico_model(untied_loop_mlps=True)
    entries = {entry.name: entry for entry in rounding(model).entries}
    assert entries["override_mlps.1_p1.fc.weight"].site is not None
    assert {entries[f"blocks.{layer}.mlp.fc.weight"].depth for layer in (1, 2)} == {"loop"}
    assert model.graph.active_loops == 0


def test_gradients_are_those_at_the_rounded_weights_handed_straight_through() -> None:
    model = pico_model()
    with rounding(model).during(step=0, at=0.5):
        other = copy.deepcopy(model)
        model(TOKENS).square().mean().backward()
    other(TOKENS).square().mean().backward()
    for name, parameter in model.named_parameters():
        theirs = other.get_parameter(name).grad
        assert (parameter.grad is None) == (theirs is None)
        assert theirs is None or torch.equal(parameter.grad, theirs), name  # type: ignore[arg-type]
    assert model.tok_emb.weight.grad is not None


def test_noise_is_uniform_within_half_a_step_and_drawn_by_seed_and_step() -> None:
    torch.manual_seed(0)
    model = pico_model()
    noise = rounding(model, mode="noise")
    drawn = [noise.exchanged(step) for step in (4, 4, 5)]
    parts = []
    for entry in noise.entries:
        if entry.name not in drawn[0]:
            assert model.get_parameter(entry.name).ndim != 2 or not entry.name.endswith(".weight")
            continue
        weight = model.get_parameter(entry.name).detach()
        share = (drawn[0][entry.name] - weight) / steps_of(entry, weight)
        assert float(share.abs().max()) <= 0.5 + 1e-4
        parts.append(share.flatten())
        assert torch.equal(drawn[0][entry.name], drawn[1][entry.name])
        assert not torch.equal(drawn[0][entry.name], drawn[2][entry.name])
    shares = torch.cat(parts).double()
    deviation = 12**-0.5
    assert abs(float(shares.mean())) < 4 * deviation / len(shares) ** 0.5
    assert float(shares.std()) == pytest.approx(deviation, rel=0.05)
    assert not torch.equal(
        WeightRounding(model, noise.settings, 4).exchanged(4)["tok_emb.weight"], drawn[0]["tok_emb.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_it_acts_in_a_compiled_graph_without_another_one(
    compiler: str, tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", compiler)
    model = {"num_layers": 1, "xsa_last_n": 1, "loop_start": 0, "loop_end": 0, "num_loops": 0}
    (tmp_path / "coarse.toml").write_text(
        'name = "coarse"\n[[rules]]\nname = "control"\nroles = ["control"]\nmethod = "keep"\n'
        '[[rules]]\nname = "all"\nmethod = "rtn"\nbits = 2\nscale = "absmax"\n'
    )
    losses, graphs = [], []
    for compile_it in (False, True):
        run = {"compile": compile_it, "warmup_steps": 0}
        qat = {"at": 0.5, "plan": str(tmp_path / "coarse.toml")}
        trainer = Trainer(pico_recipe(pico_data, tmp_path, run=run, model=model, qat=qat))
        for at in (0.4, 0.6, 0.4):
            assert trainer.rounding is not None
            with trainer.rounding.during(0, at):
                losses.append(float(trainer.gradients.accumulate(trainer.sampler.step_batches(0, 4, 4))))
            graphs.append(num_compiled_graphs())
    eager, graph = losses[:3], losses[3:]
    assert graph == pytest.approx(eager, rel=1e-5)
    assert abs(graph[1] - graph[0]) > 1e-3 > abs(graph[2] - graph[0])
    assert graphs[3] == graphs[2] + 1 == graphs[4] == graphs[5]


NOISE: dict[str, dict[str, object]] = {
    "qat": {"at": 0.5, "plan": "sdclip-1394", "mode": "noise"},
    "checkpoint": {"steps": [3, 8], "metric": "final", "metric_tokens": 40},
}


@pytest.mark.slow
def test_a_run_is_as_without_it_until_then_and_resumes_exactly(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    whole = Trainer(pico_recipe(pico_data, tmp_path / "whole", **NOISE)).run()
    logs = [root / "pico" / "train.jsonl" for root in (pico_run, tmp_path / "whole")]
    plain, ours = ([json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs)
    assert plain[:6] == ours[:6]
    assert plain[6] != ours[6]  # the first step that sees it
    assert whole.view_id("raw") != Checkpoint.open(pico_run / "latest").view_id("raw")
    middle = next((tmp_path / "whole" / "pico").glob("step_000008-*"))
    resumed = Trainer(pico_recipe(pico_data, tmp_path / "resumed", **NOISE))
    resumed.resume(middle)
    assert resumed.run().view_id("raw") == whole.view_id("raw")
    early = Checkpoint.open(next((tmp_path / "whole" / "pico").glob("step_000003-*"))).meta
    assert (early["qat"]["acts"], whole.meta["qat"]["acts"]) == (False, True)
    assert whole.meta["qat"]["plan"] == "sdclip-1394"
    assert len(whole.meta["qat"]["plan_sha256"]) == 64
    assert "qat" not in Checkpoint.open(pico_run / "latest").meta["recipe"]
    never = {**NOISE, "qat": {"at": 0.99, "plan": "sdclip-1394"}}
    off = Trainer(pico_recipe(pico_data, tmp_path / "off", **never)).run()
    assert off.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")


@pytest.mark.long  # processes of torchrun
@pytest.mark.parametrize("mode", ["round", "noise"])
def test_two_processes_are_one_process(mode: str, pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "one", pico_data, "fp64")
    one = Trainer(recipe.model_copy(update={"qat": settings(mode=mode)})).run()
    words = ["--set", "qat.at=0.5", "--set", "qat.plan=sdclip-1394", "--set", f"qat.mode={mode}"]
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64"), *words)
    assert one.meta["recipe"]["qat"] == two.meta["recipe"]["qat"]
    assert farthest(one, two) < 1e-9


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"at": 1.0}, "at = 1.0: .*less than 1"),
        ({"at": -0.1}, "at = -0.1: .*greater than or equal to 0"),
        ({"mode": "ste"}, "mode = 'ste': .*'round', 'noise', 'fit' or 'rate'"),
        ({"plan": "sdclip-1395"}, "no plan named 'sdclip-1395'; presets: .*sdclip-1394"),
        (
            {"plan": "TRELLIS"},
            "qat.plan plan: rule 'all' has trellis_states = 4; training can meet a scalar grid alone",
        ),
    ],
)
def test_what_cannot_act_is_refused_before_it_trains(
    values: dict[str, Any], named: str, tmp_path: Path, pico_data: DataFolder
) -> None:
    (tmp_path / "trellis.toml").write_text(TRELLIS)
    asked = {key: str(tmp_path / "trellis.toml") if value == "TRELLIS" else value for key, value in values.items()}
    with pytest.raises(PgolfError, match=named):
        rounding(pico_model(), **asked)
    if "plan" in values:
        recipe = pico_recipe(pico_data, tmp_path, qat={"at": 0.5, **asked})
        with pytest.raises((NotFoundError, SettingsError), match=named):
            dry_run(recipe, StepTimes(0.5, 1.0, "given"))


def test_the_dry_run_says_when_and_how(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, qat={"at": 0.75, "plan": "record-1855"})
    found = dry_run(recipe, StepTimes(0.5, 1.0, "given"))
    assert {row.phase: row.step for row in found.timeline.boundaries}["qat"] == 9
    said = " ".join(capsys.readouterr().err.split())
    assert "qat: from progress 0.75 on 19 tensors are rounded to the grid of plan record-1855, without its lqer" in said
    late = pico_recipe(pico_data, tmp_path, qat={"at": 0.99, "plan": "rtn"})
    refused = [f.key for f in dry_run(late, StepTimes(0.5, 1.0, "given")).findings if f.level == "refuse"]
    assert refused == ["qat.at"]
    assert left_out(read_plan("record-1855", ["mlp.hessian_lambda=0.1"])) == ["lqer", "hessian_lambda"]


def test_a_script_that_trains_refuses_it(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, qat={"at": 0.5, "plan": "rtn"})
    seed: Any = SimpleNamespace(settings={"plan": "rtn", "rules": []}, artifact="x")
    with pytest.raises(SettingsError, match=r"qat.plan rtn: a script that trains does not round weights on the way"):
        require_makeable(seed, recipe)


def test_it_acts_in_a_bfloat16_twin_beside_adapting_and_later_heads(pico_data: DataFolder, tmp_path: Path) -> None:
    tables: dict[str, dict[str, object]] = {
        "run": {"precision": "bf16", "stream": "bf16"},
        "qat": {"at": 0.5, "plan": "sdclip-1394"},
        "meta_ttt": {"every": 1, "inner_lr": 0.1},
        "loss": {"future_tokens": 1},
    }
    run = Trainer(pico_recipe(pico_data, tmp_path, **tables))
    assert run.rounding is not None
    assert run.meta_ttt is not None
    assert run.gradients.twin is not None
    (batch,) = run.sampler.step_batches(0, 4, 4)
    nats = {}
    for name, accumulate in (("plain", run.gradients.accumulate), ("adapting", run.meta_ttt.accumulate)):
        for at in (0.4, 0.6):
            run.state.clear_gradients()
            with run.rounding.during(0, at):
                nats[name, at] = float(accumulate([batch]))
    assert nats["plain", 0.4] != nats["plain", 0.6]
    assert nats["adapting", 0.4] != nats["adapting", 0.6]
    assert all(weight.grad is not None for weight in run.state.heads.weights)  # type: ignore[union-attr]
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    loss, norm = run.timed_step(0.6)
    assert np.isfinite([loss, norm]).all()
    assert not torch.equal(run.model.tok_emb.weight, before["tok_emb.weight"])
