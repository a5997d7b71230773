"""What the scoring tests share: a pico model of the record's parts, its family, a text, and one-line scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.families import ModelFamily, get_family
from pgolf_post.score.bpb import Score
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.protocols import Protocol, run_protocol, score_text
from pgolf_post.score.session import Session
from pgolf_post.score.ttt.adapters import Adapters
from pgolf_post.score.ttt.methods import ttt_protocol
from pgolf_post.score.ttt.settings import TTTProtocol
from tests.conftest import pico_documents

RECORD = {
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_mult": 2.0,
    "rope_dims": 8,
    "xsa_last_n": 4,
    "loop_start": 1,
    "loop_end": 2,
    "num_loops": 2,
    "lanes_start": 3,
    "attn_gate": "sparse",
    "smear_gate": True,
    "rope_ntk": False,
    "vocab_size": 320,
    "train_seq_len": 32,
}

MANY_PARTS: dict[str, dict[str, Any]] = {  # that a pico model can have at once
    "passes and n-grams": {
        "lanes_start": None,
        "smear_gate": False,
        "mlp_mult": (2.0, 1.0, 0.0, 2.0),
        "rope_base": (9.0, 99.0, 9.0, 99.0),
        "xsa_alpha": 0.8,
        "pass_embeddings": "visit",
        "pass_norm": True,
        "pass_film": "pass",
        "value_x0_layers": (1,),
        "bigram_buckets": 32,
        "bigram_classes": "word_position",
        "bigram_heads": 2,
        "bigram_gate": True,
        "word_start_boost": True,
        "trigram_buckets": 16,
        "token_type_dim": 4,
        "output_bias": "zeros",
        "head_residual_rank": 2,
        "skip_norm": "after",
        "sandwich_norm": "both",
        "nope_layers": (3,),
        "token_kinds": "0819" * 80,
    },
    "values and layers": {
        "value_residual": True,
        "value_residual_from": "previous",
        "value_residual_init": 0.3,
        "activation": ("leaky_relu2", "gelu2", "relu2", "swiglu"),
        "mlp_hidden": (40, 24, 24, 48),
        "rope_dims": (0, 4, 8, 16),
        "q_gain_init": (4.0, 2.0, 1.0, 3.0),
        "xsa_layers": (0, 2),
        "skip_norm": "before",
        "embedding_dim": 24,
        "sandwich_norm": "attention",
        "bigram_buckets": 32,
        "bigram_classes": "word_start",
        "trigram": True,
        "word_start_boost": True,
        "token_kinds": "0819" * 80,
    },
}


def record_model(seed: int = 0, active_loops: int = 2, **changes: Any) -> Any:
    """A pico model with loops, lanes, gates and smear, and weights of some size everywhere."""
    model: dict[str, Any] = {**RECORD, **changes}
    torch.manual_seed(seed)
    module = get_family("golf_gpt").build(model, {"active_loops": active_loops})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


@dataclass
class Bench:
    """A model and a text to score it on."""

    module: Any
    family: ModelFamily
    tokens: np.ndarray
    token_bytes: np.ndarray

    def score(self, protocol: Protocol, session: Session | None = None) -> Score:
        return score_text(self.module, self.family, self.tokens, self.token_bytes, protocol, session)[0]

    def facts(self, protocol: Protocol) -> dict[str, Any]:
        return score_text(self.module, self.family, self.tokens, self.token_bytes, protocol)[1]

    def log(self, protocol: Protocol, session: Session | None = None) -> CommitLog:
        return run_protocol(self.module, self.family, self.tokens, protocol, session or Session())[0]


@pytest.fixture
def bench(pico_data: DataFolder) -> Bench:
    """The record-like pico model on 400 tokens: the beginnings of documents, of 17 to 90 tokens each."""
    documents = [np.array([BOS_ID, *pico_data.tokenizer.encode(document.text)]) for document in pico_documents()]
    tokens = np.concatenate([own[: 17 + 11 * i % 74] for i, own in enumerate(documents)])[:400].astype(np.uint16)
    counts = pico_data.byte_table.count(np.concatenate([tokens[:1], tokens[:-1]]), tokens)
    return Bench(record_model(), get_family("golf_gpt"), tokens, counts)


def ttt(method: str, *overrides: str, **common: Any) -> TTTProtocol:
    """A small TTT protocol: chunks and windows that a pico text has several of."""
    small = {
        "sgd": ("chunk_tokens=128", "stride=16", "train_batch_seqs=2", "epochs=2"),
        "scales": ("chunk_tokens=128", "stride=16", "train_batch_seqs=2", "epochs=2"),
        "lora": ("chunk_tokens=16", "rank=4", "alpha=8", "batch_documents=4", "learning_rate=0.01"),
        "phased": (
            *("chunk_tokens=16", "rank=4", "alpha=8", "batch_documents=4", "learning_rate=0.01"),
            *("phases=[4,8]", "global_chunk_tokens=64", "global_seq_len=32", "global_lr=0.05"),
        ),
    }[method]
    return ttt_protocol(method, [*small, *overrides], {"tail": "score", **common}, 32)


def plain_adapters(bench: Bench) -> Adapters:
    """Return adapters that add nothing; each of them, made to, is shown to change what the plain forward gives."""
    adapters = Adapters(bench.module, bench.family, ttt("lora"))
    adapters.require_zero_is_plain()
    tokens = torch.arange(2, 66).view(4, 16)
    plain = bench.module.logits(bench.module.hidden(tokens).flatten(0, 1))
    with adapters.attached(), torch.no_grad():
        assert torch.equal(adapters.logits(adapters.hidden(tokens).flatten(0, 1)), plain)
        for name in adapters.b:
            kept = adapters.b[name].clone()
            adapters.b[name].normal_()
            assert not torch.equal(adapters.logits(adapters.hidden(tokens).flatten(0, 1)), plain), name
            adapters.b[name].copy_(kept)
    return adapters
