"""The first error of a group of processes, seen by all of them.

When one rank fails (its folder is not writable, its memory does not suffice), the others only notice that a connection
broke. So the rank that fails puts its error into the group's key-value store before it leaves, and the others, when
their next exchange fails, raise that one in place of what the network says.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pgolf_post.base.signals import exit_code_of_signal
from pgolf_post.errors import PgolfError

FIRST, SEEN = "pgolf-post/error", "pgolf-post/seen"
INTERRUPTED = 130  # exit code
LINGER_SECONDS = 5.0  # that the store's host and the others' error output get


def share(store: dist.Store, rank: int, error: BaseException) -> PgolfError | None:
    """Put a rank's error into the store unless another was first; return that one.

    None if this is the first, or if both ranks were interrupted.
    """
    own = {"rank": rank, "interrupted": isinstance(error, KeyboardInterrupt), **_facts(rank, error)}
    try:
        first = json.loads(store.compare_set(FIRST, "", json.dumps(own)))
    except (RuntimeError, ValueError):  # the store's host is gone, with what it knew
        return None
    if first["rank"] == rank or (first["interrupted"] and own["interrupted"]):
        return None
    return _rebuilt(first)


def first_error(store: dist.Store) -> PgolfError | None:
    """Return the error that a rank has put into the store, None if all are well."""
    return _rebuilt(json.loads(store.get(FIRST))) if store.check([FIRST]) else None


def _rebuilt(facts: dict[str, Any]) -> PgolfError:
    """Return another rank's error as this one's."""
    error = PgolfError(facts["message"], hint=facts["hint"])
    error.exit_code = facts["exit_code"]
    return error


def wait_until_seen(store: dist.Store, rank: int, world_size: int) -> None:
    """Say that this rank has seen the group's error, and wait until all have, for at most LINGER_SECONDS."""
    try:
        store.set(f"{SEEN}/{rank}", "yes")
        store.wait([f"{SEEN}/{other}" for other in range(world_size)], timedelta(seconds=LINGER_SECONDS))
    except RuntimeError:  # another rank hangs or was killed, or the store's host has left
        return


def _facts(rank: int, error: BaseException) -> dict[str, object]:
    """Return what the other ranks are to say of an error: a foreseen one's own words, else who failed and how."""
    if isinstance(error, PgolfError):
        return {"message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    if isinstance(error, KeyboardInterrupt):
        code = exit_code_of_signal() or INTERRUPTED
        return {"message": f"rank {rank} was interrupted", "hint": None, "exit_code": code}
    return {"message": f"rank {rank} failed: {type(error).__name__}: {error}", "hint": None, "exit_code": 1}
