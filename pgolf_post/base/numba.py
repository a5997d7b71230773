"""Choice between compiled and plain loops: numba's (extra `fast`) give the same symbols in less time."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pgolf_post.errors import NotFoundError

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache
def has_numba() -> bool:
    """Return whether numba can be imported."""
    return find_spec("numba") is not None


def use_compiled(wanted: bool | None, tensor: Tensor | None = None) -> bool:
    """Return whether to run compiled kernels: as `wanted`, or if that is None, wherever they can run.

    They can run where numba is installed and the tensor, if there is one, is on the CPU. Raises NotFoundError if they
    are wanted elsewhere.
    """
    device = "cpu" if tensor is None else tensor.device.type
    possible = has_numba() and device == "cpu"
    if wanted and not possible:
        raise NotFoundError(
            f"compiled kernels need numba and tensors on the CPU (numba {'is' if has_numba() else 'is not'} "
            f"installed, tensors on {device})",
            hint="pip install 'pgolf-post[fast]'",
        )
    return possible if wanted is None else wanted
