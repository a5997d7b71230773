"""The challenge's validation splits, recognised by vocabulary and length, and the bytes that they must have.

Its 50,000 validation documents have 151.08 MB under every tokenizer: two published mistakes are recognised by the byte
count that they lead to.
"""

from __future__ import annotations

# The challenge's validation splits: (vocabulary, tokens scored) -> what it is. Scorers drop the last, incomplete
# window, so the files have up to SCORED_WINDOW tokens more than the counts that runs report.
CHALLENGE_SPLITS = {
    (1024, 62_021_632): "SP1024",
    (4096, 45_508_608): "SP4096",
    (8192, 40_540_160): "SP8192",
    (8192, 47_851_520): "SP8192 CaseOps",
}
SCORED_WINDOW = 2048
CHALLENGE_BYTES = (151_070_000, 151_090_000)
KNOWN_MISTAKES = {  # bytes -> what went wrong
    176_330_000: "the leading space of each piece was counted twice",
    164_590_000: "CaseOps' case sentinels were counted as text",
}
MISTAKE_TOLERANCE_BYTES = 30_000


def challenge_verdict(vocab_size: int, num_tokens: int, num_bytes: int) -> tuple[bool, str] | None:
    """Return (passed, evidence) for a validation split of the challenge, None for any other split."""
    for (known_vocab, known_tokens), name in CHALLENGE_SPLITS.items():
        if vocab_size == known_vocab and known_tokens <= num_tokens <= known_tokens + SCORED_WINDOW:
            low, high = CHALLENGE_BYTES
            expected = f"{name} validation has {low / 1e6:.2f} to {high / 1e6:.2f} MB"
            if low <= num_bytes <= high:
                return True, f"{num_bytes:,}; {expected}"
            return False, f"{num_bytes:,}; {expected}{_known_mistake(num_bytes)}"
    return None


def _known_mistake(num_bytes: int) -> str:
    """Return the published mistake that leads to this number, as the end of a sentence; empty if none does."""
    for wrong_bytes, reason in KNOWN_MISTAKES.items():
        if abs(num_bytes - wrong_bytes) <= MISTAKE_TOLERANCE_BYTES:
            return f"; this number means that {reason}"
    return ""


def challenge_note(vocab_size: int, num_tokens: int) -> str | None:
    """Return a remark for a split that has a challenge's vocabulary and not its length; None for any other."""
    lengths = {name: tokens for (vocab, tokens), name in CHALLENGE_SPLITS.items() if vocab == vocab_size}
    if not lengths or any(tokens <= num_tokens <= tokens + SCORED_WINDOW for tokens in lengths.values()):
        return None
    known = ", ".join(f"{name} has {tokens:,} tokens" for name, tokens in lengths.items())
    return f"validation is not the challenge's: {num_tokens:,} tokens, {known}"
