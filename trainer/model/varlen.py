"""Parameters of this torch's variable-length attention.

A module of its own, imported where varlen is meant: torch loads its compiler along with `torch.nn.attention.varlen`,
which would cost every command that opens a model more than a second.
"""

from __future__ import annotations

import importlib.util
import inspect


def _parameters() -> frozenset[str]:
    """Return the names of the parameters that this torch's varlen_attn has; none where there is no varlen_attn."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


PARAMETERS = _parameters()
