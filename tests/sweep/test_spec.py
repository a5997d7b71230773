"""Specs are strict, and stand for the trials that one would write by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgolf_post.errors import SettingsError
from pgolf_post.sweep.block_rules import trial_plan
from pgolf_post.sweep.conditions import check_condition, holds
from pgolf_post.sweep.expand import expand, read_spec
from pgolf_post.sweep.settings import SweepSpec
from pgolf_post.sweep.trials import Trial

SHIPPED = sorted((Path(__file__).parents[2] / "sweeps").glob("*.toml"))
NAMES = (
    "awq_alpha calibration_source codecs ema_length embed_bits fit_trellis hessian_sdclip_lambda lqer per_block_clip "
    "prune sdclip_k seeds_demo swa_vs_ema ttt_lr"
)


def trials_of(text: str, folder: Path, blocks: int = 3) -> list[Trial]:
    path = folder / "spec.toml"
    path.write_text(f'question = "?"\n{text}', encoding="utf-8")
    return expand(read_spec(path), lambda _: blocks)


def asked(trials: list[Trial]) -> list[str]:
    return [trial.name for trial in trials if trial.role in ("control", "trial")]


def test_the_shipped_specs_are_read() -> None:
    assert " ".join(path.stem for path in SHIPPED) == NAMES
    for path in SHIPPED:
        trials = expand(read_spec(path), lambda _: 4)
        assert trials[0].role == "control"
        for trial in trials:
            if "@" not in trial.name and trial.settings.method == "plan":
                trial_plan(trial.settings)


def test_a_grid_is_a_product_and_the_control_lies_on_it(tmp_path: Path) -> None:
    trials = trials_of("[grid]\nmatrices.clip = [11.5, 12.85]\nembedding.bits = [7, 8]", tmp_path)
    assert asked(trials) == [
        "control (matrices.clip = 12.85, embedding.bits = 8)",
        "matrices.clip = 11.5, embedding.bits = 7",
        "matrices.clip = 11.5, embedding.bits = 8",
        "matrices.clip = 12.85, embedding.bits = 7",
    ]
    assert [trial.role for trial in trials[:4]] == ["control", "baseline", "noise", "noise"]
    plan = trial_plan(trials[4].settings)
    assert {rule.name: getattr(rule, "clip", None) for rule in plan.rules}["matrices"] == 11.5


def test_each_varies_one_list_at_a_time(tmp_path: Path) -> None:
    trials = trials_of("[each]\nmatrices.clip = [11, 12]\nembedding.bits = [7]", tmp_path)
    assert asked(trials) == ["control", "matrices.clip = 11", "matrices.clip = 12", "embedding.bits = 7"]


def test_each_block_gets_a_rule_of_its_own(tmp_path: Path) -> None:
    trials = trials_of('[each]\n"matrices@each.clip" = [10.0]', tmp_path, blocks=2)
    assert asked(trials) == ["control", "matrices@0.clip = 10.0", "matrices@1.clip = 10.0"]
    rules = trial_plan(trials[-1].settings).rules
    split = next(rule for rule in rules if rule.name == "matrices-block1")
    assert (split.layers, split.clip) == ("1", 10.0)
    assert rules.index(split) < [rule.name for rule in rules].index("matrices")


def test_named_trials_change_settings_and_plan(tmp_path: Path) -> None:
    text = (
        '[[trials]]\nname = "x"\ncodec = "brotli"\nblend.ema_share = 0.5\n"*.damp" = 0.02\ncalibration.source = "self"'
    )
    trial = trials_of(text, tmp_path)[-1]
    assert (trial.settings.codec, trial.settings.calibration.source) == ("brotli", "self")
    assert trial.settings.blend is not None
    assert trial.settings.blend.ema_share == 0.5
    assert trial.settings.set == {"*.damp": 0.02}


def test_a_sweep_over_checkpoints_has_a_control_for_each(tmp_path: Path) -> None:
    trials = trials_of('checkpoints = ["a", "b"]\n[grid]\nmatrices.clip = [11]', tmp_path)
    assert [trial.group for trial in trials if trial.role == "control"] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grids = 1", "did you mean 'grid'"),
        ("[grid]\nmatrices.clop = [1]", "unknown key 'clop'"),
        ("[grid]\nmlp.clip = [1]", "no rule 'mlp'"),
        ("[grid]\nmatrices.clip = 3", "expected a list"),
        ('[grid]\n"calibration.sauce" = ["self"]', "calibration.sauce"),
        ('[grid]\n"calibration.source" = ["val"]', "validation text is refused"),
        ("[[trials]]\ncodec = 'none'", "has no name"),
        ("[grid]\ncodec = ['rans', 'zip']", "unknown codec 'zip'; valid codecs: none"),
        ("[set]\nsequential = true", "which a sweep's trials are not given"),
        ("[grid]\n'distill.steps' = [8]", "which a sweep's trials are not given"),
        ("[[trials]]\nname = 'a'\n[[trials]]\nname = 'a'", "used twice: a"),
        ("rank_by = 'ttt'", "no \\[stages.ttt\\]"),
        ("[stages.plain]\nonly_if = 'artefact_bytes < 3'", "no fact 'artefact_bytes'"),
        ("[train]\nrecipe = 'r'\nsteps = 3\nseconds = 3", "give one"),
        ("[ema]\nmax_error = 0.1", "sigma or half_life_steps"),
        ("[blend]\nema_share = 2", "less than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        trials_of(text, tmp_path)


def test_conditions_compare_facts_and_nothing_else() -> None:
    facts = {"headroom_bytes": 5.0, "budget_bytes": 100.0, "screen_low_bpb": None}
    assert holds("", facts)
    assert holds("headroom_bytes >= 0.05 * budget_bytes and not headroom_bytes > 5", facts)
    assert not holds("0 <= headroom_bytes < 5 or headroom_bytes == -5", facts)
    assert not holds("screen_low_bpb <= 0", facts)  # not known: its stage did not run
    for text in ("__import__('os')", "headroom_bytes.real > 0", "headroom_bytes >", "1 / 0 > 0", "'a' < 'b'"):
        with pytest.raises(SettingsError, match="only_if"):
            check_condition(text)


def test_a_spec_needs_something_to_rank_by() -> None:
    with pytest.raises(ValueError, match="no scoring stage"):
        SweepSpec(question="?", stages={"screen": None})  # type: ignore[arg-type]
