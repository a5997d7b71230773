"""The phases of a seed's whole chain, from the folders that its stages left (`ledger/phases.py` says what counts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgolf_post.ledger import phases
from pgolf_post.ledger.phases import ChainPhase
from pgolf_post.submit.seeds import Seed


def chain(seed: Seed, score: Mapping[str, Any] | None = None) -> list[ChainPhase]:
    """Return the phases of a seed in order, as far as they are recorded; `score` is the meta.json of one."""
    later = seed.later_seconds()
    found = phases.of_run(seed.run.meta if seed.run else {})
    if "statistics" in later:
        found.append(ChainPhase("statistics", later["statistics"], "training", True, True))
    return [*found, *phases.of_artifact(seed.meta, seed.settings), *phases.of_score(score or {})]
