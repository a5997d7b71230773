"""Groups of tensors: what each key does by hand, what stays as it is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.settings import parse_settings
from pgolf_post.submit.makeable import require_makeable
from tests.conftest import pico_recipe
from tests.trainer.test_distributed import farthest, recipe_file, recipe_of, train
from tests.trainer.test_model import pico_model
from trainer.optim.muon import Scheme, muon_updates
from trainer.optim.optimizer import Optimizer
from trainer.optim.settings import OptimSettings
from trainer.plan.dry_run import dry_run
from trainer.run.loop import Trainer
from trainer.schedule.step_times import StepTimes

MATRIX, VECTOR = "blocks.0.mlp.fc.weight", "blocks.0.attn_scale"
FROZEN = [
    {"match": "blocks.0.*", "freeze_until": 0.5},
    {"match": "tok_emb.weight", "freeze_from": 0.5},
    {"match": "blocks.1.mlp.*", "method": "adamw", "lr_scale": 0.5, "weight_decay": 0.1},
]
EVERY_STEP: dict[str, dict[str, object]] = {
    "optim": {"groups": FROZEN, "ema_decay": 0.9},
    "checkpoint": {"steps": list(range(13)), "metric": "final", "metric_tokens": 40},
}


def parsed(*groups: dict[str, Any]) -> OptimSettings:
    return parse_settings(OptimSettings, {"groups": groups, "grad_clip": 0.0}, "recipe")


def stepped(*groups: dict[str, Any], at: float = 0.0, steps: int = 2) -> tuple[Optimizer, list[dict[str, Tensor]]]:
    """An optimizer after some steps, and before each step the weights and gradients."""
    torch.manual_seed(0)
    model = pico_model()
    optimizer, seen = Optimizer(model, parsed(*groups)), []
    for step in range(steps):
        (model(torch.arange(step, step + 12)[None]).square().mean() * 10).backward()
        gradients = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append({**{name: p.detach().clone() for name, p in model.named_parameters()}, **gradients})
        optimizer.freeze(at)
        optimizer.step(0.5, 0.9, 0.5)
    return optimizer, [*seen, {name: p.detach().clone() for name, p in model.named_parameters()}]


def adamw(seen: list[dict[str, Tensor]], name: str, lr: float, decay: float) -> Tensor:
    """The parameter after AdamW's steps by hand, in float64: betas 0.9 and 0.95, multipliers 0.5."""
    weight, mean, square = seen[0][name].double(), 0.0, 0.0
    for number, moment in enumerate(seen[:-1], start=1):
        gradient = moment[f"grad.{name}"].double()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient.square()
        unit = (mean / (1 - 0.9**number)) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
        weight = weight * (1 - 0.5 * lr * 0.5 * decay) - 0.5 * lr * unit
    return weight.float()


def muon(seen: list[dict[str, Tensor]], name: str, lr: float, decay: float) -> Tensor:
    """The parameter after Muon's steps by hand."""
    weight, momenta = seen[0][name], torch.zeros_like(seen[0][name])[None]
    for moment in seen[:-1]:
        update = muon_updates(moment[f"grad.{name}"][None], momenta, 0.9, Scheme("polar_express"), True)[0]
        weight = weight * (1 - 0.5 * lr * 0.5 * decay) - 0.5 * lr * update
    return weight


def test_a_group_that_changes_nothing_changes_no_bit() -> None:
    plain, other = stepped(), stepped({"match": "*", "lr_scale": 1.0})
    assert [bank.names for bank in plain[0].banks] == [bank.names for bank in other[0].banks]
    assert plain[0].learning_rates(1.0) == other[0].learning_rates(1.0)
    for name, moment in plain[0].state().items():
        assert torch.equal(moment, other[0].state()[name]), name
    assert all(torch.equal(tensor, other[1][-1][name]) for name, tensor in plain[1][-1].items())


def test_groups_that_step_alike_are_one_under_both_globs() -> None:
    optimizer, _ = stepped({"match": "blocks.0.*", "lr_scale": 0.5}, {"match": "blocks.1.*", "lr_scale": 0.5})
    names = {group.label: group.names for group in optimizer.step_groups}
    assert names.keys() == {"matrix", "scalar", "embed", "matrix blocks.0.* blocks.1.*", "scalar blocks.0.* blocks.1.*"}
    assert {name.split(".")[1] for name in names["matrix blocks.0.* blocks.1.*"]} == {"0", "1"}


