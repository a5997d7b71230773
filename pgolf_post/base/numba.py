"""Compiled inner loops, and the choice between them and plain ones: the same symbols, up to a thousand times as fast.

numba compiles a loop when it is first called and keeps the machine code on disk, so that the next process loads it in
no time: beside the source where that folder can be written, else in the user's cache folder, else not at all. A full
disk or a damaged cache file costs the seconds of compiling again, never the result. Where numba cannot be loaded (no
build for this Python, a damaged install), one line says so and plain loops run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pgolf_post.base.progress import say
from pgolf_post.errors import NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

REINSTALL = "pip install --force-reinstall numba"


@lru_cache
def has_numba() -> bool:
    """Return whether numba can be loaded; if not, print once why, what it costs and what to do."""
    try:
        import numba  # noqa: F401
    except Exception as error:  # a damaged install can fail in any way
        cost = "plain loops run instead, up to a thousand times slower"
        say(f"numba cannot be loaded ({error}): {cost}; next: {REINSTALL}")
        return False
    return True


def use_compiled(wanted: bool | None, tensor: Tensor | None = None) -> bool:
    """Return whether to run compiled kernels: as `wanted`, or if that is None, wherever they can run.

    They can run where numba can be loaded and the tensor, if there is one, is on the CPU. Raises NotFoundError if they
    are wanted elsewhere.
    """
    device = "cpu" if tensor is None else tensor.device.type
    possible = device == "cpu" and wanted is not False and has_numba()
    if wanted and not possible:
        reason = "numba cannot be loaded" if device == "cpu" else f"the tensors are on {device}"
        raise NotFoundError(f"compiled kernels need numba and tensors on the CPU, but {reason}", hint=REINSTALL)
    return possible


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that numba compiles at its first call, without the interpreter lock, cached on disk."""
    import numba

    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # no folder can be written: compile in every process
        dispatcher.enable_caching()
        _forgive(dispatcher._cache)
    return dispatcher


def _forgive(cache: Any) -> None:
    """Make a numba cache treat what it cannot read as absent, and go on where it cannot write."""
    load, save = cache.load_overload, cache.save_overload

    def load_if_possible(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except Exception:  # a torn file can fail in any way while it is read
            return None

    def save_if_possible(*arguments: Any) -> None:
        with suppress(Exception):  # a full disk, or a torn index that is read before it is replaced
            save(*arguments)

    cache.load_overload, cache.save_overload = load_if_possible, save_if_possible
