"""Test-time training laws: score first or not at all, a learning rate of 0 changes nothing, weights come back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf_post.errors import MismatchError, NumericsError, PgolfError, SettingsError, VerificationError
from pgolf_post.score.commits import CommitError, CommitLog
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import make_pass
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.ttt import lora, weights
from pgolf_post.score.ttt.adapters import Adapters
from pgolf_post.score.ttt.chunks import ChunkPass
from pgolf_post.score.ttt.documents import batch_by_length, find_documents
from pgolf_post.score.ttt.lora import LoraPass
from pgolf_post.score.ttt.methods import PRESETS, ttt_protocol
from pgolf_post.score.ttt.weights import restored, weights_sha256
from tests.score.conftest import Bench, plain_adapters, record_model, ttt

pytestmark = pytest.mark.slow

METHODS = ("sgd", "scales", "lora", "phased")


def small_log() -> CommitLog:
    return CommitLog(np.array([1, 5, 6, 7, 8, 9], dtype=np.uint16), 5)


def test_a_target_is_scored_once() -> None:
    log = small_log()
    log.commit(np.array([1, 2]), np.array([0.5, 0.25]))
    with pytest.raises(CommitError, match="target 2 would be scored twice"):
        log.commit(np.array([2, 3]), np.ones(2))
    with pytest.raises(CommitError, match="scored twice"):
        log.commit(np.array([3, 3]), np.ones(2))
    with pytest.raises(CommitError, match="no target"):
        log.commit(np.array([6]), np.ones(1))
    with pytest.raises(NumericsError, match="target 4"):
        log.commit(np.array([3, 4]), np.array([1.0, np.nan]))
    assert log.nats.sum() == 0.75
    with pytest.raises(CommitError, match="3 of 5 targets were never scored"):
        log.require_complete()


def test_only_scored_tokens_are_handed_out() -> None:
    log = small_log()
    with pytest.raises(CommitError, match="token 1 has not been scored"):
        log.hand_out(0, 3)
    log.commit(np.array([1, 2]), np.ones(2))
    assert log.hand_out(0, 3).tolist() == [1, 5, 6]
    with pytest.raises(CommitError, match="token 3 has not been scored"):
        log.hand_out(1, 4)
    log.commit(np.array([3, 4, 5]), np.ones(3))
    with pytest.raises(CommitError):
        log.hand_out(2, 9)
    assert [(taken.turn, taken.start, taken.stop) for taken in log.handed_out] == [(1, 0, 3)]


@pytest.mark.parametrize("method", ["sgd", "scales"])
def test_chunks_without_a_learning_rate_are_sliding(bench: Bench, method: str) -> None:
    still = bench.score(ttt(method, "learning_rate=0.0"))
    slid = bench.score(SlidingProtocol(seq_len=32, stride=16, tail="score"))
    assert still.nats == pytest.approx(slid.nats, rel=1e-6)
    moved = bench.score(ttt(method, "learning_rate=0.05"))
    assert abs(moved.nats - slid.nats) > 1e-2


@pytest.mark.parametrize("method", ["lora", "phased"])
def test_documents_without_a_learning_rate_are_scored_in_their_own_windows(bench: Bench, method: str) -> None:
    still = [f"{key}=0.0" for key in ("learning_rate", "global_lr")[: 1 + (method == "phased")]]
    log = bench.log(ttt(method, *still))
    tokens = torch.from_numpy(bench.tokens.astype(np.int64))
    for text in find_documents(bench.tokens, log.num_targets)[:5]:
        for offset in range(1, text.targets + 1, 7):
            end = -(-offset // 16) * 16  # the chunk's end; its window begins 32 before
            begin = text.start + max(0, end - 32)
            logits = bench.module(tokens[None, begin : text.start + offset])[0, -1].double()
            place = text.start + offset
            expected = float(torch.logsumexp(logits, 0) - logits[int(tokens[place])])
            assert log.nats[place] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_learning_acts_and_weights_come_back(bench: Bench, method: str) -> None:
    before = weights_sha256(bench.module)
    facts = bench.facts(ttt(method))
    assert facts["optimizer_steps"] > 0
    assert weights_sha256(bench.module) == before
    assert not any(parameter.requires_grad for parameter in bench.module.parameters())
    if method == "phased":
        assert facts["phases_run"] == 2
        assert facts["global_steps"] > 2
    if method in ("sgd", "scales"):
        assert facts["learned_tokens"] == 3 * 128  # every chunk but the last


@pytest.mark.parametrize("method", METHODS)
def test_learning_helps_on_a_text_that_repeats_itself(method: str) -> None:
    module = record_model()
    sentence = np.random.default_rng(0).integers(2, 320, 24)
    tokens = np.concatenate([np.concatenate([[1], np.tile(sentence, 8)]) for _ in range(12)]).astype(np.uint16)
    from pgolf_post.families import get_family

    repeated = Bench(module, get_family("golf_gpt"), tokens, np.ones(len(tokens), dtype=np.int64))
    learned = repeated.score(ttt(method, "learning_rate=0.02")).bpb
    plain = repeated.score(PlainProtocol(seq_len=32, tail="score")).bpb
    assert learned < plain - 0.05


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_repeatable(bench: Bench, method: str) -> None:
    first, again = bench.score(ttt(method)), bench.score(ttt(method))
    assert first.nats == again.nats
    assert np.array_equal(first.unit_nats, again.unit_nats)


def test_every_visit_of_a_looped_layer_has_adapters_of_its_own(bench: Bench) -> None:
    adapters = Adapters(bench.module, bench.family, ttt("lora"))
    visits = {path: sum(key.startswith(f"{path}@") for key in adapters.a) for path in adapters.paths}
    assert visits["blocks.0.attn.q"] == visits["head_out"] == visits["blocks.3.mlp"] == 1
    assert visits["blocks.1.attn.q"] == visits["blocks.2.mlp"] == visits["blocks.1.attn"] == 3
    assert adapters.a["blocks.1.attn.k@2"].shape == (4, 4, 32)
    assert adapters.b["head_out@0"].shape == (4, 320, 4)
    bound = 1 / math.sqrt(32)
    a = adapters.a["blocks.1.attn@0"]
    assert float(a.abs().max()) <= bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_zero_adapters_are_the_plain_forward_bit_for_bit(bench: Bench) -> None:
    adapters = plain_adapters(bench)
    next(iter(adapters.b.values())).fill_(0.1)
    with pytest.raises(VerificationError, match="adapters that add nothing"):
        adapters.require_zero_is_plain()


def test_a_documents_adapter_touches_no_other_document(bench: Bench) -> None:
    adapters = Adapters(bench.module, bench.family, ttt("lora"))
    tokens = torch.arange(2, 66).view(4, 16)
    with adapters.attached(), torch.no_grad():
        plain = adapters.logits(adapters.hidden(tokens).flatten(0, 1)).view(4, 16, -1)
        for tensor in adapters.b.values():
            tensor[2].normal_()
        moved = adapters.logits(adapters.hidden(tokens).flatten(0, 1)).view(4, 16, -1)
    same = [torch.equal(plain[row], moved[row]) for row in range(4)]
    assert same == [True, True, False, True]


def test_documents_of_a_batch_learn_alone(bench: Bench) -> None:
    protocol = ttt("lora", "batch_documents=40")
    whole = bench.log(protocol)
    text = find_documents(bench.tokens, whole.num_targets)[3]
    bench.tokens = bench.tokens.copy()
    bench.tokens[text.start + 1 : text.stop] = 7
    other = bench.log(protocol)
    outside = np.ones(len(bench.tokens), dtype=bool)
    outside[text.start + 1 : text.stop + 1] = False
    assert np.array_equal(other.nats[outside], whole.nats[outside])
    assert not np.array_equal(other.nats, whole.nats)


def test_steps_never_run_ahead_of_scores(bench: Bench) -> None:
    for method in METHODS:
        log = bench.log(ttt(method))
        assert log.handed_out
        for taken in log.handed_out:
            turns = log.turn[max(1, taken.start) : taken.stop]
            assert turns.min() >= 0
            assert turns.max() < taken.turn
    last = bench.log(ttt("sgd"))
    assert max(taken.stop for taken in last.handed_out) <= 1 + (last.num_targets - 1) // 128 * 128  # the last is not


def test_a_loop_that_trains_first_does_not_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: ChunkPass, index: int) -> None:
        self.learn(index)

    monkeypatch.setattr(ChunkPass, "step", step)
    before = weights_sha256(bench.module)
    with pytest.raises(CommitError, match="asked for training"):
        bench.score(ttt("sgd"))
    assert weights_sha256(bench.module) == before


def test_weights_that_do_not_come_back_are_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "tensors_of", lambda module: dict(module.named_parameters()))
    before = dict(bench.module.named_parameters())
    real = weights.weights_sha256
    answers = iter(["before", "after"])
    monkeypatch.setattr(weights, "weights_sha256", lambda module: next(answers))
    with pytest.raises(VerificationError, match="other weights"), restored(bench.module):
        pass
    assert real(bench.module)
    assert before.keys()


def test_length_sorted_batches_hold_every_document_once(bench: Bench) -> None:
    texts = find_documents(bench.tokens, 440)
    batches = batch_by_length(texts, 4)
    assert sorted((t for b in batches for t in b), key=lambda t: t.start) == texts
    assert sum(t.targets for t in texts) == 440
    lengths = [t.targets for b in batches for t in b]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(MismatchError, match="no BOS"):
        find_documents(np.full(50, 7), 40)


def test_presets_are_the_published_settings() -> None:
    record = ttt_protocol("record-1855", [], {}, 512)
    assert (record.method, record.seq_len, record.chunk_tokens) == ("phased", 2048, 48)
    assert (record.rank, record.alpha) == (80, 144)
    assert (record.learning_rate, record.beta1, record.beta2, record.eps) == (1e-4, 0.0, 0.99, 1e-10)
    assert (record.weight_decay, record.batch_documents, record.phases) == (0.5, 64, (833, 1666, 2500))
    assert (record.global_lr, record.global_momentum, record.global_chunk_tokens) == (1e-3, 0.9, 32768)
    assert (record.global_seq_len, record.global_grad_clip) == (2048, 1.0)
    sgd = ttt_protocol("sgd-1493", [], {}, 512)
    assert (sgd.method, sgd.optimizer, sgd.learning_rate, sgd.beta1, sgd.epochs) == ("sgd", "sgd", 5e-3, 0.9, 3)
    assert (sgd.chunk_tokens, sgd.stride, sgd.seq_len, sgd.schedule, sgd.grad_clip) == (32768, 64, 2048, "cosine", 1.0)
    assert sgd.last_blocks is None
    for name in PRESETS:
        ttt_protocol(name, [], {}, 512)


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("sgd", "rank=80", "--ttt sgd: unknown key 'rank'.*valid keys here: .*last_blocks"),
        ("lora", "epochs=2", "unknown key 'epochs' .*valid keys here: adapt, alpha"),
        ("scales", "last_blocks=2", "unknown key 'last_blocks'"),
        ("lora", "rnak=4", "unknown key 'rnak' .*did you mean 'rank'"),
        ("record-1855", "epochs=2", r"--ttt record-1855 \(phased\): unknown key 'epochs'"),
        ("sgd", "method=adam", "no TTT method 'adam'; there are: sgd, scales, lora, phased"),
        ("lora", "chunk_tokens=100", "chunk_tokens 100 exceeds"),
        ("phased", "phases=[5,3]", "ascending numbers"),
        ("sgd", "stride=1000", "stride 1000 exceeds"),
        ("sgd", "optimizer=lion", "optimizer = 'lion'"),
        ("sgdd", "stride=8", "no TTT preset or method 'sgdd'; there are: sgd-1493"),
    ],
)
def test_settings_that_cannot_act_are_refused(method: str, override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ttt_protocol(method, [override], {}, 64)


def test_what_is_trained(bench: Bench) -> None:
    def trained(*overrides: str, method: str = "sgd") -> set[str]:
        work: Any = make_pass(bench.module, bench.family, bench.tokens, ttt(method, *overrides), Session())
        return set(work.parameters)

    everything = trained()
    assert everything == {name for name, _ in bench.module.named_parameters()}
    assert all(name.startswith("blocks.3.") for name in trained("last_blocks=1"))
    assert {name.split(".")[1] for name in trained("last_blocks=2")} == {"2", "3"}
    assert trained("freeze=['tok_emb','mlp']") == {n for n in everything if "tok_emb" not in n and "mlp" not in n}
    scales = trained(method="scales")
    assert "skip_weights" in scales
    assert "blocks.1.attn.q_gain" in scales
    assert not any(name.endswith((".q.weight", "fc.weight", "tok_emb.weight")) for name in scales)
    with pytest.raises(SettingsError, match="no parameter"):
        trained("freeze=['.*']")
    with pytest.raises(SettingsError, match="exceeds the model's 4 blocks"):
        trained("last_blocks=5")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_optimizers_act(bench: Bench, optimizer: str) -> None:
    facts = bench.facts(ttt("sgd", f"optimizer={optimizer}", "learning_rate=0.01"))
    assert facts["optimizer_steps"] == 12  # three chunks that are trained on, two steps and two epochs each


def test_out_of_memory_names_the_setting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pgolf_post.score.ttt.lora.target_nats", full)
    with pytest.raises(PgolfError, match="4 documents at once") as caught:
        bench.score(ttt("lora"))
    assert "batch_documents=2" in str(caught.value.hint)
    monkeypatch.setattr("pgolf_post.score.ttt.gradients.target_nats", full)
    with pytest.raises(PgolfError, match="while training on") as caught:
        bench.score(ttt("sgd"))
    assert "train_batch_seqs" in str(caught.value.hint)


def test_the_first_chunk_of_a_document_is_scored_by_the_plain_model(bench: Bench) -> None:
    """B = 0 at the start of every document, even after batches that learned: nothing leaks from one to the next."""
    log = bench.log(ttt("lora", "learning_rate=0.1"))
    for batch in batch_by_length(find_documents(bench.tokens, log.num_targets), 4):
        for text in batch:
            tokens = torch.from_numpy(bench.tokens[text.start : text.stop + 1][:17].astype(np.int64))
            logits = bench.module(tokens[None, :-1])[0]
            expected = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()
            nats = log.nats[text.start + 1 : text.start + len(tokens)]
            np.testing.assert_allclose(nats, expected, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "phased"])
def test_parts_of_a_batch_give_the_batchs_number(bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = ttt(method)
    whole = bench.log(protocol).nats
    sizes: list[int] = []
    parts = lora.LoraPass.parts
    monkeypatch.setattr(lora.LoraPass, "parts", lambda *a: sizes.extend(len(p[1]) for p in parts(*a)) or parts(*a))
    monkeypatch.setattr(lora, "ROW_TOKENS", {"cpu": 40})  # of windows of 16 and 32
    np.testing.assert_allclose(bench.log(protocol).nats, whole, rtol=1e-5)
    assert set(sizes) == {1, 2}
    assert not np.allclose(bench.log(ttt(method, "learning_rate=0", "weight_decay=0")).nats, whole, rtol=1e-4)


def test_bfloat16_is_near_float32_and_another_score(bench: Bench) -> None:
    protocol, half = ttt("phased"), ttt("phased", "precision=bf16")
    assert half.model_dump(mode="json") == {**protocol.model_dump(mode="json"), "precision": "bf16"}
    expected, found = bench.log(protocol).nats.sum(), bench.log(half).nats.sum()
    assert found != expected
    assert found == pytest.approx(expected, rel=0.01)


def test_lora_pass_counts_its_steps(bench: Bench) -> None:
    protocol = ttt("lora")
    work = LoraPass(bench.module, bench.family, CommitLog(bench.tokens, len(bench.tokens) - 1), protocol, Session())
    chunks = [max(-(-text.targets // 16) for text in batch) for batch in work.batches]
    assert len(work.costs) == sum(chunks)
    facts = bench.facts(protocol)
    assert facts["optimizer_steps"] == sum(chunks) - len(chunks)  # no batch trains on its last chunk
