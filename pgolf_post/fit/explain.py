"""Bytes of an artifact by tensor, and the loss that more of them would save in each.

At equal slope a byte buys the same loss in every tensor: of a tensor with N weights and a predicted loss of L, one more
bit for each weight quarters L, so ∂L/∂bytes = -2·ln 2·L·8/N. Where slopes differ, the solver was not free: a floor, a
limit on κ or on rows, steps so coarse that the quadratic model no longer holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One tensor, or one role."""

    name: str
    role: str
    num_weights: int
    bits: float  # of all symbols, order-0 entropy
    loss: float  # predicted, κ included, nats per token

    @property
    def bits_per_weight(self) -> float:
        return self.bits / max(1, self.num_weights)

    @property
    def slope(self) -> float:
        """Nats per token that 100 KB more would save, at the margin."""
        return 2 * math.log(2) * self.loss * 8 / max(1, self.num_weights) * 1e5


def explain(
    tensors: Sequence[Mapping[str, Any]],  # name, role, weights, entropy_bits, predicted_loss
    kappa: Mapping[str, float],
) -> list[Row]:
    """Return one row per tensor, in order."""
    rows = []
    for facts in tensors:
        count, loss = int(facts["weights"]), float(facts["predicted_loss"]) * kappa.get(str(facts["name"]), 1.0)
        rows.append(Row(str(facts["name"]), str(facts["role"]), count, float(facts["entropy_bits"]) * count, loss))
    return rows


def by_role(rows: Sequence[Row]) -> list[Row]:
    """Add rows up by role."""
    roles = dict.fromkeys(row.role for row in rows)
    return [_total(role, [row for row in rows if row.role == role]) for role in roles]


def _total(role: str, rows: Sequence[Row]) -> Row:
    weights, bits, loss = (sum(getattr(row, key) for row in rows) for key in ("num_weights", "bits", "loss"))
    return Row(f"{len(rows)} × {role}" if len(rows) > 1 else rows[0].name, role, weights, bits, loss)
