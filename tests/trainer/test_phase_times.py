"""Every second of a run is in one phase, and the training seconds are the schedule's."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf_post.checkpoint import Checkpoint, list_checkpoints
from pgolf_post.data import DataFolder
from pgolf_post.errors import PgolfError
from tests.conftest import pico_recipe
from trainer.run import phase_times as ledger_file
from trainer.run.loop import Trainer
from trainer.run.phase_times import (
    MEANING,
    PHASE_TIMES_FILE,
    READS_TRAINING_DATA,
    PhaseTimes,
    TrainingPhase,
    show_phase_times,
    write_phase_times,
)


class Clock:
    """time.perf_counter, told when to move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(ledger_file.time, "perf_counter", lambda: self.now)


@given(names=st.lists(st.sampled_from(sorted(MEANING)), max_size=6), depth=st.integers(0, 6))
def test_phases_never_count_a_second_twice(names: list[TrainingPhase], depth: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock, ledger = Clock(patch), PhaseTimes()

        def nested(rest: list[TrainingPhase]) -> None:
            clock.now += 1.0
            if rest:
                with ledger.phase(rest[0]):
                    nested(rest[1:])
                    assert sum(ledger.so_far().values()) <= clock.now  # open phases count already
                    clock.now += 1.0

        nested(names[:depth])
        nested(names[depth:])
        facts = ledger.as_facts()
    assert facts["other_seconds"] == 2.0 if names[:depth] and names[depth:] else facts["other_seconds"] >= 1.0
    assert sum(ledger.seconds.values()) + facts["other_seconds"] == facts["wall_seconds"] == clock.now
    assert ledger.seconds == {name: 2.0 * names.count(name) for name in ledger.seconds}


def test_a_phase_that_fails_counts_and_another_clocks_seconds_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ledger = Clock(monkeypatch), PhaseTimes()

    def fail() -> None:
        with ledger.phase("checkpoint"):
            clock.now += 5.0
            ledger.add("scoring", 2.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (ledger.seconds["checkpoint"], ledger.seconds["scoring"]) == (3.0, 2.0)


def test_a_resumed_ledger_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, first = Clock(monkeypatch), PhaseTimes()
    first.add("train_plain", 3.0)
    clock.now = 4.0
    second = PhaseTimes()
    second.resume(json.loads(json.dumps(first.as_facts())))
    clock.now = 5.0
    facts = second.as_facts(cap_seconds=600.0)
    assert (facts["phases"]["train_plain"]["seconds"], facts["wall_seconds"], facts["other_seconds"]) == (3.0, 5.0, 2.0)
    assert (facts["training_data_seconds"], facts["cap_seconds"]) == (3.0, 600.0)


def test_a_runs_ledger_is_in_its_checkpoints_its_folder_and_on_the_terminal(
    tmp_path: Path, pico_data: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    final = Trainer(pico_recipe(pico_data, tmp_path, schedule={"seconds": 1e6})).run()
    shown = capsys.readouterr().err
    ledgers = [checkpoint.meta["ledger"] for checkpoint in list_checkpoints(tmp_path)]
    ledgers.append(json.loads((tmp_path / "pico" / PHASE_TIMES_FILE).read_text()))
    for facts, later in pairwise(ledgers):
        assert all(seconds["seconds"] <= later["phases"][name]["seconds"] for name, seconds in facts["phases"].items())
    facts = ledgers[-1]
    assert facts["training_data_seconds"] == pytest.approx(final.meta["train_seconds"], abs=2e-3)
    assert {name for name, row in facts["phases"].items() if row["reads_training_data"]} == READS_TRAINING_DATA
    assert all(row["seconds"] > 0 for row in facts["phases"].values())
    total = sum(row["seconds"] for row in facts["phases"].values()) + facts["other_seconds"]
    assert total == pytest.approx(facts["wall_seconds"], abs=0.01)
    for words in ("where the time went", "train_looped", "scoring", "cap 1,000,000.0 s", "left"):
        assert words in shown


def test_training_seconds_are_split_where_the_loops_start(pico_checkpoint: Checkpoint) -> None:
    before = Checkpoint.open(next(pico_checkpoint.path.parent.glob("*loops_on"))).meta["ledger"]["phases"]
    after = pico_checkpoint.meta["ledger"]["phases"]
    assert before["train_looped"]["seconds"] == 0.0
    assert before["train_plain"] == after["train_plain"]
    assert after["train_looped"]["seconds"] > 0.0


def test_a_cap_that_was_overrun_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = PhaseTimes()
    ledger.add("train_plain", 601.5)
    show_phase_times(ledger.as_facts(cap_seconds=600.0))
    assert "cap 600.0 s: 1.5 s OVER" in capsys.readouterr().err


def test_a_ledger_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PgolfError, match="the phase times: could not write"):
        write_phase_times(tmp_path / "file" / PHASE_TIMES_FILE, PhaseTimes().as_facts())
