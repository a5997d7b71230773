"""Trials with method = "fit": refused where they mean nothing, and made, cached and decided as any other trial."""

from __future__ import annotations

from pathlib import Path

import pytest

import pgolf_post.sweep.quantizers as quantizers
from pgolf_post.calibrate import CalibrationSettings
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.fit.artifact import fit_artifact
from pgolf_post.fit.prepare import prepare
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import WINDOW_BYTES
from pgolf_post.ledger import Ledger
from pgolf_post.ledger.disk import scan
from pgolf_post.sweep.expand import expand, read_spec
from pgolf_post.sweep.plan import plan_rows
from pgolf_post.sweep.run import Sweep
from pgolf_post.sweep.trials import Trial
from tests.sweep.conftest import Lab, by_name, spec_text

BUDGET = 8000
FIT = f'method = "fit"\nfit = {{budget = {BUDGET}, kappa_tokens = 256}}\n'
STATES = f'question = "states?"\nnoise_repeats = 1\n{FIT}[grid]\nfit.trellis_states = [256, 8, 0]\n'
MIXED = 'question = "plan or fit?"\nnoise_repeats = 0\nbaselines = []\n[[trials]]\nname = "fit"\n' + FIT


def trials_of(text: str, folder: Path) -> list[Trial]:
    path = folder / "spec.toml"
    path.write_text(f'question = "?"\n{text}', encoding="utf-8")
    return expand(read_spec(path), lambda _: 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method = 'fit'\nfit.budgit = 9000", r"fit.budgit' \(did you mean 'budget'\?\); valid keys here: .*kappa"),
        ("fit.budget = 2_000_000", "fit.budget does nothing without method = 'fit'"),
        ("[grid]\nfit.trellis_states = [8]", "fit.trellis_states does nothing without method = 'fit'"),
        ("[each]\nfit.budget = [9000]", "fit.budget does nothing without method = 'fit'"),
        ("[[trials]]\nname = 'x'\nfit.budget = 9000", "fit.budget does nothing without method = 'fit'"),
        ("method = 'fit'\n[grid]\nmatrices.clip = [11]", "matrices.clip changes the plan"),
        ("method = 'fit'\n[each]\nplan = ['record-1855']", "plan changes the plan"),
        ("[[trials]]\nname = 'x'\nmethod = 'fit'\nmatrices.bits = 5", "matrices.bits changes the plan"),
        ("method = 'fit'\n[set]\nmatrices.bits = 5", "every trial has method = 'fit'"),
        ("method = 'fit'\nfit.trellis_states = 5", "a trellis of 5 states"),
        ("method = 'fit'\nfit.budgets = 5", "unknown key 'base.fit.budgets'"),
        ("method = 'guess'", "'plan' or 'fit'"),
    ],
)
def test_what_cannot_act_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        trials_of(text, tmp_path)


def test_dotted_keys_are_fit_settings_everywhere(tmp_path: Path) -> None:
    text = "method = 'fit'\nfit.budget = 2000000\n[grid]\nfit.trellis_states = [8, 256]\n[each]\nfit.kappa = ['off']\n"
    trials = trials_of(text + "[[trials]]\nname = 'small'\nfit.budget = 1_000_000\nfit.floats = 'fp16'", tmp_path)
    named = {trial.name: trial.settings for trial in trials}
    assert trials[0].name == "control (fit.trellis_states = 256)"  # its default: that point is the control itself
    assert named["fit.trellis_states = 8"].fit is not None
    assert named["fit.trellis_states = 8"].fit.budget == 2_000_000
    assert named["fit.trellis_states = 8"].fit.settings() == FitSettings(trellis_states=8)
    assert named["fit.kappa = off"].fit is not None
    assert named["fit.kappa = off"].fit.kappa == "off"
    assert named["small"].fit is not None
    assert (named["small"].fit.budget, named["small"].fit.floats) == (1_000_000, "fp16")
    mixed = {trial.name: trial.settings.method for trial in trials_of("[grid]\nmethod = ['plan', 'fit']", tmp_path)}
    assert mixed["control (method = plan)"] == "plan"
    assert mixed["method = fit"] == "fit"


def test_a_preset_beside_a_fit_is_quantized_by_its_plan(tmp_path: Path) -> None:
    trials = trials_of("method = 'fit'\nbaselines = ['record-1855']\n[grid]\nfit.trellis_states = [8]", tmp_path)
    baseline = next(trial for trial in trials if trial.role == "baseline")
    assert (baseline.settings.method, baseline.settings.plan, baseline.settings.fit) == ("plan", "record-1855", None)


