"""Reports of a watched forward pass: residual streams, additions, hidden units, attention.

A family lets itself be watched (`ModelFamily.watch`): it hooks its own module and calls a Watcher as the pass goes on.
The toolkit measures from these reports alone and needs no second forward pass. Visits of a block are counted from 1;
a block that is looped is visited several times in a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

Branch = Literal["attention", "mlp"]


class Watcher(Protocol):
    """The receiver of reports. Tensors are the pass's own: they must not be changed."""

    def enters(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        """Report the residual before a visit: one (batch, seq_len, dim) stream, or attention's lane and the MLP's."""

    def adds(self, layer: int, visit: int, branch: Branch, addition: Tensor) -> None:
        """Report what attention or MLP adds to its stream: (batch, seq_len, dim)."""

    def leaves(self, layer: int, visit: int, streams: Sequence[Tensor]) -> None:
        """Report the residual after a visit, as in `enters`."""

    def fires(self, mlp: str, layer: int, inputs: Tensor, outputs: Tensor) -> None:
        """Report an MLP's units before and after their activation: both (batch, seq_len, units)."""

    def attends(self, layer: int, visit: int, q: Tensor, k: Tensor, within: Tensor | None) -> None:
        """Report queries (batch, heads, seq_len, head_dim), keys (batch, kv_heads, …) and who may see whom.

        `within` is (batch, 1, seq_len, seq_len) bool, or None for all of the past. The scale is 1/√head_dim.
        """
