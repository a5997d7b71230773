"""Test-time training on several processes: one number whatever their number, and the order of it provable."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.base.ranks import Ranks
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import get_family, load_module
from pgolf_post.score.audit.commits import scored_before_update, scored_once
from pgolf_post.score.commits import CommitError, CommitLog
from pgolf_post.score.protocols import folder_text, run_protocol
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.documents import deal
from tests import processes
from tests.score.conftest import Bench, ttt

pytestmark = pytest.mark.slow

PROTOCOLS = {
    "sgd": ttt("sgd", max_tokens=300),
    "scales": ttt("scales", "optimizer=adamw", max_tokens=300),
    "lora": ttt("lora", "lanes=3", max_tokens=600),
    "one lane": ttt("lora", "lanes=1", max_tokens=300),
    "phased": ttt("phased", "lanes=2", max_tokens=600),
}

SCRIPT = """
import pickle
import sys
from pathlib import Path

import numpy as np

from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import get_family, load_module
from pgolf_post.base.ranks import Ranks, end_process
from pgolf_post.score.protocols import folder_text, run_protocol
from pgolf_post.score.session import Session

ranks = Ranks.join()
view, data = Checkpoint.open(Path(sys.argv[1])).load(), DataFolder.open(Path(sys.argv[2]))
for name, protocol in pickle.loads(Path(sys.argv[3]).read_bytes()).items():
    module = load_module(view.config, view.tensors, "test")
    tokens = folder_text(data, protocol)[0]
    for run in range(2):  # twice: the number must come again
        log, work = run_protocol(module, get_family("golf_gpt"), tokens, protocol, Session(ranks=ranks))
        steps = work.facts()["optimizer_steps"]
        if ranks.is_main:
            lessons = [(x.turn, x.start, x.stop) for x in log.handed_out]
            out = f"{sys.argv[4]}/{name}.{run}.npz"
            np.savez(out, nats=log.nats, turn=log.turn, lessons=lessons, steps=steps)
ranks.leave()
end_process(0)
"""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, pico_run_original: Path, pico_data: DataFolder) -> Path:
    """A folder with what two real processes make of every protocol."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "protocols.pickle").write_bytes(pickle.dumps(PROTOCOLS))
    paths = [str(x) for x in (pico_run_original / "latest", pico_data.path, folder / "protocols.pickle", folder)]
    done = processes.run_ranks(2, "-c", SCRIPT, *paths)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def text_bench(pico_run_original: Path, pico_data: DataFolder) -> Bench:
    view = Checkpoint.open(pico_run_original / "latest").load()
    module = load_module(view.config, view.tensors, "test")
    tokens, counts = folder_text(pico_data, ttt("sgd"))
    return Bench(module, get_family("golf_gpt"), tokens, counts)


def merged(folder: Path, name: str, tokens: np.ndarray, run: int = 0) -> tuple[CommitLog, int]:
    """The merged log of two ranks, as an audit would read it, and the steps they took together."""
    arrays = np.load(folder / f"{name}.{run}.npz")
    log = CommitLog(tokens, len(tokens) - 1)
    turns = np.array([int(arrays["turn"].max()) + 1])
    log.load_state({"nats": arrays["nats"], "turn": arrays["turn"], "turns": turns, "lessons": arrays["lessons"]})
    return log, int(arrays["steps"])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_ranks_give_one_number(on_two_ranks: Path, text_bench: Bench, name: str) -> None:
    protocol = PROTOCOLS[name]
    tokens = text_bench.tokens[: protocol.max_tokens]
    alone, work = run_protocol(text_bench.module, text_bench.family, tokens, protocol, Session())
    two, steps = merged(on_two_ranks, name, tokens)
    again, _ = merged(on_two_ranks, name, tokens, run=1)
    assert np.array_equal(two.nats, again.nats)
    assert steps == work.facts()["optimizer_steps"] > 0
    if name in ("lora", "one lane"):
        assert np.array_equal(two.nats, alone.nats)  # weights do not learn: no sum over ranks
    else:
        np.testing.assert_allclose(two.nats, alone.nats, atol=0.01)  # AdamW without momentum turns rounding into steps
        assert two.nats.sum() == pytest.approx(alone.nats.sum(), rel=1e-5)
    assert {(x.start, x.stop) for x in two.handed_out} == {(x.start, x.stop) for x in alone.handed_out}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_merged_log_proves_the_order(on_two_ranks: Path, text_bench: Bench, name: str) -> None:
    log, _ = merged(on_two_ranks, name, text_bench.tokens[: PROTOCOLS[name].max_tokens])
    log.require_complete()
    assert scored_once(log).passed
    assert scored_before_update(log).passed, scored_before_update(log).evidence
    late = log.handed_out[-1]
    log.turn[late.stop - 1] = late.turn  # scored with the step, not before it
    assert scored_before_update(log).passed is False


