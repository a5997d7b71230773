"""A small memory between trials: the last few values of a kind."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

KEPT = 3  # sets of weights, and of factorized Hessians
KEPT_SMALL = 64  # artifacts' facts and scores' sums


class Recent(dict[str, T]):
    """The last few values by key; the oldest goes first."""

    def __init__(self, most: int = KEPT) -> None:
        super().__init__()
        self.most = most

    def keep(self, key: str, value: T) -> T:
        """Add a value, letting go of the oldest; returns it."""
        self[key] = value
        while len(self) > self.most:
            del self[next(iter(self))]
        return value
