"""torchrun's ranks take trials: each works on its own GPU, at its own pace, from the one list in the ledger.

No tensor is exchanged. A rank is told by torchrun's own variables which device is its own; that two ranks never take
the same trial is for claims on files to see to, so ranks on several machines need one file system.
"""

from __future__ import annotations

from collections.abc import Callable

from pgolf_post.base.ranks import Ranks
from pgolf_post.ledger import Row
from pgolf_post.sweep.run import Options, Sweep, work
from pgolf_post.sweep.state import State


def run_torchrun(options: Options, ranks: Ranks, on_row: Callable[[State, Row], None] | None = None) -> State:
    """Do this rank's part of a sweep; returns when every trial has a row, whoever wrote it."""
    sweep = Sweep(options, ranks.device)
    try:
        return work(sweep, on_row)
    finally:
        sweep.close()
