"""A stopped pass is kept, goes on where it stopped, and ends with the number of an undisturbed one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from pgolf_post.errors import DamagedFileError
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.session import Session, StoppedError
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.spans import SpanPass
from pgolf_post.score.ttt.chunks import ChunkPass
from pgolf_post.score.ttt.lora import LoraPass
from pgolf_post.score.ttt.phased import PhasedPass
from pgolf_post.score.ttt.weights import weights_sha256
from tests.score.conftest import Bench, ttt

pytestmark = pytest.mark.slow

PASSES: list[Any] = [
    (SlidingProtocol(seq_len=32, stride=8, tail="score"), SpanPass),
    (ttt("sgd", "chunk_tokens=80", "optimizer=adamw", "learning_rate=0.01"), ChunkPass),
    pytest.param(ttt("sgd", "chunk_tokens=80"), ChunkPass, marks=pytest.mark.long),  # has less state than the others
    (ttt("sgd", "chunk_tokens=80", "optimizer=muon"), ChunkPass),
    (ttt("lora", "lanes=2", "batch_documents=2"), LoraPass),
    (ttt("phased"), PhasedPass),
]


def session_at(path: Path, **changes: Any) -> Session:
    return Session(partial=path / "some.partial.safetensors", identity="this", **changes)


@pytest.mark.parametrize(("protocol", "kind"), PASSES)
def test_an_interrupted_pass_ends_with_the_same_nats(
    bench: Bench, tmp_path: Path, protocol: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf_post.score.protocols.BATCH_TOKENS", 256)
    whole = bench.log(protocol)
    before = weights_sha256(bench.module)
    original = kind.step
    calls = []

    def step(self: Any, index: int) -> None:
        calls.append(index)
        original(self, index)
        if len(calls) in (2, 4):
            os.kill(os.getpid(), signal.SIGINT)  # a real Ctrl-C

    monkeypatch.setattr(kind, "step", step)
    for _ in range(2):
        with pytest.raises(StoppedError, match=r"interrupted with .* targets scored") as caught:
            bench.log(protocol, session_at(tmp_path))
        assert caught.value.exit_code == 130
        assert "run the same command again" in str(caught.value.hint)
        assert weights_sha256(bench.module) == before
    again = bench.log(protocol, session_at(tmp_path))
    assert np.array_equal(again.nats, whole.nats)
    assert again.handed_out == whole.handed_out
    assert calls == list(range(len(calls)))  # nothing was done twice
    assert not (tmp_path / "some.partial.safetensors").exists()


def test_a_spent_budget_keeps_what_was_done(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pgolf_post.score.protocols.BATCH_TOKENS", 256)
    protocol = SlidingProtocol(seq_len=32, stride=8)
    whole = bench.log(protocol)
    clock = PhaseTimes(10.0)
    clock.seconds["load"] = 7.0
    original = SpanPass.step

    def step(self: SpanPass, index: int) -> None:
        original(self, index)
        clock.seconds["load"] += 1.1

    monkeypatch.setattr(SpanPass, "step", step)
    with pytest.raises(StoppedError, match=r"the time budget of 10 s is spent with [1-9]") as caught:
        bench.log(protocol, session_at(tmp_path, clock=clock))
    assert caught.value.exit_code == 1
    assert "--time-budget" in str(caught.value.hint)
    assert "warning: 8 s of the budget's 10 s" in capsys.readouterr().err
    monkeypatch.setattr(SpanPass, "step", original)
    later = PhaseTimes(100.0)
    assert np.array_equal(bench.log(protocol, session_at(tmp_path, clock=later)).nats, whole.nats)
    assert later.strict > 10.0  # the earlier part counts


def test_partial_results_of_something_else_are_left_alone(bench: Bench, tmp_path: Path) -> None:
    protocol = SlidingProtocol(seq_len=32, stride=8)
    whole = bench.log(protocol)
    spent = PhaseTimes(1.0)
    spent.seconds["load"] = 2.0
    with pytest.raises(StoppedError):
        bench.log(protocol, session_at(tmp_path, clock=spent))
    with safe_open(tmp_path / "some.partial.safetensors", "pt") as file:  # under the names of files kept before
        assert sorted(file.keys()) == ["ledger.lessons", "ledger.nats", "ledger.turn", "ledger.turns"]
    other = session_at(tmp_path)
    other.identity = "that"
    assert np.array_equal(bench.log(protocol, other).nats, whole.nats)
    (tmp_path / "some.partial.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DamagedFileError, match="not a kept pass"):
        bench.log(protocol, session_at(tmp_path))


def test_the_clock_adds_up() -> None:
    clock = PhaseTimes()
    for name in ("load", "score", "adapt", "score"):
        with clock.phase(name):  # type: ignore[arg-type]
            pass
    clock.seconds.update(load=1.0, score=2.0, adapt=4.0, compile=8.0)
    assert clock.strict == 15.0
    assert clock.by_convention == 6.0
    assert clock.facts()["compile_seconds"] == 8.0
    assert not clock.over_budget()
