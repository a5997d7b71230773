"""Test of document isolation: documents scored alone and packed behind another agree."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from pgolf_post.data import BOS_ID
from pgolf_post.families import LanguageModel
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.nats import distribution

TOLERANCE = 1e-3  # nats: the same sums in another order, at another place of the window
PAIRS = 8  # of neighbouring documents that are compared


@torch.no_grad()
def isolates_documents(
    module: LanguageModel,
    tokens: np.ndarray,  # (n,) the excerpt
    seq_len: int,
) -> Finding:
    """Test that no document's predictions depend on the document before it."""
    starts = [*np.flatnonzero(tokens == BOS_ID).tolist(), len(tokens)]
    documents = [tokens[a : min(b, a + seq_len // 2)] for a, b in pairwise(starts)]
    pairs = list(pairwise(documents))[:PAIRS]
    if not pairs:
        return Finding("document isolation", False, "the excerpt has no two documents; audit more tokens")
    worst = max(_gap(module, first, second) for first, second in pairs)
    evidence = f"{len(pairs)} documents alone and behind another: largest difference {worst:.1g} log-probability"
    return Finding("document isolation", worst < TOLERANCE, evidence)


def _gap(module: LanguageModel, first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest difference in any token's log-probability over the second of two documents."""

    def log_probs(text: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(text.astype(np.int64)).to(next(module.parameters()).device)
        return distribution(module, module.hidden(ids[None])[0])

    packed = log_probs(np.concatenate([first, second]))[len(first) :]
    return float((packed - log_probs(second)).abs().max())
