"""Tests of the log of commits: each target scored once, and before any step that used it."""

from __future__ import annotations

import numpy as np

from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.commits import CommitLog, HandedOut


def scored_once(log: CommitLog, seq_len: int = 1) -> Finding:
    """Test that each target has one score: all of the text's, or those that fill whole windows of seq_len."""
    count, wanted = int(log.scored[1 : log.num_targets + 1].sum()), (len(log.tokens) - 1) // seq_len * seq_len
    evidence = f"{count:,} of {log.num_targets:,} targets in {log.turns:,} commits, each once"
    if log.num_targets < wanted:
        evidence += f"; {wanted - log.num_targets:,} of the text's {wanted:,} are left out"
    return Finding("score once", max(wanted, log.num_targets) == count and not bool(log.scored[0]), evidence)


def scored_before_update(log: CommitLog) -> Finding:
    """Test that every token that a step used had been scored by then."""
    if not log.handed_out:
        return Finding("score before update", None, "nothing is trained")
    ahead = [taken for taken in log.handed_out if not _was_scored(log, taken)]
    count = sum(taken.stop - taken.start for taken in log.handed_out)
    evidence = (
        f"{len(log.handed_out):,} ranges, {count:,} tokens handed out for training, {len(ahead)} before their score"
    )
    return Finding("score before update", not ahead, evidence)


def _was_scored(log: CommitLog, taken: HandedOut) -> bool:
    turns = log.turn[max(1, taken.start) : taken.stop]
    return bool(np.all((turns >= 0) & (turns < taken.turn)))
