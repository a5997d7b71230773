"""The stage: cached by what decides it, rules applied on reading, and no text no activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.diagnose import stage
from pgolf_post.diagnose.numbers import PARTS
from pgolf_post.diagnose.recipe_keys import recipe_toml
from pgolf_post.diagnose.report import block_rows, mark_rows, weight_rows, worst_of
from pgolf_post.diagnose.series import series
from pgolf_post.diagnose.settings import DiagnoseSettings
from pgolf_post.diagnose.stage import diagnose, open_diagnosis, stored_diagnoses
from pgolf_post.errors import MismatchError, NotFoundError, NumericsError
from pgolf_post.settings import read_toml

SMALL = DiagnoseSettings(tokens=256, removal_tokens=64)
WEIGHTS = DiagnoseSettings(tokens=0)


def test_a_second_call_reads_the_first_ones_numbers(view: View, pico_data: DataFolder) -> None:
    first = diagnose(view, pico_data, SMALL)
    second = diagnose(view, pico_data, SMALL)
    assert (first.cached, second.cached) == (False, True)
    assert list(first.numbers) == list(second.numbers)
    assert {number.part for number in first.numbers} == set(PARTS)
    assert first.folder == stored_diagnoses(view.checkpoint.path)[-1]
    assert diagnose(view, pico_data, SMALL.model_copy(update={"seed": 1})).folder != first.folder
    assert json.dumps(first.facts(), allow_nan=False)
    assert first.facts()["marks"] == [mark.facts() for mark in first.marks]


def test_tables_have_a_row_for_every_group_and_visit(view: View, pico_data: DataFolder) -> None:
    found = diagnose(view, pico_data, SMALL)
    layers = [row[0] for row in weight_rows(found.numbers, "layer")]
    assert layers == ["block 0", "block 1", "block 2", "outside the blocks"]
    assert len(weight_rows(found.numbers, "tensor")) == 3 * 6 + 1
    assert {row[0] for row in weight_rows(found.numbers, "role")} >= {"q", "mlp_proj", "embedding"}
    blocks = {row[0]: row for row in block_rows(found.numbers)}
    assert list(blocks) == ["block 0", "block 1, visit 1", "block 1, visit 2", "block 2"]
    assert blocks["block 1, visit 1"][-2:] == ("", "")  # a removal is of all visits, and stands at the last
    assert float(blocks["block 1, visit 2"][-2]) > 0
    assert len(mark_rows(found.marks)) == len(found.marks)


def test_the_worst_of_a_group_is_what_no_other_exceeds() -> None:
    assert worst_of([1.0, None, 3.0], "largest") is None
    assert worst_of([1.0, None, 3.0], "smallest") == 1.0
    assert worst_of([1.0, 3.0], "largest") == 3.0
    assert worst_of([None], "smallest") is None


def test_without_text_the_weights_alone_are_measured(view: View, pico_data: DataFolder) -> None:
    found = diagnose(view, None, WEIGHTS)
    assert {number.part for number in found.numbers} == {"weights", "scalars", "embedding"}
    with_classes = diagnose(view, pico_data, WEIGHTS)
    assert with_classes.folder != found.folder
    assert {n.subject for n in with_classes.numbers if n.metric == "class_norm"} >= {"tok_emb.weight (byte fallback)"}
    with pytest.raises(NotFoundError, match="activations need training text") as caught:
        diagnose(view, None, SMALL)
    assert "--tokens 0" in str(caught.value.hint)


def test_too_little_text_is_refused_with_what_there_is(view: View, pico_data: DataFolder) -> None:
    with pytest.raises(MismatchError, match="the training split has"):
        diagnose(view, pico_data, DiagnoseSettings(tokens=10_000_000))


def test_marks_are_of_todays_rules(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = diagnose(view, None, WEIGHTS).folder
    before = open_diagnosis(folder).marks
    monkeypatch.setattr(stage, "find_marks", lambda numbers: [])
    assert before
    assert open_diagnosis(folder).marks == []


def test_a_number_that_is_not_finite_is_refused_by_name(view: View, pico_data: DataFolder) -> None:
    tensors = {name: tensor.clone() for name, tensor in view.tensors.items()}
    tensors["blocks.1.attn_scale"][0] = torch.inf
    broken = View(view.checkpoint, view.name, "0" * 64, tensors)
    with pytest.raises(NumericsError, match=r"value of blocks\.1\.attn_scale\[0\] is inf"):
        diagnose(broken, pico_data, SMALL)
    assert stored_diagnoses(view.checkpoint.path) == []


def test_several_checkpoints_are_curves_over_steps(pico_run: Path) -> None:
    from pgolf_post.checkpoint import list_checkpoints

    found = [diagnose(checkpoint.load("raw"), None, WEIGHTS) for checkpoint in reversed(list_checkpoints(pico_run))]
    curves = {curve.name: curve for curve in series(found, "role")}
    ranks = curves["effective_rank_share q"]
    assert ranks.step.tolist() == [0, 3, 6, 9, 12]
    assert ranks.values[0] == pytest.approx(1.0, rel=1e-4)  # orthogonal at the start
    assert "condition attn_proj" in curves
    assert 0 not in curves["condition attn_proj"].step  # zero at the start: no condition
    assert curves["value blocks.0.attn.q_gain[0]"].values[0] == 4.0


def test_a_block_keeps_its_name_when_loops_are_switched_on(pico_run: Path, pico_data: DataFolder) -> None:
    from pgolf_post.checkpoint import list_checkpoints

    first, second, *_ = list_checkpoints(pico_run)
    found = [diagnose(one.load("raw"), pico_data, SMALL) for one in (first, second)]
    steps = {curve.name: curve.step.tolist() for curve in series(found, "role")}
    assert steps["norm_after block 0"] == [0, 3]
    assert steps["norm_after block 1, visit 1"] == [0, 3]
    assert steps["norm_after block 1, visit 2"] == [3]
    assert "norm_after block 1" not in steps


def test_learned_scalars_become_keys_of_a_recipe(view: View, tmp_path: Path) -> None:
    tensors = {
        **view.tensors,
        "recur_beta": torch.tensor([1.5649, 1.85]),
        "recur_alpha": torch.tensor([[0.234, 0.04], [0.13, -0.341]]),
    }
    (tmp_path / "recipe.toml").write_text(recipe_toml(View(view.checkpoint, view.name, view.id, tensors), 2))
    model = read_toml(tmp_path / "recipe.toml")["model"]
    gains = model.pop("q_gain_init")
    assert gains == [[round(g, 2) for g in tensors[f"blocks.{i}.attn.q_gain"].double().tolist()] for i in range(3)]
    assert model == {"carry": "frozen", "carry_beta": [1.56, 1.85], "carry_alpha": [[0.23, 0.04], [0.13, -0.34]]}
    text = (tmp_path / "recipe.toml").read_text()
    assert "# blocks.2.attn_scale: 16 values" not in text  # short enough to be listed
    assert "# blocks.2.attn_scale = [" in text


def test_a_carry_that_differs_by_revisit_has_a_list_for_each(view: View, tmp_path: Path) -> None:
    tensors = {
        **view.tensors,
        "recur_beta": torch.tensor([[1.0], [2.0]]),
        "recur_alpha": torch.tensor([[[0.5]], [[0.1]]]),
    }
    text = recipe_toml(View(view.checkpoint, view.name, view.id, tensors), 3)
    (tmp_path / "recipe.toml").write_text(text)
    model = read_toml(tmp_path / "recipe.toml")["model"]
    assert model["carry_per_pass"] is True
    assert (model["carry_beta"], model["carry_alpha"]) == ([[1.0], [2.0]], [[[0.5]], [[0.1]]])
