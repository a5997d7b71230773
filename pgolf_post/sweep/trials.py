"""A trial of a sweep before it is run: its settings, its place among the others, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pgolf_post.sweep.settings import TrialSettings

Role = Literal["control", "baseline", "noise", "trial"]


@dataclass(frozen=True)
class Trial:
    """One trial, not yet run."""

    name: str
    role: Role
    settings: TrialSettings
    group: str = ""  # the checkpoint whose control it is compared with
    changes: tuple[tuple[str, Any], ...] = ()  # (dotted key, value)
    axis: str = ""  # the key that alone distinguishes it from its neighbours
    of: str = ""  # of one seed's run: the trial that it is a run of
    seed: int | None = None
    rung: int = 0  # of a halving, from 0

    @property
    def value(self) -> Any:
        """Value of the variant on its axis."""
        return dict(self.changes).get(self.axis)

    def named(self) -> dict[str, Any]:
        """Return what a row says of its trial's place in the sweep."""
        named = {"role": self.role, "changes": dict(self.changes), "axis": self.axis, "group": self.group}
        seeded = {"of": self.of, "seed": self.seed, "rung": self.rung}
        return {**named, **(seeded if self.seed is not None else {})}
