"""A whole audit: the behaviour of a model under a protocol, and the bytes and documents of its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.data import DataFolder
from pgolf_post.families import get_family, load_module, train_seq_len
from pgolf_post.score.audit.behaviour import POWER, audit_behaviour, document_excerpt, excerpt_tokens
from pgolf_post.score.audit.causality import Audited
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.audit.text import audit_text
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import Protocol, folder_text
from pgolf_post.score.stage import Scorable, open_weights


@dataclass(frozen=True)
class Audit:
    """Result of an audit: one finding per test."""

    findings: tuple[Finding, ...]
    excerpt_tokens: int

    @property
    def passed(self) -> bool:
        """Whether no test failed; one that does not apply is no failure."""
        return all(finding.passed is not False for finding in self.findings)


def audit(
    scored: Scorable,
    data: DataFolder,
    protocol: Protocol | None = None,  # None: plain windows of the model's training length
    *,
    tokens: int | None = None,  # of the excerpt; None: a few windows of the protocol
    samples: int = 4,  # tokens that are changed alone; and as many suspects again
    seed: int = 0,
    power: float = POWER,  # probability with which a fault on one target in a hundred is to be found
) -> Audit:
    """Run the challenge's rules as tests: causality, normalization, score before update, bytes of the text.

        >>> pg.audit(artifact, data).passed

    A test that raises is reported as that test's failure. Raises what opening and scoring do.
    """
    name, config, tensors = open_weights(scored)
    protocol = protocol or PlainProtocol(seq_len=train_seq_len(config))
    return audit_weights(name, config, tensors, data, protocol, tokens, samples, seed, power)


def audit_weights(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    data: DataFolder,
    protocol: Protocol,
    tokens: int | None = None,
    samples: int = 4,
    seed: int = 0,
    power: float = POWER,
) -> Audit:
    """Audit weights that are in memory; see `audit`."""
    # the excerpt is scored again and again, so it is short
    whole = folder_text(data, protocol.model_copy(update={"max_tokens": None}))
    excerpt = document_excerpt(whole[0], tokens or excerpt_tokens(protocol))
    say(f"excerpt: {len(excerpt):,} tokens of {len(whole[0]):,}")

    # the module is the audit's own: a protocol that learns changes it
    module = load_module(config, {key: tensor.clone() for key, tensor in tensors.items()}, name)
    isolates = bool(config["model"].get("isolate_documents"))
    audited = Audited.of(module, get_family(config["family"]), isolates, protocol)
    findings = [*audit_behaviour(audited, excerpt, samples, seed, power), *audit_text(data, protocol.split, *whole)]
    return Audit(tuple(findings), len(excerpt))
