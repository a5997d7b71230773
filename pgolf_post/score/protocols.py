"""One way in for every protocol: module and text in, a complete ledger out, summed into a score.

Every protocol runs on any number of processes. Plain, sliding and LoRA without phases score each target with the same
batch wherever it runs; where weights learn, gradients are added up over ranks, and only their rounding differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError
from pgolf_post.families import ModelFamily
from pgolf_post.score.bpb import Score, documents_of, sum_units
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.plain import BATCH_TOKENS, PlainProtocol
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol, sliding_spans
from pgolf_post.score.spans import Span, SpanPass, fitting, num_targets
from pgolf_post.score.ttt.settings import TTTProtocol

if TYPE_CHECKING:
    from pgolf_post.score.session import Pass

Protocol = PlainProtocol | SlidingProtocol | TTTProtocol


def protocol_spans(protocol: PlainProtocol | SlidingProtocol, targets: int) -> list[Span]:
    """The windows of a protocol that does not learn."""
    stride = protocol.stride if isinstance(protocol, SlidingProtocol) else protocol.seq_len
    return sliding_spans(targets, protocol.seq_len, stride)


def make_pass(module: Any, family: ModelFamily, tokens: np.ndarray, protocol: Protocol, session: Session) -> Pass:
    """A protocol as steps over a text. Raises MismatchError for a text too short."""
    ledger = CommitLog(tokens, num_targets(len(tokens), protocol.seq_len, protocol.tail))
    if not isinstance(protocol, TTTProtocol):
        spans = protocol_spans(protocol, ledger.num_targets)
        return SpanPass(module, ledger, spans, fitting(BATCH_TOKENS, module), session)
    from pgolf_post.score.ttt.lora import LoraPass
    from pgolf_post.score.ttt.sgd import ChunkPass

    kind = ChunkPass if protocol.method in ("sgd", "scales") else LoraPass
    return kind(module, family, ledger, protocol, session)


def run_protocol(
    module: Any, family: ModelFamily, tokens: np.ndarray, protocol: Protocol, session: Session
) -> tuple[CommitLog, Pass]:
    """Score a text, tokens (n,). Weights end as they were, bit for bit, whatever was learned on the way."""
    from pgolf_post.score.ttt.weights import require_equal_weights, restored

    work = make_pass(module, family, tokens, protocol, session)
    if isinstance(protocol, TTTProtocol):
        with restored(module):
            session.run(work)
            require_equal_weights(module, session.ranks)
    else:
        session.run(work)
    with session.clock.phase("score"):  # waiting for the slowest rank is part of it
        work.ledger.close(session.ranks)
    work.ledger.require_complete()
    return work.ledger, work


def unit_windows(tokens: np.ndarray, protocol: Protocol, targets: np.ndarray) -> np.ndarray:
    """What stands for each target's window in the score's units: its span, or its document where TTT made none."""
    if isinstance(protocol, TTTProtocol):
        return documents_of(tokens)[targets]
    spans = protocol_spans(protocol, len(targets))
    return np.repeat(np.arange(len(spans)), [span.scored for span in spans])


def score_text(
    module: Any,
    family: ModelFamily,
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,) int64
    protocol: Protocol,
    session: Session | None = None,
    pieces: np.ndarray | None = None,  # (n,) int64
) -> tuple[Score, dict[str, Any]]:
    """Score a text by any protocol. Returns the score, and JSON facts of what was learned on the way."""
    session = session or Session()
    ledger, work = run_protocol(module, family, tokens, protocol, session)
    targets = np.flatnonzero(ledger.scored)
    windows = unit_windows(tokens, protocol, targets)
    seconds = session.clock.strict
    score = sum_units(tokens, targets, windows, ledger.nats[targets], token_bytes, seconds, pieces)
    facts: dict[str, Any] = work.facts()
    return score, {**facts, **session.clock.facts()}


def folder_text(data: DataFolder, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:  # tokens, token_bytes
    """A data folder's text under a protocol. Raises MismatchError for a byte sidecar of another length."""
    tokens = data.tokens(protocol.split, protocol.max_tokens)
    token_bytes = data.token_bytes(protocol.split, tokens)
    if len(token_bytes) < len(tokens):
        raise MismatchError(
            f"{data.path}: the byte sidecar of {protocol.split!r} holds {len(token_bytes)} counts for {len(tokens)} "
            "tokens",
            hint=f"pgolf-post data check {data.path}",
        )
    return tokens, token_bytes
