"""Training that expects fit: its noise, the price of bits, the moments that both need; off it is nothing at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.fit.estimate import gaussian_bits
from pgolf_post.settings import parse_settings
from pgolf_post.submit.makeable import require_makeable
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from tests.trainer.test_model import pico_model
from trainer.plan.dry_run import dry_run
from trainer.run.loop import Trainer
from trainer.schedule.step_times import StepTimes
from trainer.step import compiled, expecting_fit, running_curvature
from trainer.step.compiled import num_compiled_graphs
from trainer.step.expecting_fit import FitExpectation
from trainer.step.qat_settings import QatSettings
from trainer.step.rate import TRELLIS, bits_gradient, bits_of, constant_at, front_slope, row_bits
from trainer.step.running_curvature import RunningCurvature


def settings(**values: Any) -> QatSettings:
    return parse_settings(QatSettings, {"at": 0.5, "mode": "fit", "bits": 2.5, **values}, "recipe.qat")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two refreshes are enough, for runs of a few steps."""
    monkeypatch.setattr(expecting_fit, "LEAST_REFRESHES", 2)


# ---- the price of bits -----------------------------------------------------------------------------------------------


def test_bits_of_a_row_are_about_the_entropy_of_a_rounded_gaussian() -> None:
    logs = np.arange(-4.0, 6.0, 0.05)
    ours = row_bits(torch.from_numpy(4.0**logs)).numpy()
    assert np.abs(ours - gaussian_bits(logs)).max() < 0.27
    assert np.abs(ours - gaussian_bits(logs))[ours > 1.5].max() < 0.04


def test_its_gradient_is_the_finite_difference() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    steps = torch.tensor([0.01, 0.3, 1.0, 4.0, 30.0], dtype=torch.float64)
    gradient = bits_gradient(weight, steps)
    for place in ((0, 0), (1, 3), (2, 6), (3, 1), (4, 2)):
        nudge = torch.zeros_like(weight)
        nudge[place] = 1e-5
        slope = float(bits_of(weight + nudge, steps) - bits_of(weight - nudge, steps)) / 2e-5
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-6)


def test_steps_give_the_bits_that_were_asked_for_and_the_front_its_slope() -> None:
    generator = torch.Generator().manual_seed(1)
    ratios = 4 ** torch.randn(50, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 9, (50,), generator=generator).double()

    def loss(bits: float) -> float:  # of the high-rate formula, nats
        return float(TRELLIS * constant_at(ratios, weights, bits).square() / 24 * weights.sum())

    for bits in (0.5, 2.0, 6.0):
        constant = constant_at(ratios, weights, bits)
        assert float(row_bits(ratios / constant.square()) @ weights / weights.sum()) == pytest.approx(bits, rel=1e-9)
    few = 1e-3 / float(weights.sum())  # of 10 bits, where rows are far from nothing
    measured = (loss(10 - few) - loss(10 + few)) / 2e-3
    assert float(front_slope(constant_at(ratios, weights, 10.0))) == pytest.approx(measured, rel=1e-3)


# ---- moments and noise -----------------------------------------------------------------------------------------------


def mixed(size: int, generator: torch.Generator) -> Tensor:  # (size, size) with a trace of size
    root = torch.randn(size, size, generator=generator, dtype=torch.float64) + 2 * torch.eye(size, dtype=torch.float64)
    moment = root @ root.mT
    return moment * size / moment.trace()


