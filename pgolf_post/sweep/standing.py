"""A sweep as it stands, as plain facts: what is asked for, and the rows there are."""

from __future__ import annotations

from dataclasses import dataclass

from pgolf_post.ledger import Row
from pgolf_post.sweep.listed import Listed
from pgolf_post.sweep.settings import SweepSpec


@dataclass
class Standing:
    """The spec, its trials, and the rows there are by trial id."""

    spec: SweepSpec
    listed: list[Listed]
    rows: dict[str, Row]

    @property
    def open(self) -> list[Listed]:
        return [one for one in self.listed if one.id not in self.rows]
