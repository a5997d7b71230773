"""One way in for every protocol: module and text in, a complete log of commits out, summed into a score.

Every protocol runs on any number of processes. Plain, sliding and LoRA without phases score each target with the same
batch wherever it runs; where weights learn, gradients are added up over ranks, and only their rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import ModelFamily
from pgolf_post.score.bpb import Score, documents_of, sum_units
from pgolf_post.score.commits import CommitLog
from pgolf_post.score.plain import BATCH_TOKENS, PlainProtocol
from pgolf_post.score.session import Session
from pgolf_post.score.sliding import SlidingProtocol, sliding_spans
from pgolf_post.score.spans import Span, SpanPass, fitting, num_targets
from pgolf_post.score.ttt.methods import ttt_method, ttt_protocol
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.score.ttt.weights import require_equal_weights, restored
from pgolf_post.settings import Settings, parse_settings

if TYPE_CHECKING:
    from pgolf_post.score.session import Pass

Protocol = PlainProtocol | SlidingProtocol | TTTProtocol


@dataclass(frozen=True)
class ProtocolKind:
    """A row of the table."""

    settings: type[Settings]  # of ttt: the common part, each method has a class of its own (ttt/methods.py)
    spans: Callable[[Any, int], list[Span]] | None  # settings, targets → windows; None where the model learns
    reads: str  # context of a target


PROTOCOLS: dict[str, ProtocolKind] = {
    "plain": ProtocolKind(
        PlainProtocol, lambda own, targets: sliding_spans(targets, own.seq_len, own.seq_len), "its window so far"
    ),
    "sliding": ProtocolKind(
        SlidingProtocol, lambda own, targets: sliding_spans(targets, own.seq_len, own.stride), "nearly a whole window"
    ),
    "ttt": ProtocolKind(TTTProtocol, None, "a window, with weights that have learned from what is scored"),
}


def make_protocol(
    kind: str,
    given: Mapping[str, Any],  # settings by name; None where not given
    window: int,  # seq_len where nothing names one
    source: str,  # of the settings, for messages
    preset: str = "",  # ttt alone, as is the next
    overrides: Iterable[str] = (),  # key=value
) -> Protocol:
    """Return a protocol's settings.

    Raises SettingsError for an unknown protocol, preset, method, key or value, naming those that exist.
    """
    if kind not in PROTOCOLS:
        raise SettingsError(f"no protocol {kind!r}; there are: {', '.join(PROTOCOLS)}")
    values = {key: value for key, value in given.items() if value is not None}
    if kind == "ttt":
        return ttt_protocol(preset, overrides, values, window)
    protocol: Any = parse_settings(PROTOCOLS[kind].settings, {"seq_len": window, **values}, source)
    return protocol


def protocol_spans(protocol: PlainProtocol | SlidingProtocol, targets: int) -> list[Span]:
    """Return the windows of a protocol that does not learn."""
    spans = PROTOCOLS[protocol.protocol].spans
    assert spans is not None
    return spans(protocol, targets)


def make_pass(module: Any, family: ModelFamily, tokens: np.ndarray, protocol: Protocol, session: Session) -> Pass:
    """Return a protocol as steps over a text, tokens (n,). Raises MismatchError for a text too short."""
    log = CommitLog(tokens, num_targets(len(tokens), protocol.seq_len, protocol.tail))
    if isinstance(protocol, TTTProtocol):
        _, make = ttt_method(protocol.method).load()
        return make(module, family, log, protocol, session)
    spans = protocol_spans(protocol, log.num_targets)
    return SpanPass(module, log, spans, fitting(BATCH_TOKENS, module), session, protocol.precision)


def run_protocol(
    module: Any, family: ModelFamily, tokens: np.ndarray, protocol: Protocol, session: Session
) -> tuple[CommitLog, Pass]:
    """Score a text, tokens (n,). Weights end as they were, bit for bit, whatever was learned on the way."""
    work = make_pass(module, family, tokens, protocol, session)
    if isinstance(protocol, TTTProtocol):
        with restored(module):
            session.run(work)
            require_equal_weights(module, session.ranks)
    else:
        session.run(work)
    with session.clock.phase("score"):  # waiting for the slowest rank is part of it
        work.log.close(session.ranks)
    work.log.require_complete()
    if session.details is not None:
        session.details.close(work.log, session.ranks)
    return work.log, work


def unit_windows(tokens: np.ndarray, protocol: Protocol, targets: np.ndarray) -> np.ndarray:
    """Return what stands for each target's window in the score's units: its span, or with TTT its document."""
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
    log, work = run_protocol(module, family, tokens, protocol, session)
    targets = np.flatnonzero(log.scored)
    windows = unit_windows(tokens, protocol, targets)
    seconds = session.clock.strict
    score = sum_units(tokens, targets, windows, log.nats[targets], token_bytes, seconds, pieces)
    facts: dict[str, Any] = work.facts()
    return score, {**facts, **session.clock.facts()}


def folder_text(data: DataFolder, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:  # tokens, token_bytes
    """Return a data folder's text under a protocol. Raises MismatchError for a byte sidecar of another length."""
    tokens = data.tokens(protocol.split, protocol.max_tokens)
    token_bytes = data.token_bytes(protocol.split, tokens)
    if len(token_bytes) < len(tokens):
        raise MismatchError(
            f"{data.path}: the byte sidecar of {protocol.split!r} holds {len(token_bytes)} counts for {len(tokens)} "
            "tokens",
            hint=f"pgolf-post data check {data.path}",
        )
    return tokens, token_bytes
