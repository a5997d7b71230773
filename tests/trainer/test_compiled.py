"""Compiled training is training, and warming up leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pgolf_post.checkpoint import TRAINING_FILE, Checkpoint, read_tensors
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from tests.conftest import pico_recipe
from tests.trainer.test_attention import fa3_on_cpu, give_varlen_cpu_kernels  # noqa: F401
from tests.trainer.test_model import pico_model
from trainer.model.architecture import GraphState
from trainer.model.attention_backends import BACKENDS, BackendName
from trainer.run.loop import Trainer
from trainer.run.warm_up import graphs_ahead, rehearse, state_restored, synthetic_batch, warm_up
from trainer.step import compiled
from trainer.step.compiled import compiled_loss, compiles, num_compiled_graphs, training_loss

pytestmark = pytest.mark.slow

SMALL = {"num_layers": 2, "xsa_last_n": 1, "loop_end": 1, "num_loops": 2, "isolate_documents": True}
SINGLE = {**SMALL, "num_layers": 1, "loop_start": 0, "loop_end": 0, "num_loops": 0}
TWO_PHASES = {"steps": 6, "loops_at": 0.3, "all_loops_at": 0.6}
NO_FOLDERS: dict[str, Any] = {"phases": ("final",), "fractions": (), "metric_tokens": 40}


def trainer(data: DataFolder, root: Path, **tables: dict[str, Any]) -> Trainer:
    settings: dict[str, dict[str, Any]] = {"model": SMALL, "schedule": TWO_PHASES, "checkpoint": NO_FOLDERS}
    return Trainer(pico_recipe(data, root, **{**settings, **tables}))


def losses(checkpoint: Checkpoint) -> list[float]:
    return [json.loads(line)["loss"] for line in (checkpoint.path.parent / "train.jsonl").read_text().splitlines()]


def test_no_graph_is_compiled_after_the_warm_up(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")  # the graphs are the same ones
    before = num_compiled_graphs()
    run = trainer(pico_data, tmp_path / "compiled", run={"compile": True, "warmup_steps": 1}).run()
    warmed = run.meta["warm_up"]
    assert run.config["graph"] == {"active_loops": 2}
    assert run.meta["compile"] is True
    assert warmed["active_loops"] == [0, 1, 2]
    assert warmed["compiled_graphs"] == num_compiled_graphs() == before + 3
    assert "training clock" not in capsys.readouterr().err.replace("not on the training clock", "")
    assert losses(run) == pytest.approx(losses(trainer(pico_data, tmp_path / "eager").run()), rel=1e-6)


def test_a_run_that_skips_the_warm_up_says_what_was_compiled_on_its_clock(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    trainer(pico_data, tmp_path, run={"compile": True, "warmup_steps": 0}).run()
    assert "3 graphs were compiled on the training clock" in capsys.readouterr().err


@pytest.mark.usefixtures("fa3_on_cpu")
@pytest.mark.parametrize("name", ["sdpa", "varlen", "fa3"])
def test_where_documents_lie_makes_no_new_graph(
    name: BackendName, tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_varlen_cpu_kernels()
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    run = trainer(pico_data, tmp_path, run={"compile": True}, model=SINGLE)
    run.model.attention_backend = BACKENDS[name]
    generator, found = torch.Generator().manual_seed(0), []
    for period in (3, 5, 16, 40):
        inputs, targets = synthetic_batch(320, 4, 16, generator)
        inputs[:, ::period] = 1
        loss = run.gradients.loss(inputs, targets)
        loss.backward()
        found.append(num_compiled_graphs())
        eager = compiled.training_loss(run.model, inputs, targets, run.model.reach(inputs))
        torch.testing.assert_close(loss, eager)
    assert len(set(found)) == 1


def test_flex_attention_within_a_compiled_model_makes_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    model = pico_model(isolate_documents=True, num_layers=1, loop_end=0, loop_start=0, num_loops=0)
    loss, counts = compiled_loss(training_loss), []
    model.attention_backend = BACKENDS["flex"]
    for period in (3, 5, 12):
        inputs, targets = synthetic_batch(50, 2, 12, torch.Generator().manual_seed(period))
        inputs[:, ::period] = 1
        with torch.no_grad():
            found = loss(model, inputs, targets, model.reach(inputs))
            torch.testing.assert_close(found, compiled.training_loss(model, inputs, targets, model.reach(inputs)))
        counts.append(num_compiled_graphs())
    assert len(set(counts)) == 1


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_losses_are_the_eager_ones(
    compiler: str, tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short run takes what is compiled, forward and backward, as operators; code is generated in the long one."""
    monkeypatch.setattr(compiled, "COMPILER", compiler)
    runs = [
        trainer(pico_data, tmp_path / str(choice), run={"compile": choice}, model=SINGLE).run()
        for choice in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    assert runs[1].meta["warm_up"]["steps_per_graph"] == 2


@pytest.mark.long
def test_compiled_losses_and_logits_are_the_eager_ones_through_every_graph(
    tmp_path: Path, pico_data: DataFolder
) -> None:
    model = {**SMALL, "smear_gate": True, "attn_gate": "sparse"}
    runs = [
        trainer(pico_data, tmp_path / str(choice), run={"compile": choice}, model=model).run()
        for choice in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    assert runs[1].meta["warm_up"]["compiled_graphs"] == num_compiled_graphs()
    one, two = (run.load("raw").tensors for run in runs)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_warming_up_changes_no_bit(tmp_path: Path, pico_data: DataFolder) -> None:
    runs = [
        trainer(
            pico_data, tmp_path / str(steps), run={"warmup_steps": steps}, optim={"swa_start": 0.3, "swa_every": 1}
        ).run()
        for steps in (0, 2)
    ]
    for view in ("raw", "ema", "swa"):
        assert runs[0].view_id(view) == runs[1].view_id(view)
    ours, theirs = (read_tensors(run.path / TRAINING_FILE) for run in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(runs[0]) == losses(runs[1])


def test_warming_up_puts_every_state_back(tmp_path: Path, pico_data: DataFolder, pico_run: Path) -> None:
    fresh = Trainer(pico_recipe(pico_data, tmp_path / "fresh"))
    resumed = Trainer(pico_recipe(pico_data, tmp_path / "resumed"))
    resumed.resume(next(pico_run.glob("pico/*frac75")))
    for run, graphs in ((fresh, [0, 1]), (resumed, [1])):
        weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        moments = {name: tensor.clone() for name, tensor in run.state.optimizer.state().items()}
        shadow = {name: tensor.clone() for name, tensor in run.state.averages.ema.shadow.items()}  # type: ignore[union-attr]
        rest = run.state.step, run.state.train_seconds, run.model.graph, run.state.clock.num_steps
        random = torch.get_rng_state()
        assert graphs_ahead(run.state) == graphs
        with state_restored(run.state):
            torch.rand(3)
            run.model.set_graph(GraphState(active_loops=1))
            rehearse(run.state, run.gradients, *synthetic_batch(320, 4, 16, torch.Generator().manual_seed(0)))
            assert any(not torch.equal(weights[name], tensor) for name, tensor in run.model.state_dict().items())
        assert all(torch.equal(weights[name], tensor) for name, tensor in run.model.state_dict().items())
        assert run.state.optimizer.state().keys() == moments.keys()
        assert all(torch.equal(moments[name], tensor) for name, tensor in run.state.optimizer.state().items())
        assert all(torch.equal(shadow[name], tensor) for name, tensor in run.state.averages.ema.shadow.items())  # type: ignore[union-attr]
        assert (run.state.step, run.state.train_seconds, run.model.graph, run.state.clock.num_steps) == rest
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_warm_up_is_off_the_training_clock_and_on_record(tmp_path: Path, pico_data: DataFolder) -> None:
    run = trainer(pico_data, tmp_path, run={"warmup_steps": 2})
    warmed = warm_up(run.state, run.gradients)
    assert run.state.train_seconds == 0.0
    assert warmed["seconds"] > 0
    assert (warmed["steps_per_graph"], warmed["active_loops"], warmed["compiled_graphs"]) == (2, [0, 1, 2], 0)


def test_auto_compiles_on_a_gpu_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles(choice, device) for choice in ("auto", True, False) for device in (cpu, gpu)] == [
        *(False, True),
        *(True, True),
        *(False, False),
    ]


def test_the_mode_of_compiling_is_torchs_and_refused_where_nothing_compiles(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options["mode"]) or function)
    for mode in ("default", "max-autotune-no-cudagraphs"):
        trainer(pico_data, tmp_path / mode, run={"compile": True, "compile_mode": mode})
    assert asked == [None, "max-autotune-no-cudagraphs"]
    with pytest.raises(SettingsError, match=r'run.compile_mode = "max-autotune" acts only where the loss is compiled'):
        trainer(pico_data, tmp_path / "auto", run={"compile_mode": "max-autotune"})
    with pytest.raises(ValueError, match='compile_mode "reduce-overhead" acts only where the loss is compiled'):
        trainer(pico_data, tmp_path / "off", run={"compile": False, "compile_mode": "reduce-overhead"})
    with pytest.raises(ValueError, match=r"compile_mode\n.*'default', 'reduce-overhead', 'max-autotune'"):
        trainer(pico_data, tmp_path / "typo", run={"compile": True, "compile_mode": "fastest"})
