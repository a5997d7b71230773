"""What a sweep's rows say, on a pico run: baselines, shared work, gates, failures, resuming, changes while it runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import pgolf_post.sweep.quantizers as quantizers
import pgolf_post.sweep.smoke as smoke
import pgolf_post.sweep.stages.screen as screen
import pgolf_post.sweep.training as training
from pgolf_post.artifacts import requant
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.cli.requant import command as requant_command
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.ledger.disk import scan
from pgolf_post.ledger.schema import iso_utc
from pgolf_post.plan import read_plan
from pgolf_post.sweep.engines.local import run_local
from pgolf_post.sweep.run import Sweep, work
from pgolf_post.sweep.table import markdown, ranked, save
from pgolf_post.sweep.verdict import noise_floor
from tests.sweep.conftest import LAMBDAS, Lab, by_name, lasting, spec_text


def test_a_sweep_gives_what_requant_gives(lab: Lab, pico_data: DataFolder) -> None:
    """Same artifact, byte for byte, in the same cache folder, with the control and the unquantized weights beside."""
    rows = by_name(lab.run(spec_text()))
    assert list(rows) == [
        "control (hessian_lambda = 0)",
        "unquantized",
        "noise 1",
        "hessian_lambda = 0.2",
        "hessian_lambda = 0.6",
    ]
    view = Checkpoint.open(lab.root / "latest").load()
    stats = calibrate(view, pico_data, CalibrationSettings(tokens=320))
    row = rows["hessian_lambda = 0.6"]
    artifact = requant(view, stats, read_plan("sdclip-1394", ["*.hessian_lambda=0.6"]))
    assert artifact.cached
    assert row.result["symbols_sha256"] == artifact.symbols_sha256
    assert row.result["artifact_bytes"] == artifact.path.stat().st_size
    assert row.result["artifact_id"] == artifact.id
    assert row.result["screen"]["tokens"] == 320
    assert rows["unquantized"].result["screen"]["difference_bpb"] < 0
    assert row.result["headroom_bytes"] == 16_000_000 - row.result["artifact_bytes"]


def test_a_sweep_finds_what_requant_made(lab: Lab) -> None:
    """The command's artifact is a trial's, and is not written again; the statistics it collected serve all trials."""
    arguments = [str(lab.root / "latest"), "--lambda", "0.6", "--calibration-tokens", "320", "--json"]
    answer = CliRunner().invoke(requant_command, arguments, catch_exceptions=False)
    made = json.loads(answer.stdout.splitlines()[-1])
    stamp = Path(made["artifact"]).stat().st_mtime_ns
    rows = by_name(lab.run(spec_text()))
    row = rows["hessian_lambda = 0.6"]
    assert "artifact" in row.result["shared"]
    assert "quantize" not in row.result["stage_seconds"]
    assert row.result["symbols_sha256"] == made["symbols_sha256"]
    assert row.result["artifact_id"].startswith(Path(made["artifact"]).parent.name)
    assert Path(made["artifact"]).stat().st_mtime_ns == stamp
    assert all("calibrate" in row.result["shared"] for row in rows.values() if row.name != "unquantized")
    assert "artifact" not in rows["hessian_lambda = 0.2"].result["shared"]


def test_a_scan_finds_the_very_rows_of_a_sweep(lab: Lab) -> None:
    """Noise repeats too: what jittered them is part of their id, and config.json says it."""
    lab.run(spec_text())
    with Ledger.open(lab.root) as ledger:
        written = {row.id for row in ledger.rows("artifact")}
    assert {row.id for row in scan(lab.root) if row.kind == "artifact"} == written


def test_rows_remember_what_they_were_made_of(lab: Lab) -> None:
    state = lab.run(spec_text())
    row = by_name(state)["hessian_lambda = 0.6"]
    with Ledger.open(lab.root) as ledger:
        artifact = ledger.get("artifact", row.parents[0])
        assert artifact is not None
        view_id, stats_id = artifact.parents
        stats, checkpoint = ledger.get("stats", stats_id), ledger.get("checkpoint", view_id)
    assert stats is not None
    assert stats.parents == (view_id,)
    assert checkpoint is not None
    assert row.commit
    assert row.seconds is not None


def test_running_again_does_nothing_and_changes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lab.run(spec_text())
    monkeypatch.setattr(quantizers, "quantize_view", lambda *_: pytest.fail("quantized again"))
    after = lab.run(spec_text())
    assert {row.id: lasting(row) for row in after.rows.values()} == {
        row.id: lasting(row) for row in before.rows.values()
    }
    assert {row.created for row in after.rows.values()} == {row.created for row in before.rows.values()}


def test_same_symbols_are_packed_once_and_the_same_artifact_is_scored_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two settings that make the same model: one packing, one score, one of them marked."""
    packed, screened = [], []
    pack, score = quantizers.pack, screen.score_chosen
    monkeypatch.setattr(quantizers, "pack", lambda *a, **k: packed.append(1) or pack(*a, **k))
    monkeypatch.setattr(screen, "score_chosen", lambda *a, **k: screened.append(1) or score(*a, **k))
    text = 'question = "?"\nnoise_repeats = 0\nbaselines = []\n'
    text += '[[trials]]\nname = "same"\nmatrices.depth_clip.early = 1.0'
    rows = by_name(lab.run(spec_text(text)))
    assert (len(packed), len(screened)) == (1, 1)
    assert rows["same"].verdict == "no-op"
    assert rows["same"].result["no_op"]
    assert {"pack", "screen"} <= set(rows["same"].result["shared"])
    assert rows["same"].result["artifact_id"] != rows["control"].result["artifact_id"]