def test_scale_and_decay_are_those_of_the_steps_by_hand() -> None:
    _, seen = stepped({"match": VECTOR, "lr_scale": 0.25, "weight_decay": 0.3}, {"match": MATRIX, "lr_scale": 3.0})
    settings = OptimSettings()
    torch.testing.assert_close(seen[-1][VECTOR], adamw(seen, VECTOR, 0.25 * settings.scalar_lr, 0.3))
    wanted = muon(seen, MATRIX, 3.0 * settings.matrix_lr, settings.matrix_weight_decay)
    torch.testing.assert_close(seen[-1][MATRIX], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen[-1][VECTOR], seen[0][VECTOR])


def test_a_method_takes_the_place_of_the_kinds_own() -> None:
    optimizer, seen = stepped({"match": MATRIX, "method": "adamw"}, {"match": "tok_emb.weight", "method": "muon"})
    settings = OptimSettings()
    wanted = adamw(seen, MATRIX, settings.matrix_lr, settings.matrix_weight_decay)
    torch.testing.assert_close(seen[-1][MATRIX], wanted)
    table = muon(seen, "tok_emb.weight", settings.embed_lr, settings.embed_weight_decay)
    torch.testing.assert_close(seen[-1]["tok_emb.weight"], table, rtol=1e-4, atol=1e-5)
    assert {f"exp_avg_sq.{MATRIX}", "momentum.tok_emb.weight"} <= optimizer.state().keys()
    assert f"momentum.{MATRIX}" not in optimizer.state()


def test_a_frozen_tensor_has_no_step_no_moment_and_no_decay() -> None:
    until = {"match": "blocks.0.*", "freeze_until": 0.5}
    optimizer, seen = stepped(until, {"match": "tok_emb.weight", "freeze_from": 0.2}, at=0.3)
    frozen = [name for name in optimizer.parameters if name.startswith("blocks.0.") or name == "tok_emb.weight"]
    for name, tensor in optimizer.parameters.items():
        assert torch.equal(tensor, seen[0][name]) == (name in frozen or f"grad.{name}" not in seen[0]), name
    state = optimizer.state()
    assert not state[f"momentum.{MATRIX}"].any()
    assert not {f"exp_avg.{VECTOR}", "exp_avg.tok_emb.weight"} & state.keys()
    rates = [optimizer.learning_rates(0.5, at)["matrix blocks.0.*"] for at in (0.3, 0.5)]
    assert rates == [0.0, 0.5 * optimizer.settings.matrix_lr]


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory: pytest.TempPathFactory, pico_data: DataFolder) -> Path:
    """A run of twelve steps with a checkpoint at each."""
    root = tmp_path_factory.mktemp("frozen")
    Trainer(pico_recipe(pico_data, root, **EVERY_STEP)).run()
    return root / "pico"


@pytest.mark.slow
def test_frozen_tensors_and_their_averages_move_no_bit_in_a_run(frozen_run: Path) -> None:
    found = [Checkpoint.open(path) for path in sorted(frozen_run.glob("step_*"))]
    raw = [checkpoint.load("raw").tensors for checkpoint in found]
    ema = [checkpoint.load("ema").tensors for checkpoint in found]
    for step in range(12):
        same = {name for name in raw[0] if torch.equal(raw[step][name], raw[step + 1][name])}
        assert all((name in same) == (step < 6) for name in raw[0] if name.startswith("blocks.0."))
        assert ("tok_emb.weight" in same) == (step >= 6)
    assert all(torch.equal(ema[6][name], raw[0][name]) for name in raw[0] if name.startswith("blocks.0."))


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])  # amid the one freeze, and amid the other
def test_a_run_resumed_amid_a_freeze_changes_no_bit(
    pico_data: DataFolder, tmp_path: Path, frozen_run: Path, step: int
) -> None:
    resumed = Trainer(pico_recipe(pico_data, tmp_path, **EVERY_STEP))
    resumed.resume(next(frozen_run.glob(f"step_{step:06d}-*")))
    ours, theirs = resumed.run(), Checkpoint.open(next(frozen_run.glob("*-final")))
    assert [ours.view_id(view) for view in ("raw", "ema")] == [theirs.view_id(view) for view in ("raw", "ema")]
    assert theirs.meta["recipe"]["optim"]["groups"][0]["freeze_until"] == 0.5


