"""The audit passes what is legal and catches what is planted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.base.storage import read_json, sha256_file, write_json
from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.data.shards import read_shard, write_shard
from pgolf_post.errors import VerificationError
from pgolf_post.score.audit import screening
from pgolf_post.score.audit.behaviour import audit_behaviour
from pgolf_post.score.audit.causality import Audited, earlier_than
from pgolf_post.score.audit.findings import Finding, require_passed
from pgolf_post.score.audit.text import audit_text
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.nats import Observer
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import Protocol, folder_text
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.ttt.chunks import ChunkPass
from tests.score.conftest import Bench, record_model, ttt

pytestmark = pytest.mark.slow

PLAIN = PlainProtocol(seq_len=32, tail="score")
PROTOCOLS: dict[str, Any] = {
    "plain": PLAIN,
    "sliding": SlidingProtocol(seq_len=32, stride=8, tail="score"),
    "sgd": ttt("sgd"),
    "scales": ttt("scales"),
    "lora": ttt("lora"),
    "phased": ttt("phased", "phases=[2,4]"),
}
IN_LONG = ("scales", "lora")  # sgd and phased run the same loops


@pytest.fixture
def bench(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The pico model on 300 tokens, screened in a quarter of the runs: planted faults here are not rare."""
    monkeypatch.setattr(screening, "LEARNING_RUNS", 4)
    return replace(bench, tokens=bench.tokens[:300], token_bytes=bench.token_bytes[:300])


def outcome(bench: Bench, protocol: Protocol, isolates: bool = False, **changes: Any) -> dict[str, Finding]:
    """Test → finding, on the bench's text."""
    audited = replace(Audited.of(bench.module, bench.family, isolates, protocol), **changes)
    power = 0.1 if protocol.protocol == "ttt" else 0.5  # what trains takes long
    return {finding.test: finding for finding in audit_behaviour(audited, bench.tokens, 2, 1, power)}


def failures(findings: dict[str, Finding]) -> set[str]:
    return {test for test, finding in findings.items() if finding.passed is False}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in IN_LONG else []) for name in PROTOCOLS]
)
def test_our_protocols_pass(bench: Bench, name: str) -> None:
    protocol = PROTOCOLS[name]
    findings = outcome(bench, protocol)
    assert not failures(findings), findings
    assert findings["flip"].passed
    learns = protocol.protocol == "ttt"
    assert findings["score before update"].passed is (True if learns else None)


def test_documents_that_are_isolated_pass(bench: Bench) -> None:
    bench.module = record_model(isolate_documents=True)
    findings = outcome(bench, PLAIN, isolates=True)
    assert findings["document isolation"].passed
    assert not failures(findings)


# ---- planted faults --------------------------------------------------------------------------------------------------


class Wrapped:
    """A model with one thing changed."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Peeking(Wrapped):
    """Each position adds a little of the next token's embedding."""

    def hidden(self, tokens: Tensor) -> Tensor:
        hidden = self.module.hidden(tokens)
        following = self.module.tok_emb(tokens.roll(-1, dims=1))
        following[:, -1] = 0
        peeked: Tensor = hidden + 0.01 * following
        return peeked


class Unnormalised(Wrapped):
    """Probabilities that are a mixture with something that was never divided by its sum."""

    def log_probs(self, hidden: Tensor) -> Tensor:
        return torch.logaddexp(F.log_softmax(self.module.logits(hidden), -1), torch.tensor(-12.0))


def test_a_model_that_peeks_is_caught(bench: Bench) -> None:
    bench.module = Peeking(bench.module)
    for protocol in (PLAIN, ttt("sgd")):
        findings = outcome(bench, protocol)
        assert "flip" in failures(findings)
        assert "its own distribution by" in findings["flip"].evidence


def test_a_smear_across_bos_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.module = record_model(isolate_documents=True)
    with torch.no_grad():
        bench.module.smear_lambda.fill_(0.7)
    assert not failures(outcome(bench, PLAIN, isolates=True))
    original = type(bench.module)._embed

    def careless(self: Any, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens)
        gate = torch.sigmoid(F.linear(x[:, 1:, : self.config.gate_window], self.smear_gate))
        x = torch.cat((x[:, :1], x[:, 1:] + self.smear_lambda * gate * x[:, :-1]), dim=1)
        return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)

    inner = torch.arange(2, 20)[None]
    assert torch.allclose(careless(bench.module, inner), original(bench.module, inner), atol=1e-6)
    monkeypatch.setattr(type(bench.module), "_embed", careless)
    assert failures(outcome(bench, PLAIN, isolates=True)) == {"document isolation"}


def test_a_loop_that_trains_before_scoring_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ChunkPass.step

    def asks_first(self: ChunkPass, index: int) -> None:
        self.learn(index)
        original(self, index)

    monkeypatch.setattr(ChunkPass, "step", asks_first)
    findings = outcome(bench, ttt("sgd"))
    assert "score before update" in failures(findings)
    assert findings["weights restored"].passed


