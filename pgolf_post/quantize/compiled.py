"""Whether to use the compiled kernels: where numba (extra `fast`) is installed. They give the same symbols, sooner."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

from pgolf_post.errors import NotFoundError


@lru_cache
def has_numba() -> bool:
    """Whether numba can be imported."""
    return find_spec("numba") is not None


def use_compiled(wanted: bool | None, tensor: Tensor) -> bool:
    """`wanted`, or if None: numba is installed and the tensor is on the CPU.

    Raises NotFoundError if compiled kernels are asked for where they cannot run.
    """
    possible = has_numba() and tensor.device.type == "cpu"
    if wanted and not possible:
        raise NotFoundError(
            f"compiled kernels need numba and tensors on the CPU (numba {'is' if has_numba() else 'is not'} "
            f"installed, tensor on {tensor.device})",
            hint="pip install 'pgolf-post[fast]'",
        )
    return possible if wanted is None else wanted