def test_a_fit_is_a_trial_like_any_other(lab: Lab, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills its budget, is the artifact of `fit` itself, has a verdict and noise, and is found the second time."""
    state = lab.run(spec_text(STATES))
    rows = by_name(state)
    control, scalar = rows["control (fit.trellis_states = 256)"], rows["fit.trellis_states = 0"]
    for row in (control, scalar, rows["fit.trellis_states = 8"], rows["noise 1"]):
        assert "error" not in row.result, row.result
        assert BUDGET - WINDOW_BYTES <= row.result["artifact_bytes"] <= BUDGET
        assert "fit" in row.result["stage_seconds"]
    assert scalar.verdict in ("positive", "neutral", "negative")
    assert scalar.result["noise_floor_bpb"] > 0
    assert rows["noise 1"].result["content_sha256"] != control.result["content_sha256"]
    assert rows["unquantized"].result["screen"]["bpb"] != control.result["screen"]["bpb"]

    # The command's own artifact, under its id.
    view = Checkpoint.open(lab.root / "latest").load()
    fitter = prepare(view, pico_data, CalibrationSettings(tokens=320), FitSettings(kappa_tokens=256))
    artifact = fit_artifact(fitter, BUDGET)
    assert artifact.cached
    assert control.result["artifact_id"] == artifact.id
    assert set(artifact.meta["train_seconds"]) == {"statistics", "kappa"}

    # Rows of the artifacts are those that a scan makes.
    with Ledger.open(lab.root) as ledger:
        assert {row.id for row in ledger.rows("artifact")} == {
            row.id for row in scan(lab.root) if row.kind == "artifact"
        }

    # Nothing is fitted again: neither for these rows, nor for others that lead to the same artifacts.
    monkeypatch.setattr(quantizers, "fitted", lambda *_: pytest.fail("fitted again"))
    assert lab.run(spec_text(STATES)).rows.keys() == state.rows.keys()
    again = by_name(lab.run(spec_text(STATES) + "[stages.plain]\nmax_tokens = 161\n", "again"))
    assert "artifact" in again["fit.trellis_states = 0"].result["shared"]
    assert again["fit.trellis_states = 0"].result["artifact_id"] == scalar.result["artifact_id"]


def test_a_sweep_finds_what_fit_made_and_plans_with_it(lab: Lab, pico_data: DataFolder) -> None:
    view = Checkpoint.open(lab.root / "latest").load()
    fitter = prepare(view, pico_data, CalibrationSettings(tokens=320), FitSettings(kappa_tokens=256))
    artifact = fit_artifact(fitter, BUDGET)
    stamp = artifact.path.stat().st_mtime_ns
    sweep = Sweep(lab.options(spec_text(MIXED)))
    planned = {row.listed.trial.name: row for row in plan_rows(sweep)}
    sweep.close()
    assert planned["fit"].cached == ("stats", "artifact")
    assert planned["fit"].predicted_bytes == BUDGET - WINDOW_BYTES // 2
    assert planned["control"].cached == ("stats",)  # statistics with the backward half serve a plan too
    row = by_name(lab.run(spec_text(MIXED)))["fit"]
    assert "artifact" in row.result["shared"]
    assert row.result["artifact_id"] == artifact.id
    assert artifact.path.stat().st_mtime_ns == stamp
    assert row.result["stats_id"] == fitter.stats.id


def test_counted_code_is_taken_from_the_budget(lab: Lab) -> None:
    code = lab.folder / "code.py"
    code.write_text("#" * 1000)
    text = f'question = "?"\nnoise_repeats = 0\nbaselines = []\nbudget_bytes = {BUDGET}\ncode = ["{code}"]\n'
    text += '[[trials]]\nname = "fit"\nmethod = "fit"\nfit.kappa = "off"\n'
    text += '[[trials]]\nname = "too small"\nmethod = "fit"\nfit.budget = 900\n'
    rows = by_name(lab.run(spec_text(text)))
    assert BUDGET - WINDOW_BYTES <= rows["fit"].result["total_bytes"] <= BUDGET
    assert rows["fit"].result["artifact_bytes"] <= BUDGET - 1000
    assert "nothing is left for weights" in rows["too small"].result["error"]


def test_predicted_bytes_are_those_of_the_model_made_or_found(lab: Lab) -> None:
    """A found artifact is predicted from what it holds; either way the number is the same."""
    text = spec_text(MIXED) + "[stages.predict]\n"
    made = {name: row.result["predicted_bytes"] for name, row in by_name(lab.run(text)).items()}
    for meta in lab.root.glob("pico/*/derived/artifact/*/meta.json"):
        kept = meta.read_text()
        assert '"predicted_bytes"' in kept
        meta.write_text(kept.replace('"predicted_bytes"', '"was"'))
    (lab.root / "ledger.sqlite").unlink()
    found = {name: row.result["predicted_bytes"] for name, row in by_name(lab.run(text)).items()}
    assert found == made
