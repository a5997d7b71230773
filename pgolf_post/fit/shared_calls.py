"""Outputs of a model's parts on one batch, given to models that differ only further on.

Models that differ in one matrix compute the same up to the first part that reads it. So one forward pass keeps what
each part of the model returned, and later ones take that until the first part that reads a changed weight: the same
numbers, bit for bit, for less work.

A part is a submodule that the model itself calls; what it calls in turn belongs to it. Which weights a part reads is
seen while it runs: those of every submodule called in it. A weight that no part reads (the head's, which only `logits`
multiplies) shares nothing. The model must compute alike on every pass: no dropout, no state from call to call, and no
part's matrix multiplied by the model before that part is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """One call of a part."""

    part: nn.Module
    reads: frozenset[int]  # ids of the parameters
    output: Any
    versions: tuple[int, ...]  # of the output's tensors: they count changes in place

    def is_intact(self) -> bool:
        return versions_of(self.output) == self.versions


class SharedCalls:
    """The calls of one forward pass."""

    def __init__(self, module: nn.Module, run: Callable[[], object]) -> None:
        """Run a forward pass and keep what the module's parts return."""
        self.module = module
        self.calls: list[Call] = []
        self._reads: set[int] | None = None  # of the part that runs now
        with replaced_forwards({part: self._recording(part) for part in module.modules() if part is not module}):
            run()

    def num_shared(self, changed: Collection[str]) -> int:  # names of parameters
        """Return how many of the calls return the same with these weights changed: those before the first reader."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        ids = {id(parameters[name]) for name in changed}
        if not ids <= {one for call in self.calls for one in call.reads}:
            return 0
        differing = (i for i, call in enumerate(self.calls) if call.reads & ids or not call.is_intact())
        return next(differing, len(self.calls))

    @contextlib.contextmanager
    def given(self, changed: Collection[str]) -> Iterator[None]:
        """Inside the block one forward pass on the same batch takes the outputs that the changed weights leave alone.

        Raises RuntimeError if the module calls its parts in another order than before.
        """
        remaining = iter(self.calls[: self.num_shared(changed)])
        with replaced_forwards({call.part: _giving(call.part, remaining) for call in self.calls}):
            yield

    def _recording(self, part: nn.Module) -> Forward:
        forward = part.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            own = {id(parameter) for parameter in part.parameters()}
            if self._reads is not None:  # called by another part
                self._reads |= own
                return forward(*args, **kwargs)
            self._reads = own
            try:
                output = forward(*args, **kwargs)
                self.calls.append(Call(part, frozenset(self._reads), output, versions_of(output)))
            finally:
                self._reads = None
            return output

        return record


def _giving(part: nn.Module, remaining: Iterator[Call]) -> Forward:
    """Return a forward that takes the next call's output while there is one, and computes after that."""
    forward = part.forward

    def give(*args: Any, **kwargs: Any) -> Any:
        call = next(remaining, None)
        if call is None:
            return forward(*args, **kwargs)
        if call.part is not part:
            raise RuntimeError(f"{type(part).__name__} was called where {type(call.part).__name__} was before")
        return call.output

    return give


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace submodules' forwards inside the block; hooks run as ever."""
    own = {part: vars(part).get("forward") for part in forwards}  # None: its class's
    try:
        for part, forward in forwards.items():
            vars(part)["forward"] = forward
        yield
    finally:
        for part, before in own.items():
            if before is None:
                vars(part).pop("forward", None)
            else:
                vars(part)["forward"] = before


def versions_of(output: Any) -> tuple[int, ...]:
    """Return the versions of all tensors in a tensor, or in tuples, lists and dicts of them."""
    if isinstance(output, Tensor):
        return (output._version,)
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return tuple(version for part in parts for version in versions_of(part))