def test_moments_and_noise_are_those_of_known_fisher_information(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of known C and M give both back, and E costs every direction the same: c²η/24 nats a weight."""
    monkeypatch.setattr(running_curvature, "DECAY", 1 - 1e-9)
    monkeypatch.setattr(running_curvature, "RIDGE", 1e-9)
    generator, tokens, constant = torch.Generator().manual_seed(2), 16, 0.03
    outputs, inputs = 3 * mixed(3, generator), mixed(4, generator)
    weight = torch.full((3, 4), 1e3, dtype=torch.float64)
    curvature = RunningCurvature({"a.weight": weight, "t.weight": weight}, frozenset({"t.weight"}))
    roots = torch.linalg.cholesky(outputs), torch.linalg.cholesky(inputs)
    for _ in range(4000):
        normal = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        gradient = roots[0] @ normal @ roots[1].mT / math.sqrt(tokens)
        curvature.update({"a.weight": gradient, "t.weight": gradient}, tokens)
    white, table = curvature.whitening("a.weight"), curvature.whitening("t.weight")
    known = curvature.moments["a.weight"]
    assert torch.allclose(known.rows, outputs * 4, rtol=0.1, atol=0.3)  # tr(M)·C
    assert torch.allclose(known.columns / known.columns.trace(), inputs / 4, rtol=0.1, atol=0.03)
    later = outputs[0, 0] - outputs[0, 1:] @ torch.linalg.solve(outputs[1:, 1:], outputs[1:, 0])
    assert float(white.row_pivots[0]) == pytest.approx(float(later) * 4, rel=0.1)
    assert torch.allclose(table.row_pivots, known.rows.diagonal(), rtol=1e-6)

    expectation = FitExpectation(pico_model(), settings(), seed=1)
    expectation.whitening, expectation.constant = {"a.weight": white}, torch.tensor(constant, dtype=torch.float64)
    drawn = torch.stack([expectation.noise({"a.weight": weight}, draw)["a.weight"] for draw in range(3000)])
    whole = torch.kron(outputs, inputs)  # of rows by columns, as E is flattened
    covariance = drawn.flatten(1).mT @ drawn.flatten(1) / len(drawn)
    costs = torch.linalg.eigvals(whole @ covariance).real / 2  # nats of each of 12 directions
    assert costs.mean() == pytest.approx(constant**2 * TRELLIS / 24, rel=0.05)
    assert costs.max() / costs.min() < 1.6
    assert torch.equal(drawn[7], expectation.noise({"a.weight": weight}, 7)["a.weight"])
    assert not torch.equal(drawn[7], drawn[8])


def test_no_row_gets_more_noise_than_its_own_size() -> None:
    expectation = FitExpectation(pico_model(), settings(), seed=1)
    weight = torch.randn(8, 500, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 0, 8)[:, None]
    curvature = RunningCurvature({"a.weight": weight}, frozenset({"a.weight"}))
    curvature.moments["a.weight"].columns.copy_(torch.eye(500))
    curvature.moments["a.weight"].rows.fill_(1.0)
    expectation.whitening = {"a.weight": curvature.whitening("a.weight")}
    expectation.constant = torch.tensor(1e6)
    drawn = expectation.noise({"a.weight": weight}, 0)["a.weight"]
    assert torch.allclose(drawn.square().mean(1).sqrt(), weight.square().mean(1).sqrt(), rtol=0.05)


def test_a_matrix_without_gradients_makes_nothing_that_is_no_number() -> None:
    curvature = RunningCurvature({"a.weight": torch.ones(3, 4), "t.weight": torch.ones(3, 4)}, frozenset({"t.weight"}))
    nothing = torch.zeros(3, 4)
    curvature.update({"a.weight": nothing, "t.weight": nothing}, 8)
    for name in ("a.weight", "t.weight"):
        white = curvature.whitening(name)
        assert all(bool(part.isfinite().all()) for part in vars(white).values())


# ---- in a run --------------------------------------------------------------------------------------------------------


def trainer_with(data: DataFolder, root: Path, qat: dict[str, Any], **tables: dict[str, Any]) -> Trainer:
    asked = {"at": 0.1, "mode": "fit", "bits": 2.5, "every": 1, **qat}
    shape = {"data": {"batch_tokens": 64, "micro_batch_tokens": 32, "seq_len": 16}}
    return Trainer(pico_recipe(data, root, qat=asked, **{**shape, **tables}))


def known_run(run: Trainer, steps: int = 4) -> FitExpectation:
    """The run after a few steps, so that its moments are known."""
    for _ in range(steps):
        run.timed_step(0.2)
    assert isinstance(run.rounding, FitExpectation)
    assert run.rounding.acts(0.2)
    return run.rounding


@pytest.mark.usefixtures("early")
def test_halves_of_the_micro_batches_see_the_noise_with_both_signs(pico_data: DataFolder, tmp_path: Path) -> None:
    expectation = known_run(trainer_with(pico_data, tmp_path, {}))
    before = {name: weight.detach().clone() for name, weight in expectation.matrices.items()}

    def seen(step: int, num_batches: int, count: int) -> list[Tensor]:
        """What is added to one matrix before each micro-batch."""
        batches, found = [(torch.zeros(1), torch.zeros(1))] * count, []
        with expectation.during(step, 0.2):
            for _ in expectation.batches(batches, step, num_batches):
                found.append(expectation.matrices["blocks.0.mlp.fc.weight"].detach() - before["blocks.0.mlp.fc.weight"])
        assert all(torch.equal(weight, before[name]) for name, weight in expectation.matrices.items())
        return found

    even = seen(6, 4, 4)
    assert float(even[0].abs().mean()) > 1e-4
    assert all(torch.allclose(even[number], even[0] * (-1) ** number, atol=1e-6) for number in range(4))
    assert not torch.allclose(seen(7, 4, 1)[0].abs(), even[0].abs(), atol=1e-6)
    lone = [seen(step, 1, 1)[0] for step in (6, 7, 8)]
    assert torch.allclose(lone[0], -lone[1], atol=1e-6)
    assert not torch.allclose(lone[2].abs(), lone[1].abs(), atol=1e-6)
    with expectation.during(6, 0.05):
        assert len(list(expectation.batches([(torch.zeros(1), torch.zeros(1))], 6, 2))) == 1
        assert all(torch.equal(weight, before[name]) for name, weight in expectation.matrices.items())


@pytest.mark.usefixtures("early")
def test_the_rate_is_in_gradients_and_in_the_objective(pico_data: DataFolder, tmp_path: Path) -> None:
    run = trainer_with(pico_data, tmp_path, {"mode": "rate", "rate": 3e-3, "every": 50}, run={"precision": "fp64"})
    assert isinstance(run.rounding, FitExpectation)
    expectation = run.rounding
    for _ in range(2):  # two refreshes, whatever the period
        run.gradients.accumulate(run.sampler.step_batches(0, 4, 2))
        with torch.no_grad():
            expectation._refresh(64)
        run.state.clear_gradients()
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    unused = run.model.get_parameter("blocks.0.mlp.proj.weight")
    unused.grad = None  # not in this step's graph
    total = expectation.after_backward(1, 0.2, 64)
    assert total is not None
    assert unused.grad is None
    name, place = "blocks.0.mlp.fc.weight", (3, 5)
    weight, others = expectation.matrices[name], len(expectation.matrices)
    assert len(expectation.whitening) == others
    gradient = float(weight.grad[place])  # type: ignore[index]
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * 1e-5
        sums.append(float(expectation.after_backward(1, 0.2, 64)))  # type: ignore[arg-type]
        with torch.no_grad():
            weight[place] -= sign * 1e-5
    assert gradient == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-5)
    priced = {name: matrix.detach() for name, matrix in expectation.matrices.items() if matrix is not unused}
    bits = sum(float(bits_of(tensor, expectation.steps(name))) for name, tensor in priced.items())
    assert float(total) == pytest.approx(3e-3 * bits, rel=1e-9)


@pytest.mark.usefixtures("early")
@pytest.mark.slow
def test_with_a_rate_the_same_steps_leave_fewer_bits(pico_data: DataFolder, tmp_path: Path) -> None:
    found = {}
    for name, rate in (("none", 1e-12), ("some", 1e-4)):
        run = trainer_with(pico_data, tmp_path / name, {"mode": "rate", "rate": rate})
        run.run()
        found[name] = run
    expectation = found["none"].rounding
    assert isinstance(expectation, FitExpectation)
    bits = {
        name: sum(
            float(bits_of(run.model.get_parameter(one).detach(), expectation.steps(one)))
            for one in expectation.whitening
        )
        for name, run in found.items()
    }
    assert bits["some"] < 0.97 * bits["none"]
    lines = [json.loads(line) for line in (tmp_path / "some" / "pico" / "train.jsonl").read_text().splitlines()]
    assert lines[0]["objective"] == lines[0]["loss"]
    assert lines[-1]["objective"] > lines[-1]["loss"] + 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("early")
def test_it_acts_in_a_compiled_graph_without_another_one(
    tmp_path: Path, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    model = {"num_layers": 1, "xsa_last_n": 1, "loop_start": 0, "loop_end": 0, "num_loops": 0}
    losses: dict[bool, list[float]] = {}
    for compile_it in (False, True):
        run = trainer_with(
            pico_data,
            tmp_path,
            {"at": 0.5, "rate": "front", "bits": 1.0},
            model=model,
            run={"compile": compile_it, "warmup_steps": 0, "precision": "fp32"},
        )
        graphs = []
        losses[compile_it] = []
        for at in (0.45, 0.45, 0.6, 0.6):
            losses[compile_it].append(run.timed_step(at)[0])
            graphs.append(num_compiled_graphs())
        assert graphs[-1] == graphs[0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


RUN: dict[str, Any] = {
    "qat": {"at": 0.5, "mode": "fit", "bits": 2.0, "rate": "front", "every": 2},
    "checkpoint": {"steps": [3, 9], "metric": "final", "metric_tokens": 40},
}


@pytest.mark.slow
@pytest.mark.usefixtures("early")
def test_a_run_is_as_without_it_until_then_and_resumes_exactly(
    tmp_path: Path, pico_data: DataFolder, pico_run: Path
) -> None:
    whole = Trainer(pico_recipe(pico_data, tmp_path / "whole", **RUN)).run()
    logs = [root / "pico" / "train.jsonl" for root in (pico_run, tmp_path / "whole")]
    plain, ours = ([json.loads(line)["loss"] for line in log.read_text().splitlines()] for log in logs)
    begun = next(number for number, pair in enumerate(zip(plain, ours, strict=True)) if pair[0] != pair[1])
    assert 6 < begun < 10  # moments from progress 0.4 on, two of them before it acts
    middle = next((tmp_path / "whole" / "pico").glob("step_000009-*"))
    resumed = Trainer(pico_recipe(pico_data, tmp_path / "resumed", **RUN))
    resumed.resume(middle)
    assert resumed.run().view_id("raw") == whole.view_id("raw")
    early = Checkpoint.open(next((tmp_path / "whole" / "pico").glob("step_000003-*"))).meta
    assert (early["qat"]["acts"], whole.meta["qat"]["acts"]) == (False, True)
    assert whole.meta["qat"]["front_nats_per_bit"] > 0
    assert whole.meta["qat"]["matrices"] > 10
    never = {**RUN, "qat": {**RUN["qat"], "at": 0.95}}
    off = Trainer(pico_recipe(pico_data, tmp_path / "off", **never)).run()
    assert off.view_id("raw") == Checkpoint.open(pico_run / "latest").view_id("raw")


@pytest.mark.long  # processes of torchrun
@pytest.mark.parametrize("micro", [None, 16])
def test_two_processes_are_one_process(micro: int | None, pico_data: DataFolder, tmp_path: Path) -> None:
    qat = {"at": 0.0, "mode": "fit", "bits": 1.5, "rate": 1e-4, "every": 1}
    tables = {"data": {"micro_batch_tokens": 48 if micro is None else micro}}
    recipe = recipe_of(tmp_path / "one", pico_data, "fp64", **tables)
    one = Trainer(recipe.model_copy(update={"qat": settings(**qat)})).run()
    words = [word for key, value in qat.items() for word in ("--set", f"qat.{key}={value}")]
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64", **tables), *words)
    assert one.meta["recipe"]["qat"] == two.meta["recipe"]["qat"]
    assert one.meta["qat"]["acts"]
    assert farthest(one, two) < 1e-9


@pytest.mark.usefixtures("early")
def test_it_acts_in_a_bfloat16_twin(pico_data: DataFolder, tmp_path: Path) -> None:
    narrow = {"run": {"precision": "bf16", "stream": "bf16"}}
    expectation = known_run(run := trainer_with(pico_data, tmp_path, {"bits": 1.0}, **narrow))
    assert run.gradients.twin is not None
    nats = []
    for at in (0.05, 0.2):
        run.state.clear_gradients()
        with expectation.during(8, at):
            seen = expectation.batches(run.sampler.step_batches(8, 4, 2), 8, 2, run.gradients.twin.take_weights)
            nats.append(float(run.gradients.accumulate(seen)))
    assert abs(nats[0] - nats[1]) > 1e-4


# ---- what is refused and said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"bits": None}, 'mode "fit" needs bits, for example 2.5'),
        ({"bits": 0.0}, "bits = 0.0: .*greater than 0"),
        ({"mode": "rate"}, 'mode "rate" needs rate, "front" or nats a token'),
        ({"rate": -1.0}, "rate"),
        ({"rate": "back"}, "rate.*'front'"),
        ({"plan": "rtn"}, 'plan "rtn" acts only with mode "round" or "noise"'),
        ({"mode": "round", "bits": None}, 'mode "round" needs plan'),
        ({"mode": "noise", "plan": "rtn"}, 'bits 2.5 acts only with mode "fit" or "rate"'),
        ({"mode": "round", "plan": "rtn", "bits": None, "rate": "front"}, "rate front acts only with mode"),
        ({"every": 0}, "every = 0: .*greater than or equal to 1"),
    ],
)
def test_what_cannot_act_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings(**values)


def test_adapting_and_a_script_that_trains_refuse_it(pico_data: DataFolder, tmp_path: Path) -> None:
    qat = {"at": 0.5, "mode": "fit", "bits": 2.5}
    adapting = pico_recipe(pico_data, tmp_path, qat=qat, meta_ttt={"every": 2, "inner_lr": 0.1})
    with pytest.raises(PgolfError, match=r"qat.bits: steps of meta_ttt take the gradients of half their tokens"):
        Trainer(adapting)
    seed: Any = SimpleNamespace(settings={"plan": "rtn", "rules": []}, artifact="x")
    with pytest.raises(SettingsError, match=r"qat.mode fit: a script that trains does not round weights on the way"):
        require_makeable(seed, pico_recipe(pico_data, tmp_path, qat=qat))


def test_the_dry_run_says_what_bits_cost(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, qat={"at": 0.75, "mode": "fit", "bits": 2.5, "rate": "front"})
    found = dry_run(recipe, StepTimes(0.5, 1.0, "given"))
    said = " ".join(capsys.readouterr().err.split())
    assert "matrices have the noise of fit and each bit costs the slope of the front, at 2.5 bits a weight" in said
    plain = dry_run(pico_recipe(pico_data, tmp_path), StepTimes(0.5, 1.0, "given"))
    for stream, peak in found.costs.peak_by_stream.items():  # type: ignore[union-attr]
        assert peak > plain.costs.peak_by_stream[stream]  # type: ignore[union-attr]
