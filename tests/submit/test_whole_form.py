"""The whole form trains, quantizes and packs to the bytes of the artifact that it was made from, and scores them."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.pack.script import has_minifier
from pgolf_post.plan import read_plan
from pgolf_post.score.protocols import make_protocol
from pgolf_post.score.stage import score
from pgolf_post.submit.forms import whole_form
from pgolf_post.submit.packed import packed, shortened
from pgolf_post.submit.seeds import Seed
from tests.conftest import pico_recipe
from trainer.config import Recipe

MOST_BYTES = 37_000  # of a whole form; 40,000 are aimed at, and the trainer grows
HIDING = {"eval", "exec", "globals", "locals", "vars"}  # before these the minifier renames nothing at all
OFF = (None, False, 0, (), "none", "off")
MANY_MEANINGS = {  # words that other things have for a name too
    *(
        "base",
        "groups",
        "layers",
        "micro_batch_tokens",
        "points",
        "seconds",
        "steps",
        "threads",
        "visits",
        "weights",
        "window",
    ),
}


@pytest.mark.slow
def test_settings_that_are_off_are_not_in_the_script(
    tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    view = pico_checkpoint.load()
    made = requant(view, calibrate(view, pico_data, CalibrationSettings(tokens=640)), read_plan("record-1855"))
    recipe = pico_recipe(pico_data, tmp_path)
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 8}, 16, "test")
    source = whole_form(Seed.open(made.path), recipe, protocol).source
    tree = ast.parse(source)
    names = identifiers(tree)
    tables = {table: own for table in Recipe.model_fields if (own := getattr(recipe, table)) is not None}
    assert not (Recipe.model_fields.keys() - tables.keys()) & names
    fields = {
        f"{t}.{key}": (field, getattr(s, key)) for t, s in tables.items() for key, field in type(s).model_fields.items()
    }
    off = [at for at, (field, value) in fields.items() if value == field.default and value in OFF]
    assert len(off) > 60
    assert [at for at in off if at.partition(".")[2] in names - MANY_MEANINGS] == []
    assert not names & {"BlockVisit", "fused", "is_left_behind", "row_feedback", "viterbi"}
    assert not {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)} & HIDING
    assert not has_minifier() or len(packed(source).data) <= MOST_BYTES


def identifiers(tree: ast.AST) -> set[str]:
    """Names of a program, but not its strings: the artifact's config has every setting's name."""
    names: set[str] = set()
    for each in ast.walk(tree):
        names.update(
            value for key in ("id", "attr", "arg", "name") if isinstance(value := getattr(each, key, None), str)
        )
    return names


@pytest.mark.long  # minutes: the generated packer has plain loops
@pytest.mark.parametrize("plan", ["sdclip-1394", "record-1855"])
def test_a_script_trains_to_the_same_bytes(
    plan: str,
    tmp_path: Path,
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = pico_checkpoint.load()
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=640))
    made = requant(view, stats, read_plan(plan))
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 8}, 16, "test")
    seed = Seed.open(made.path)
    recipe = pico_recipe(pico_data, tmp_path)
    amalgam = whole_form(seed, recipe, protocol)
    assert not {"pgolf_post", "trainer", "pydantic", "click", "safetensors", "numba"} & set(amalgam.external)

    script, out = shortened(amalgam.source), tmp_path / "handed_in"
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", str(pico_data.path)])
    capsys.readouterr()
    exec(compile(script, "train_gpt.py", "exec"), {"__name__": "__main__", "__file__": str(out / "train_gpt.py")})
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (out / "artifact.pgolf").read_bytes() == made.path.read_bytes()
    assert answer["nats"] == score(made.path, pico_data, protocol).nats

    artifact = (out / "artifact.pgolf").stat()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", str(pico_data.path), "200", "eval"])
    exec(compile(script, "train_gpt.py", "exec"), {"__name__": "__main__", "__file__": str(out / "train_gpt.py")})
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nats"] == answer["nats"]
    assert (out / "artifact.pgolf").stat().st_mtime_ns == artifact.st_mtime_ns

    fused = recipe.model_copy(update={"run": recipe.run.model_copy(update={"kernels": "triton"})})
    with pytest.raises(SettingsError, match="fused kernels"):
        whole_form(seed, fused, protocol)
    shaped = Recipe.model_validate({**recipe.model_dump(), "loss": {"z_loss": 1e-4}})
    with pytest.raises(SettingsError, match=r"loss.z_loss: a script that trains minimises plain nats"):
        whole_form(seed, shaped, protocol)
    started = Recipe.model_validate({**recipe.model_dump(), "init": {"checkpoint": "base"}})
    with pytest.raises(SettingsError, match=r"init.checkpoint base: a script that trains starts from its own init"):
        whole_form(seed, started, protocol)
