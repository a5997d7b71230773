"""The whole form trains, quantizes and packs to the bytes of the artifact that it was made from, and scores them."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_post.artifacts import PackedArtifact, requant
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.limits import fixed_bytes
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.pack.script import has_minifier
from pgolf_post.plan import read_plan
from pgolf_post.quantize.gptq.diagonals import _numpy_sweep, _sheet
from pgolf_post.quantize.gptq.factorize import factorize
from pgolf_post.quantize.gptq.job import Job
from pgolf_post.quantize.gptq.trellis import DIAGONALS, TILE, Trellis
from pgolf_post.quantize.gptq.viterbi import Grid
from pgolf_post.score.protocols import make_protocol
from pgolf_post.score.stage import score
from pgolf_post.submit.forms import whole_form
from pgolf_post.submit.packed import packed, shortened
from pgolf_post.submit.seeds import Seed
from pgolf_post.submit.swept import sweep
from tests.conftest import pico_recipe
from tests.submit.project import placeholders
from trainer.config import Recipe

MOST_BYTES = 37_000  # of a whole form; 40,000 are aimed at, and the trainer grows
MOST_BYTES_OF_A_FIT = 40_500  # 40,000 are aimed at
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


@pytest.mark.long
def test_settings_that_are_off_are_not_in_the_script(
    tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    view = pico_checkpoint.load()
    made = requant(view, calibrate(view, pico_data, CalibrationSettings(tokens=640)), read_plan("record-1855"))
    recipe = pico_recipe(pico_data, tmp_path)
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 8}, 16, "test")
    amalgam = whole_form(Seed.open(made.path), recipe, protocol)
    assert placeholders(amalgam) == set()
    source = amalgam.source
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
@pytest.mark.parametrize(("plan", "fisher"), [("sdclip-1394", True), ("record-1855", False)])
def test_a_script_trains_to_the_same_bytes(
    plan: str,
    fisher: bool,
    tmp_path: Path,
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = pico_checkpoint.load()
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=4096, fisher=fisher))
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


SMALL_FIT = FitSettings(kappa_tokens=256)


def fitted(view: View, data: DataFolder, bits: float, settings: FitSettings = SMALL_FIT) -> PackedArtifact:
    """A fit to so many bits per weight."""
    fitter = prepare(view, data, CalibrationSettings(tokens=640), settings)
    limit = fixed_bytes(fitter.builder) + round(fitter.builder.num_weights * bits / 8) + WINDOW_BYTES // 2
    return fit_artifact(fitter, limit)


@pytest.mark.long
@pytest.mark.parametrize(
    ("bits", "kappa", "has_numba"), [(4, "tensor", True), (4, "role", False), (4, "off", True), (2, "tensor", True)]
)
def test_a_script_fits_to_the_same_bytes(
    bits: float,
    kappa: str,
    has_numba: bool,
    tmp_path: Path,
    pico_checkpoint: Checkpoint,
    pico_data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = FitSettings.model_validate({**SMALL_FIT.model_dump(), "kappa": kappa})
    made = fitted(pico_checkpoint.load(), pico_data, bits, settings)
    assert ("regularized" in made.meta) == (bits < 3)
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 8}, 16, "test")
    amalgam = whole_form(Seed.open(made.path), pico_recipe(pico_data, tmp_path), protocol)
    assert not {"pgolf_post", "trainer", "pydantic", "click", "safetensors", "numba"} & set(amalgam.external)
    assert placeholders(amalgam) == set()
    size = len(packed(amalgam.source).data) if has_minifier() else 0
    assert size <= MOST_BYTES_OF_A_FIT

    script, out = shortened(amalgam.source), tmp_path / "handed_in"
    out.mkdir()
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", str(pico_data.path)])
    if not has_numba:
        monkeypatch.setitem(sys.modules, "numba", None)
    capsys.readouterr()
    exec(compile(script, "train_gpt.py", "exec"), {"__name__": "__main__", "__file__": str(out / "train_gpt.py")})
    printed = capsys.readouterr().out
    assert ("no numba" in printed) != has_numba
    assert (out / "artifact.pgolf").read_bytes() == made.path.read_bytes()
    assert json.loads(printed.splitlines()[-1])["nats"] == score(made.path, pico_data, protocol).nats


@pytest.mark.slow
def test_a_fit_that_tuned_weights_is_refused_by_name(
    tmp_path: Path, pico_checkpoint: Checkpoint, pico_data: DataFolder
) -> None:
    made = fitted(pico_checkpoint.load(), pico_data, 4)
    protocol = make_protocol("sliding", {"max_tokens": 200, "stride": 8}, 16, "test")
    recipe = pico_recipe(pico_data, tmp_path)
    config = json.loads((made.folder / "config.json").read_text())
    for key, value, said in (
        ("tune", {"tokens": 2048}, "--tune-tokens"),
        ("distill", {"tokens": 2048}, "--distill"),
        ("jitter_seed", 3, "moved at random"),
    ):
        (made.folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(SettingsError, match=said):
            whole_form(Seed.open(made.path), recipe, protocol)


def test_a_script_sweeps_diagonals_as_the_kernels_do() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, coupled in ((40, 70, True), (70, 33, False)):
        inputs, outputs = (torch.randn(200, size, generator=generator).double() for size in (columns, rows))
        factor = factorize("w", inputs.T @ inputs, 0.01, False)
        feedback = factorize("w", outputs.T @ outputs, 0.01, False).feedback if coupled else None
        weight = torch.randn(rows, columns, generator=generator)
        steps = 0.1 + torch.rand(rows, columns if coupled else 1, generator=generator)
        job = Job("w", weight, factor, steps, None, Trellis(16, DIAGONALS), feedback)
        sheet, grid = _sheet(job), Grid.of(16, 0, job.limit)
        first = min(TILE, rows + columns - 1)  # before any error leaves its tile and the next
        sweep(sheet, grid.bounds, grid.came_from, 0, first)
        other = _sheet(job)
        _numpy_sweep(grid, other, 0, first)
        for mine, wanted in zip(sheet, other, strict=True):
            np.testing.assert_array_equal(mine, wanted)
        assert sheet.symbols.any()
