"""Tests of a whole split: its bytes and its documents are those of the text it was made from."""

from __future__ import annotations

import numpy as np

from pgolf_post.data import BOS_ID, DataFolder
from pgolf_post.data.check import check_split
from pgolf_post.data.folder import Split
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.byte_ngram import decode_documents

PUBLISHED_TOKENS = {62_021_632: "SP1024", 45_508_608: "SP4096", 40_540_160: "SP8192", 47_851_520: "CaseOps"}
PUBLISHED_BYTES = (151_070_000, 151_080_000)
KNOWN_WRONG = {176.33: "the leading space counted twice", 164.59: "case sentinels counted"}  # M bytes


def audit_text(
    data: DataFolder,
    split: Split,
    tokens: np.ndarray,  # (n,)
    token_bytes: np.ndarray,  # (n,) as the score counts them
) -> list[Finding]:
    """Test the bytes and documents of a whole split."""
    return [_implied_bytes(data, split, tokens, token_bytes), _bos_count(data, split, tokens)]


def _implied_bytes(data: DataFolder, split: Split, tokens: np.ndarray, token_bytes: np.ndarray) -> Finding:
    """Test that the byte counts, by which bpb divides, add up to the text's length."""
    counted = int(token_bytes.sum())
    recorded = int(data.manifest["splits"][split]["num_bytes"])
    evidence = f"{counted:,} bytes counted, {recorded:,} recorded"
    passed = counted == recorded

    # the files are those recorded, and a sidecar is in order token by token, not only in all
    wrong_rows = [row for row in check_split(data, split) if not row.passed]
    passed = passed and not wrong_rows
    evidence += "".join(f"; data check: {row.name}: {row.evidence}" for row in wrong_rows)

    # without a sidecar the decoded text is the original, whose bytes can be counted
    if data.manifest["splits"][split].get("byte_sidecars"):
        by_table = data.byte_table.count(np.concatenate([tokens[:1], tokens[:-1]]), tokens)
        others = int(np.count_nonzero(by_table != token_bytes))
        evidence += f" (a sidecar counts the text before its transform: {others:,} of {len(tokens):,} tokens stand for "
        evidence += f"other bytes than in the byte table, {counted - int(by_table.sum()):+,} bytes in all)"
    else:
        decoded = sum(map(len, decode_documents(data, tokens)))
        evidence += f", {decoded:,} in the decoded text"
        passed = passed and counted == decoded

    # the challenge's validation text has a known length, and known ways to count it wrongly
    published = PUBLISHED_TOKENS.get(len(tokens) - 1) or PUBLISHED_TOKENS.get(len(tokens))
    if published:
        low, high = PUBLISHED_BYTES
        passed = passed and low <= counted <= high
        evidence += f"; published for {published}: {low / 1e6:.2f}-{high / 1e6:.2f} M"
    wrong = [why for value, why in KNOWN_WRONG.items() if abs(counted / 1e6 - value) < 0.02]
    return Finding("implied bytes", passed, evidence + "".join(f"; known wrong value: {why}" for why in wrong))


def _bos_count(data: DataFolder, split: Split, tokens: np.ndarray) -> Finding:
    """Test that there are as many BOS as documents, and that the text begins with one."""
    count, recorded = int(np.count_nonzero(tokens == BOS_ID)), int(data.manifest["splits"][split]["num_documents"])
    begins = len(tokens) > 0 and int(tokens[0]) == BOS_ID
    evidence = f"{count:,} BOS, {recorded:,} documents; the text {'begins' if begins else 'does not begin'} with BOS"
    return Finding("BOS count", begins and count == recorded, evidence)