@pytest.mark.long  # processes of torchrun
def test_two_processes_with_groups_are_one_process(pico_data: DataFolder, tmp_path: Path) -> None:
    groups = (
        '[{match = "blocks.0.*", freeze_until = 0.5}, {match = "tok_emb.weight", freeze_from = 0.5}, '
        '{match = "blocks.1.mlp.*", method = "adamw", lr_scale = 0.5, weight_decay = 0.1}]'
    )
    one = Trainer(recipe_of(tmp_path / "one", pico_data, "fp64", optim={"groups": FROZEN})).run()
    two = train(2, recipe_file(tmp_path / "two", pico_data, "fp64"), "--set", f"optim.groups={groups}")
    assert one.meta["recipe"]["optim"] == two.meta["recipe"]["optim"]
    assert farthest(one, two) < 1e-9


@pytest.mark.parametrize(
    ("group", "named"),
    [
        ({"match": "x", "lr_scale": 0.0}, r"groups.0.lr_scale = 0.0: .*greater than 0"),
        ({"match": "x", "freeze_until": 1.5}, r"groups.0.freeze_until = 1.5: .*less than or equal to 1"),
        ({"match": "x", "freeze_from": -0.5}, r"groups.0.freeze_from = -0.5: .*greater than or equal to 0"),
        ({"match": "x", "freeze_until": 0.5, "freeze_from": 0.4}, "freeze_from 0.4 is not after freeze_until 0.5"),
        ({"match": "x", "weight_decay": -1.0}, r"groups.0.weight_decay = -1.0"),
        ({"match": "x", "method": "sgd"}, r"groups.0.method = 'sgd': .*'muon' or 'adamw'"),
        ({"match": "x", "decay": 0.0}, r"unknown key 'groups.0.decay'"),
    ],
)
def test_a_group_that_says_nothing_possible_is_refused(group: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        parsed(group)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([{"match": "blocks.9.*"}], r'optim.groups\[0\].match = "blocks.9.\*" matches none of the \d+ tensors'),
        ([{"match": "*.q.*"}, {"match": "blocks.0.*"}], r'blocks.0.attn.q.weight is matched by "\*.q.\*" and by "blo'),
        (
            [{"match": "blocks.0.*", "method": "muon"}],
            r'"muon" of "blocks.0.\*" needs matrices; blocks.0.\S+ has shape',
        ),
    ],
)
def test_a_group_that_cannot_act_on_the_model_is_refused_before_it_trains(
    groups: list[dict[str, Any]], named: str, pico_data: DataFolder, tmp_path: Path
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, optim={"groups": groups})
    with pytest.raises(SettingsError, match=named):
        dry_run(recipe, StepTimes(0.5, 1.0, "given"))
    with pytest.raises(SettingsError, match=named):
        Optimizer(pico_model(), recipe.optim)


def test_the_dry_run_says_groups_and_their_moments(
    pico_data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = pico_recipe(pico_data, tmp_path, optim={"groups": FROZEN})
    found = dry_run(recipe, StepTimes(0.5, 1.0, "given"))
    rows = {row.phase: row.step for row in found.timeline.boundaries}
    assert (rows["freeze_until@0.5"], rows["freeze_from@0.5"]) == (6, 6)
    said = capsys.readouterr().err
    assert "optim.groups: matrix blocks.1.mlp.*: 2 tensors of 1,024 parameters, adamw, peak learning rate 0.01" in said
    assert "optim.groups: embed tok_emb.weight: 1 tensors of 5,120 parameters, adamw" in said
    assert "frozen from 0.5 on" in said
    late = pico_recipe(pico_data, tmp_path, optim={"groups": [{"match": "*", "freeze_until": 0.99}]})
    refused = [f for f in dry_run(late, StepTimes(0.5, 1.0, "given")).findings if f.level == "refuse"]
    assert [finding.key for finding in refused] == ["optim.groups freeze_until"]


def test_a_script_that_trains_refuses_groups(pico_data: DataFolder, tmp_path: Path) -> None:
    recipe = pico_recipe(pico_data, tmp_path, optim={"groups": FROZEN})
    seed: Any = SimpleNamespace(settings={"plan": "sdclip-1394", "rules": []}, artifact="x")
    with pytest.raises(SettingsError, match=r"optim\.groups: a script that trains steps all tensors of a kind alike"):
        require_makeable(seed, recipe)