def test_a_loop_that_trains_before_scoring_behind_the_logs_back_is_caught(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ChunkPass.step

    def takes_first(self: ChunkPass, index: int) -> None:
        honest = self.log.hand_out
        self.log.hand_out = lambda a, b: self.log.tokens[a:b].astype(np.int64)  # type: ignore[method-assign]
        self.learn(index)
        self.log.hand_out = honest  # type: ignore[method-assign]
        original(self, index)

    monkeypatch.setattr(ChunkPass, "step", takes_first)
    assert {"flip", "truncation"} <= failures(outcome(bench, ttt("sgd", "learning_rate=0.05")))


@pytest.mark.parametrize("name", ["plain", pytest.param("lora", marks=pytest.mark.long)])
def test_an_unnormalised_head_is_caught(bench: Bench, name: str) -> None:
    bench.module = Unnormalised(bench.module)
    assert failures(outcome(bench, PROTOCOLS[name])) == {"sum to one"}


def test_a_doubled_leading_space_is_caught(pico_data: DataFolder) -> None:
    tokens, token_bytes = folder_text(pico_data, PlainProtocol(seq_len=16))
    honest = {finding.test: finding for finding in audit_text(pico_data, "val", tokens, token_bytes)}
    assert honest["implied bytes"].passed
    assert honest["BOS count"].passed
    table = pico_data.byte_table
    doubled = table.count(np.concatenate([tokens[:1], tokens[:-1]]), tokens) + table.has_leading_space[tokens]
    wrong = {finding.test: finding for finding in audit_text(pico_data, "val", tokens, doubled)}
    assert wrong["implied bytes"].passed is False
    assert wrong["BOS count"].passed


def test_a_forged_sidecar_is_caught(pico_data: DataFolder, tmp_path: Path) -> None:
    """Bytes moved between tokens: the total, which the manifest states, is the same."""
    forged = sidecar_folder(pico_data, tmp_path / "honest")
    assert implied_bytes(forged).passed, implied_bytes(forged).evidence
    counts = read_shard(tmp_path / "honest" / "fineweb_val_bytes_000000.bin").copy()
    counts[[10, 400]] += np.array([1, -1]).astype(np.uint16)
    write_shard(tmp_path / "honest" / "fineweb_val_bytes_000000.bin", counts)
    finding = implied_bytes(forged)
    assert finding.passed is False
    assert "sha256: 1 of 2 files are not those recorded: fineweb_val_bytes_000000.bin" in finding.evidence

    # the recorded hash forged along with it: bytes on BOS, which stands for none
    tokens = folder_text(forged, PlainProtocol(seq_len=16))[0]
    counts[np.flatnonzero(tokens == BOS_ID)[1]] += 1
    counts[20] -= 1
    write_shard(tmp_path / "honest" / "fineweb_val_bytes_000000.bin", counts)
    finding = implied_bytes(record_sidecar(forged.path))
    assert finding.passed is False
    assert "BOS tokens stand for bytes" in finding.evidence


def implied_bytes(folder: DataFolder) -> Finding:
    return audit_text(folder, "val", *folder_text(folder, PlainProtocol(seq_len=16)))[0]


def sidecar_folder(data: DataFolder, path: Path) -> DataFolder:
    """A copy of a data folder whose validation bytes are in a sidecar."""
    shutil.copytree(data.path, path)
    tokens, counts = folder_text(data, PlainProtocol(seq_len=16))
    assert len(tokens) > 400
    write_shard(path / "fineweb_val_bytes_000000.bin", counts.astype(np.uint16))
    return record_sidecar(path)


def record_sidecar(path: Path) -> DataFolder:
    manifest = read_json(path / "manifest.json")
    sidecar = path / "fineweb_val_bytes_000000.bin"
    entry = {"file": sidecar.name, "sha256": sha256_file(sidecar), "num_tokens": len(read_shard(sidecar))}
    manifest["splits"]["val"]["byte_sidecars"] = [entry]
    write_json(path / "manifest.json", manifest)
    return DataFolder.open(path)


# ---- what else it must notice ----------------------------------------------------------------------------------------


def test_a_missing_bos_is_noticed(pico_data: DataFolder) -> None:
    tokens, token_bytes = folder_text(pico_data, PlainProtocol(seq_len=16))
    without = tokens.copy()
    without[np.flatnonzero(tokens == BOS_ID)[2]] = 5
    assert not audit_text(pico_data, "val", without, token_bytes)[1].passed
    assert not audit_text(pico_data, "val", without[1:], token_bytes[1:])[1].passed


def test_a_score_that_is_not_the_distributions_is_noticed(bench: Bench) -> None:
    honest = Audited.of(bench.module, bench.family, False, PLAIN).run

    def flattering(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log = honest(tokens, observer)
        log.nats *= 0.99
        return log

    assert failures(outcome(bench, PLAIN, run=flattering)) == {"sum to one"}


def test_a_target_left_out_is_noticed(bench: Bench) -> None:
    honest = Audited.of(bench.module, bench.family, False, PLAIN).run

    def forgetful(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log = honest(tokens, observer)
        log.turn[100] = -1
        return log

    assert "score once" in failures(outcome(bench, PLAIN, run=forgetful))


def test_weights_left_behind_are_noticed(bench: Bench) -> None:
    honest = Audited.of(bench.module, bench.family, False, PLAIN).run

    def messy(tokens: np.ndarray, observer: Observer | None) -> CommitLog:
        log = honest(tokens, observer)
        with torch.no_grad():
            bench.module.skip_weights.add_(1e-7)
        return log

    assert "weights restored" in failures(outcome(bench, PLAIN, run=messy))


def test_earlier_is_by_scoring_order(bench: Bench) -> None:
    log = bench.log(ttt("lora"), Session())
    place = int(np.flatnonzero(log.turn == 3)[0])
    early = earlier_than(log, place)
    assert set(np.flatnonzero((log.turn >= 0) & (log.turn < 3))) <= set(early.tolist())
    assert (early > place).any()  # longer documents come first, wherever they stand


def test_failures_are_named() -> None:
    findings = [Finding("flip", True, ""), Finding("ledger", None, ""), Finding("sum to one", False, "")]
    with pytest.raises(VerificationError, match="x fails 1 of 3 tests: sum to one"):
        require_passed(findings, "x")
    require_passed(findings[:2], "x")