def test_lanes_decide_the_number_and_ranks_do_not(bench: Bench) -> None:
    carried = bench.log(ttt("lora", "lanes=1", "learning_rate=0.05"))
    apart = bench.log(ttt("lora", "lanes=64", "learning_rate=0.05"))
    assert not np.array_equal(carried.nats, apart.nats)
    backwards = bench.log(ttt("lora", "lanes=64", "learning_rate=0.05"))
    assert np.array_equal(apart.nats, backwards.nats)


def test_lanes_are_dealt_evenly() -> None:
    assert deal([9.0, 5.0, 4.0, 4.0, 2.0], 2, []) == [0, 1, 1, 0, 1]
    assert deal([9.0, 5.0, 4.0], 1, [0]) == [0, 0, 0]
    assert deal([9.0, 5.0, 4.0, 4.0], 2, [0]) == [0, 0, 1, 1]  # after the first batch all begin together
    lanes = deal(list(np.linspace(100, 1, 64)), 8, [])
    loads = np.bincount(lanes, np.linspace(100, 1, 64))
    assert loads.max() < 1.1 * loads.mean()


class Two(Ranks):
    """Two ranks in one process: sums and maxima with what another log would send."""

    def __init__(self, others: list[Any]) -> None:
        super().__init__(0, 2, 0)
        object.__setattr__(self, "others", others)

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor += self.others.pop(0)  # type: ignore[attr-defined]

    def maximum_(self, tensor: torch.Tensor) -> None:
        torch.maximum(tensor, self.others.pop(0), out=tensor)  # type: ignore[attr-defined]


def test_what_another_rank_scored_is_handed_out_after_the_merge() -> None:
    log = CommitLog(np.array([1, 5, 6, 7, 8, 9], dtype=np.uint16), 5)
    log.commit(np.array([1, 2]), np.array([0.5, 0.25]))
    with pytest.raises(CommitError, match="token 3 has not been scored"):
        log.hand_out(1, 4)
    theirs = torch.tensor([0, 0, 0, 1, 0, 0])
    log.merge(Two([theirs, theirs * 2.0, theirs * 5 - 1, torch.tensor([6])]))
    assert log.nats.tolist() == [0, 0.5, 0.25, 2.0, 0, 0]
    assert log.hand_out(1, 4).tolist() == [5, 6, 7]
    assert log.handed_out[-1].turn == 6 > log.turn[3] == 4
    with pytest.raises(CommitError, match="target 3 would be scored twice"):
        log.commit(np.array([3]), np.ones(1))


def test_two_ranks_that_score_one_target_are_caught() -> None:
    log = CommitLog(np.array([1, 5, 6, 7, 8, 9], dtype=np.uint16), 5)
    log.commit(np.array([2]), np.ones(1))
    with pytest.raises(CommitError, match="target 2 was scored by 2 ranks"):
        log.merge(Two([torch.tensor([0, 0, 1, 0, 0, 0])]))


@pytest.mark.long  # the short run has an eval on several ranks in test_sliding.py
def test_the_command_on_two_ranks_keeps_one_score(pico_checkpoint: Checkpoint, pico_data: DataFolder) -> None:
    words = ["--protocol", "ttt", "--ttt", "lora", "--set", "rank=2", "--set", "alpha=4", "--set", "batch_documents=2"]
    words += ["--max-tokens", "300", "--data", str(pico_data.path), "--set", "chunk_tokens=16", "--json"]
    done = processes.run_ranks(2, "-m", "pgolf_post", "eval", str(pico_checkpoint.path), *words)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["optimizer_steps"] > 2
    assert answer["cached"] is False
    assert len(list((pico_checkpoint.path / "derived" / "score").glob("*/meta.json"))) == 1