def test_an_expected_score_is_the_weights_loss_and_the_divergence_from_them(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 1\n[grid]\nmatrices.clip = [6.0, 12.85]\n'
    stages = "[stages.expected]\ntokens = 320\n"  # as many as the screen
    rows = by_name(lab.run(spec_text(text + stages)))
    weights, control = rows["unquantized"].result, rows["control (matrices.clip = 12.85)"].result
    assert weights["expected"]["bpb"] == pytest.approx(weights["screen"]["bpb"], abs=1e-7)
    assert control["expected"]["bpb"] > weights["expected"]["bpb"]  # no divergence is negative
    assert control["expected"]["bpb"] != pytest.approx(control["screen"]["bpb"], abs=1e-6)
    trial = rows["matrices.clip = 6.0"]
    found = trial.result["expected"]
    assert found["difference_bpb"] == pytest.approx(found["bpb"] - control["expected"]["bpb"], abs=1e-9)
    assert trial.result["bpb"] == found["bpb"]  # the later stage decides
    noise = next(row for row in rows.values() if row.settings["role"] == "noise")
    assert "screen" not in noise.result
    assert trial.result["noise_floor_bpb"] > 0


@pytest.mark.long
def test_a_compiled_sweep_learns_on_the_eager_model(lab: Lab) -> None:
    text = (
        'question = "?"\nnoise_repeats = 0\nbaselines = []\nrank_by = "ttt"\n[grid]\nttt.learning_rate = [0.0, 0.01]\n'
    )
    stage = '[stages.ttt]\npreset = "sgd"\nset = ["chunk_tokens=64", "epochs=1", "stride=8"]\nmax_tokens = 200\n'
    compiled, eager = (
        by_name(lab.run(spec_text(text + stage).replace("[stages.screen]\ntokens = 320", ""), name, compiled=choice))
        for name, choice in (("compiled", True), ("eager", False))
    )
    assert {name: row.result["ttt"]["bpb"] for name, row in compiled.items()} == {
        name: row.result["ttt"]["bpb"] for name, row in eager.items()
    }


def test_a_codec_changes_bytes_and_no_symbol(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 0\nrank_by = "bytes"\n[grid]\ncodec = ["none", "rans", "brotli"]'
    rows = by_name(lab.run(spec_text(text)))
    control, none = rows["control (codec = rans)"], rows["codec = none"]
    assert none.result["symbols_sha256"] == control.result["symbols_sha256"]
    assert none.result["artifact_bytes"] > control.result["artifact_bytes"]
    assert (none.verdict, none.result["screen"]["difference_bpb"]) == ("negative", 0.0)


def test_weights_that_are_not_quantized_have_no_bytes_to_rank_by(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 0\nrank_by = "bytes"\nbaselines = []\n'
    rows = by_name(lab.run(spec_text(f'{text}[[trials]]\nname = "weights"\nquantize = false\n')))
    assert rows["weights"].verdict == "neutral"
    assert rows["weights"].conclusion
    assert rows["weights"].conclusion.startswith("no artifact, so no bytes to rank by; -")


def test_noise_is_measured_by_jittered_scales(lab: Lab) -> None:
    rows = by_name(lab.run(spec_text(LAMBDAS.replace("noise_repeats = 1", "noise_repeats = 2"))))
    noise = [rows["noise 1"], rows["noise 2"]]
    sizes = {row.result["content_sha256"] for row in [*noise, rows["control (hessian_lambda = 0)"]]}
    assert len(sizes) == 3
    floor = noise_floor(noise, "screen")
    assert floor is not None
    assert floor > max(abs(row.result["screen"]["difference_bpb"]) for row in noise)
    assert rows["hessian_lambda = 0.6"].result["noise_floor_bpb"] == floor
    assert noise_floor([], "screen") is None


def test_a_difference_inside_the_noise_is_none(lab: Lab) -> None:
    from pgolf_post.sweep.settings import SweepSpec
    from pgolf_post.sweep.verdict import judge

    spec = SweepSpec(question="?")
    found = {"screen": {"difference_bpb": -0.001, "low_bpb": -0.0015, "high_bpb": -0.0005}}
    assert judge(spec, found, {}, 0.0005)[0] == "positive"
    assert judge(spec, found, {}, None)[0] == "positive"
    assert judge(spec, found, {}, 0.002)[0] == "neutral"
    assert "noise floor" in judge(spec, found, {}, 0.002)[1]
    worse = {"screen": {"difference_bpb": 0.001, "low_bpb": 0.0005, "high_bpb": 0.0015}}
    assert judge(spec, worse, {}, 0.0005)[0] == "negative"
    wide = {"screen": {"difference_bpb": 0.001, "low_bpb": -0.0005, "high_bpb": 0.0025}}
    assert judge(spec, wide, {}, 0.0005)[0] == "neutral"


# ---- stages and gates ------------------------------------------------------------------------------------------------


def test_stages_run_in_order_and_only_if(lab: Lab) -> None:
    text = spec_text('question = "?"\nnoise_repeats = 0\n[grid]\nmatrices.bits = [4, 6]')
    text += '[stages.predict]\n[stages.plain]\nmax_tokens = 161\nonly_if = "screen_difference_bpb < -1"\n'
    text += '[stages.sliding]\nmax_tokens = 81\nstride = 4\nonly_if = "artifact_bytes > 0"\n'
    rows = by_name(lab.run(text))
    control, row = rows["control (matrices.bits = 6)"], rows["matrices.bits = 4"]
    assert abs(row.result["predicted_bytes"] / row.result["artifact_bytes"] - 1) < 0.1
    assert control.result["plain"]["tokens"] == 160  # conditions are not for what others are compared with
    assert "plain" not in row.result
    assert row.result["skipped"] == {"plain": "screen_difference_bpb < -1"}
    assert row.result["sliding"]["tokens"] == 80
    assert row.result["bpb"] == row.result["sliding"]["bpb"]


def test_test_time_training_is_a_stage(lab: Lab) -> None:
    text = (
        'question = "?"\nnoise_repeats = 0\nbaselines = []\nrank_by = "ttt"\n[grid]\nttt.learning_rate = [0.0, 0.05]\n'
    )
    text = spec_text(text) + '[stages.ttt]\npreset = "sgd"\nset = ["chunk_tokens=32", "stride=8"]\nmax_tokens = 161\n'
    rows = by_name(lab.run(text))
    frozen, learned = rows["ttt.learning_rate = 0.0"], rows["ttt.learning_rate = 0.05"]
    assert frozen.result["artifact_id"] == learned.result["artifact_id"]
    assert frozen.result["ttt"]["bpb"] != learned.result["ttt"]["bpb"]
    assert frozen.verdict != "no-op"


def test_what_is_over_budget_is_not_scored(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 0\nbudget_bytes = 10\ngates.drop_if_over_budget = true\n'
    text += "[grid]\nmatrices.bits = [4]"
    rows = by_name(lab.run(spec_text(text) + "[stages.predict]\n"))
    assert "over the budget" in rows["matrices.bits = 4"].result["dropped"]
    assert "artifact_bytes" not in rows["matrices.bits = 4"].result
    assert "screen" in rows["control"].result


def test_a_control_that_is_not_reproduced_stops_the_sweep(lab: Lab) -> None:
    good = by_name(lab.run(spec_text()))["control (hessian_lambda = 0)"].result["bpb"]
    lab.run(spec_text() + f"[gates]\ncontrol_bpb = {good}\ntolerance = 1e-6\n", "good")
    with pytest.raises(VerificationError, match=r"control_bpb says"):
        lab.run(spec_text() + f"[gates]\ncontrol_bpb = {good + 0.01}\n", "bad")


def test_an_axis_that_only_gets_worse_is_left(lab: Lab) -> None:
    text = 'question = "?"\nnoise_repeats = 0\ngates.stop_if_monotone_worse = 2\n[each]\nmatrices.bits = [6, 4, 3, 2]'
    rows = by_name(lab.run(spec_text(text)))
    values = [
        rows[name].result["screen"].get("difference_bpb", 0.0)
        for name in [next(iter(rows)), "matrices.bits = 4", "matrices.bits = 3"]
    ]
    assert values == sorted(values)
    assert "stopped" in rows["matrices.bits = 2"].result


# ---- failures and changes --------------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_a_row_and_the_others_go_on(lab: Lab) -> None:
    text = spec_text(LAMBDAS) + '[[trials]]\nname = "no such"\ncheckpoint = "nowhere"\n'
    text += '[[trials]]\nname = "too much text"\ncalibration.seq_len = 100000000\n'
    state = lab.run(text)
    rows = by_name(state)
    assert "nowhere" in rows["no such"].result["error"]
    assert "tokens" in rows["too much text"].result["error"]
    assert rows["hessian_lambda = 0.6"].verdict
    assert not state.open
    assert "error: " in markdown(state, "lab")
    again = lab.run(text, retry_before=iso_utc())
    assert by_name(again)["no such"].created > rows["no such"].created
    assert by_name(again)["hessian_lambda = 0.6"].created == rows["hessian_lambda = 0.6"].created


def test_an_unforeseen_exception_leaves_its_traceback_in_the_row(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is foreseen says all in its message and leaves none."""
    make = quantizers.ByPlan.make

    def broken(self: quantizers.ByPlan, request: quantizers.Request) -> quantizers.Made:
        if request.settings.set.get("*.hessian_lambda") == 0.6:
            raise ZeroDivisionError("of all things")
        return make(self, request)

    monkeypatch.setattr(quantizers.ByPlan, "make", broken)
    rows = by_name(lab.run(spec_text(LAMBDAS) + '[[trials]]\nname = "no such"\ncheckpoint = "nowhere"\n'))
    result = rows["hessian_lambda = 0.6"].result
    assert result["error"] == "ZeroDivisionError: of all things"
    assert "in broken" in result["traceback"]
    assert result["traceback"].startswith("Traceback")
    assert "traceback" not in rows["no such"].result
    assert "traceback" not in rows["hessian_lambda = 0.2"].result


def test_a_control_that_fails_ends_the_sweep(lab: Lab) -> None:
    with pytest.raises(PgolfError, match="the control failed"):
        lab.run(spec_text().replace("tokens = 320\n", "seq_len = 100000000\n", 1))


def test_trials_added_while_it_runs_are_run(lab: Lab) -> None:
    options = lab.options(spec_text())
    added = spec_text(LAMBDAS.replace("0.6]", "0.6, 0.9]"))

    def add(*_: object) -> None:
        options.spec.write_text(added, encoding="utf-8")

    state = run_local(options, on_row=add)
    assert "hessian_lambda = 0.9" in by_name(state)


def test_a_file_that_is_broken_while_it_runs_does_not_stop_it(lab: Lab) -> None:
    options = lab.options(spec_text())
    state = run_local(options, on_row=lambda *_: options.spec.write_text("question = ") and None)
    assert len(state.rows) == 5


def test_a_trial_that_another_process_has_is_left_to_it(lab: Lab) -> None:
    from pgolf_post.sweep.claims import claim
    from pgolf_post.sweep.run import _take_one

    sweep = Sweep(lab.options(spec_text()))
    state = sweep.state()
    with claim(sweep.options.places.results / "claims", state.listed[0].id) as mine:
        assert mine
        assert not _take_one(sweep, state, None)  # everything else needs the control
    assert _take_one(sweep, state, None)
    work(sweep)
    sweep.close()


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_blends_are_trials(lab: Lab) -> None:
    """The EMA with a share of 1 is the control's very weights; a real blend is swa-blend's."""
    from pgolf_post.average.linear import linear_blend, swa_parts

    text = 'question = "?"\nnoise_repeats = 0\n[[trials]]\nname = "all EMA"\nblend.ema_share = 1.0\n'
    text += '[[trials]]\nname = "half"\nblend.ema_share = 0.5\n'
    rows = by_name(lab.run(spec_text(text)))
    assert rows["all EMA"].verdict == "no-op"
    final = Checkpoint.open(lab.root / "latest")
    blend = linear_blend(swa_parts(final, 0.5))
    from pgolf_post.checkpoint import view_id

    assert rows["half"].result["checkpoint_id"] == view_id(blend.tensors, final.config)
    with Ledger.open(lab.root) as ledger:
        made = ledger.get("checkpoint", rows["half"].result["checkpoint_id"])
    assert made is not None
    assert set(made.parents) == {part.checkpoint.view_id(part.view) for part in blend.parts}


def test_training_is_a_first_stage(lab: Lab, pico_data: DataFolder) -> None:
    """A pico recipe of a few steps is trained by the trainer, once, and its checkpoint feeds the later stages."""
    from tests.conftest import pico_recipe, write_recipe

    recipe = write_recipe(pico_recipe(pico_data, lab.root), lab.folder / "recipe.toml")
    text = 'question = "?"\nnoise_repeats = 0\n[[trials]]\nname = "short"\n'
    text += f'train = {{recipe = "{recipe}", steps = 4, set = ["checkpoint.fractions=[]"]}}\n'
    rows = by_name(lab.run(spec_text(text)))
    row = rows["short"]
    assert "error" not in row.result, row.result
    assert row.result["stage_seconds"]["train"] > 0
    run = next(lab.root.glob("lab.short_*"))
    final = Checkpoint.open(max(run.glob("step_*-final")))
    assert final.meta["step"] == 4
    assert final.meta["recipe"]["run"]["why"] == "? (short)"
    assert row.result["checkpoint_id"] == final.view_id()
    with Ledger.open(lab.root) as ledger:
        trained = ledger.get("run", f"run:{run.name}")
        checkpoint = ledger.get("checkpoint", final.view_id())
    assert trained is not None
    assert (trained.name, trained.command) == ("lab/short", None)  # the sweep's row, and not the trainer's own
    assert checkpoint is not None
    assert trained.id in checkpoint.parents
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    twice = text + '[[trials]]\nname = "short, k = 11"\nmatrices.clip = 11\n' + text.split("\n")[-2] + "\n"
    again = by_name(lab.run(spec_text(twice), "twice"))
    assert again["short, k = 11"].result["checkpoint_id"] == final.view_id()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


STOPPING = """
question = "?"
noise_repeats = 0
[[trials]]
name = "worse"
train = {recipe = "RECIPE", set = ["checkpoint.fractions=[]"]}
[[trials]]
name = "worse, k = 11"
matrices.clip = 11
train = {recipe = "RECIPE", set = ["checkpoint.fractions=[]"]}
"""


@pytest.mark.long
def test_a_training_that_stops_early_is_a_finished_trial(
    lab: Lab, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its numbers and no score, ends after the scored ones, and is trained once, not resumed to its end."""
    from tests.conftest import pico_recipe, write_recipe

    log = lab.folder / "better.log"
    log.write_text("\n".join(f"step:{step}/12 train_loss:0.5 train_time:{step}ms" for step in range(1, 13)))
    stop = {"against": str(log), "at": [0.5]}
    recipe = write_recipe(pico_recipe(pico_data, lab.root, stop=stop), lab.folder / "recipe.toml")
    run, trainings = training.run_trainer, []
    monkeypatch.setenv("RANK", "7")  # of a sweep under torchrun, whose trainings are alone
    monkeypatch.setattr(training, "run_trainer", lambda *a: trainings.append(a[2]) or run(*a))
    state = lab.run(spec_text(STOPPING.replace("RECIPE", str(recipe))))
    rows = by_name(state)
    assert len(trainings) == 1
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & trainings[0].keys()
    for row in (rows["worse"], rows["worse, k = 11"]):
        assert (row.verdict, "error" in row.result, "screen" in row.result) == ("stopped early", False, False)
        assert row.result["at_stop"]["step"] == row.result["at_stop"]["at"] == 6
        assert row.result["at_stop"]["difference"] > 0.01
        assert row.result["at_stop"]["bpb"] > 0
        assert row.result["stopped_early"] == row.conclusion
        with Ledger.open(lab.root) as ledger:
            assert ledger.get("checkpoint", row.parents[0]) is not None
    assert [row.name for row in ranked(state)][-2:] == ["worse", "worse, k = 11"]
    assert "stopped early: train_loss" in markdown(state, "lab")


def test_a_control_that_stops_early_is_an_error(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Checkpoint.open(lab.root / "latest")
    stopped.meta["stopped_early"] = {"reason": "worse by 0.05", "at": 6.0}

    def stop(*_: object) -> None:
        raise training.TrainingStoppedError(stopped)

    monkeypatch.setattr("pgolf_post.sweep.weights.trained", stop)
    text = 'question = "?"\nnoise_repeats = 0\ntrain = {recipe = "R.toml"}\n[grid]\n"*.hessian_lambda" = [0, 0.2]\n'
    (lab.folder / "R.toml").write_text("[run]\nname = 'r'\n")
    monkeypatch.chdir(lab.folder)
    with pytest.raises(PgolfError, match=r"the control failed.*worse by 0\.05.*compared with it"):
        lab.run(spec_text(text))


def test_smoke_is_asked_of_recipes_that_are_still_to_be_trained(
    lab: Lab, pico_data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import pico_recipe, write_recipe

    recipe = write_recipe(pico_recipe(pico_data, lab.root), lab.folder / "recipe.toml")
    options, asked = lab.options(spec_text(STOPPING.replace("RECIPE", str(recipe)))), []
    codes = {"returncode": 4}

    def run(command: list[str], **_: object) -> object:
        asked.append(command[-2:])
        return subprocess.CompletedProcess(command, codes["returncode"], "", "error: no such thing")

    monkeypatch.setattr(smoke.subprocess, "run", run)
    with pytest.raises(VerificationError, match="has not passed its smoke ladder") as caught:
        smoke.require_smoke(options)
    assert f"python -m trainer {recipe} --smoke" in str(caught.value.hint)
    codes["returncode"] = 0
    smoke.require_smoke(options)
    assert asked == [[str(recipe), "--smoke-passed"]] * 2  # one recipe, though two trials train it
    codes["returncode"] = 2
    with pytest.raises(PgolfError, match="no such thing"):
        smoke.require_smoke(options)
    monkeypatch.setattr(smoke, "find_trained", lambda *_: object())
    smoke.require_smoke(options)
    assert len(asked) == 3
    monkeypatch.setattr(smoke.torch.cuda, "is_available", lambda: True)
    assert [smoke.num_gpus(8), smoke.num_gpus(4, 0.0), smoke.num_gpus(4, 0.5)] == [8, 0, 2]


def test_a_table_ranks_and_is_written(lab: Lab, tmp_path: Path) -> None:
    state = lab.run(spec_text())
    order = [
        row.result["screen"].get("difference_bpb", 0.0) for row in ranked(state) if row.settings["role"] != "noise"
    ]
    assert order == sorted(order)
    paths = save(state, tmp_path / "out", "lab")
    assert [path.name for path in paths] == ["table.md", "table.csv"]
    text = paths[0].read_text()
    assert all(row.name in text for row in state.rows.values())
    assert len(paths[1].read_text().splitlines()) == 1 + len(state.rows)


def test_two_sweeps_share_a_trial_under_their_own_names(lab: Lab) -> None:
    lab.run(spec_text())
    text = 'question = "k?"\nnoise_repeats = 1\n[grid]\nmatrices.clip = [11.0, 12.85]'
    state = lab.run(spec_text(text), "clips")
    row = by_name(state)["control (matrices.clip = 12.85)"]
    assert row.settings["changes"] == {"matrices.clip": 12.85}
    with Ledger.open(lab.root) as ledger:
        kept = ledger.get("trial", row.id)
    assert kept is not None
    assert kept.name == "control (hessian_lambda = 0)"


def test_cost_is_recorded(lab: Lab) -> None:
    rows: list[Row] = list(lab.run(spec_text(), dollars_per_hour=3600.0).rows.values())
    assert all(row.cost_dollars == pytest.approx(row.seconds, abs=1e-5) for row in rows)
