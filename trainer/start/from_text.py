"""Starts that read the training text: attention scores from co-occurrence, the output bias from frequencies.

A model that begins with what counting knows need not learn it. Queries and keys of block 0 can begin at the singular
vectors of the tokens' co-occurrence, so that attention looks at likely predecessors from the first step (co-occurrence
init, on #623 of openai/parameter-golf); the output bias at the tokens' log-frequencies. Both count the same first
tokens of the training split.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.model.block import Block
from trainer.model.gpt import GolfGPT
from trainer.model.start_settings import reads_text

COUNTED_TOKENS = 2_000_000


def start_from_text(model: GolfGPT, data: Any) -> None:
    """Set what starts from the training text of a data folder. The model is otherwise initialised already."""
    if not reads_text(model.config):
        return
    tokens = first_tokens(data)
    if model.config.output_bias == "unigram":
        bias = unigram_bias(np.bincount(tokens, minlength=model.config.vocab_size), model.config.logit_softcap)
        with torch.no_grad():
            model.output_bias.copy_(torch.from_numpy(bias))
    if model.config.qk_init == "cooccurrence":
        start_attention(model, affinity(tokens, model.config.vocab_size))


def first_tokens(data: Any, count: int = COUNTED_TOKENS) -> np.ndarray:  # (≤ count,) int64
    """Return the first tokens of the training split."""
    parts, left = [], count
    for _, shard in data.shards("train"):
        parts.append(np.asarray(shard[:left], dtype=np.int64))
        left -= len(parts[-1])
        if not left:
            break
    return np.concatenate(parts)


def unigram_bias(counts: np.ndarray, softcap: float) -> np.ndarray:  # (vocab_size,) → the same, float64
    """Return the bias under which the soft-capped logits of no context are the log-frequencies, less their mean.

    Counts are smoothed by one. What the cap cannot reach is put at 99 % of it.
    """
    logs = np.log((counts + 1) / (counts.sum() + len(counts)))
    shares = np.clip((logs - logs.mean()) / softcap, -0.99, 0.99)
    bias: np.ndarray = softcap * np.arctanh(shares)
    return bias


def affinity(tokens: np.ndarray, vocab_size: int) -> np.ndarray:  # (vocab_size, vocab_size) float64
    """Return log(1 + count) of each token (row) after each predecessor (column), less the means of rows and columns."""
    pairs = np.bincount(tokens[1:] * vocab_size + tokens[:-1], minlength=vocab_size**2)
    logs = np.log1p(pairs.reshape(vocab_size, vocab_size))
    centred: np.ndarray = logs - logs.mean(0) - logs.mean(1)[:, None] + logs.mean()
    return centred


@torch.no_grad()
def start_attention(model: GolfGPT, affinities: np.ndarray) -> None:
    """Start queries and keys of block 0 at the largest singular vectors of the affinities, seen through the embedding.

    With X the normalised embedding of every token, XᵀAX = U S Vᵀ; the first query head of key-value group g takes
    √S Uᵀ, its keys √S Vᵀ, of the g-th d singular values, so that qᵀk is their part of A. Other heads of a group stay
    orthogonal: equal heads would stay equal. Matrices keep the Frobenius norm that orthogonal ones have.
    """
    config, block = model.config, model.blocks[0]
    assert isinstance(block, Block)
    queries, keys = block.attn.q.weight, block.attn.k.weight
    embedded = model.embed_alone(torch.arange(config.vocab_size, device=queries.device)).double().cpu()
    u, s, vh = torch.linalg.svd(embedded.T @ torch.from_numpy(affinities) @ embedded)
    width, group = config.model_dim // config.num_heads, config.num_heads // config.num_kv_heads
    for kv_head in range(config.num_kv_heads):
        chosen = slice(kv_head * width, (kv_head + 1) * width)
        root = s[chosen].sqrt()[:, None]
        first_head = slice(kv_head * group * width, (kv_head * group + 1) * width)
        queries[first_head] = _of_norm(root * u.T[chosen], math.sqrt(width)).to(queries)
        keys[chosen] = _of_norm(root * vh[chosen], math.sqrt(width)).to(keys)


def _of_norm(matrix: Tensor, norm: float) -> Tensor:
    return matrix * (norm / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
