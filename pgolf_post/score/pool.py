"""One built (and compiled) model for many sets of weights.

Building and compiling cost far more than copying 36M numbers. Weights of the same config are copied into the module
that is there, in place, so that what torch.compile made of it stays valid. Warm-up runs on made-up tokens: nothing of
the text is seen before it is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from pgolf_post.families import LanguageModel, check_tensors, load_module, swap_weights
from pgolf_post.score.phase_times import PhaseTimes
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.protocols import Protocol, protocol_spans
from pgolf_post.score.spans import Span, batches_of, computing_in, fitting, num_targets
from pgolf_post.score.ttt.settings import TTTProtocol
from pgolf_post.settings import canonical_json


class CompiledModel:
    """A language model whose `hidden` and `logits` torch.compile has made; shapes are fixed, one graph for each.

    Once it is told the shape of its largest batch, smaller ones are padded to it at their ends, where no position that
    is read can see it. So a whole text takes one graph of `hidden`, which takes a minute to compile.
    """

    def __init__(self, module: Any, backend: str) -> None:
        self.module = module
        self.largest: tuple[int, int] | None = None  # windows, length
        self._hidden = torch.compile(module.hidden, backend=backend, dynamic=False)
        self.logits = torch.compile(module.logits, backend=backend, dynamic=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the head's input: (batch, seq_len) int64 → (batch, seq_len, dim)."""
        windows, length = tokens.shape
        if self.largest is None or windows > self.largest[0] or length > self.largest[1]:
            hidden: Tensor = self._hidden(tokens)
            return hidden
        padded = tokens.new_zeros(self.largest)
        padded[:windows, :length] = tokens
        hidden = self._hidden(padded)
        return hidden[:windows, :length]

    def parameters(self) -> Iterator[Tensor]:
        yield from self.module.parameters()


class ModelPool:
    """A pool of one: the last module, into which weights of the same config go in place."""

    def __init__(self, compiled: bool = False, backend: str = "inductor") -> None:
        self.compiled, self.backend = compiled, backend
        self._key = b""
        self._module: nn.Module | None = None
        self._model: Any = None
        self._warm: set[tuple[str, int, int, int]] = set()  # (precision, batch, length, scored) that have run

    def load(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, device: torch.device
    ) -> Any:  # a LanguageModel
        """Return a model that holds `tensors`. Raises MismatchError if they do not fit the config."""
        key = canonical_json({"family": config["family"], "model": config["model"], "graph": config["graph"]})
        if self._module is not None and key == self._key:
            check_tensors(self._module, tensors, source)
            swap_weights(self._module, tensors)
        else:
            module = load_module(config, {name: tensor.clone() for name, tensor in tensors.items()}, source)
            self._module = module.to(device)
            self._model = CompiledModel(self._module, self.backend) if self.compiled else self._module
            self._key, self._warm = key, set()
        return self._model

    def warm_up(self, model: LanguageModel, protocol: Protocol, num_tokens: int, clock: PhaseTimes) -> None:
        """Compile for every shape of batch that a pass will have. Raises SettingsError for a protocol that learns."""
        if not self.compiled:
            return
        if isinstance(protocol, TTTProtocol):
            raise SettingsError("--compile is for protocols that do not learn; adapters hang on the eager forward")
        spans = protocol_spans(protocol, num_targets(num_tokens, protocol.seq_len, protocol.tail))
        size = fitting(BATCH_TOKENS, model)
        shapes = {(len(batch), batch[0].length, batch[0].scored): batch[0] for batch in batches_of(spans, size)}
        self._model.largest = tuple(max(shape[i] for shape in shapes) for i in (0, 1))
        with clock.phase("compile"), torch.no_grad(), computing_in(protocol.precision, model):
            for shape, span in shapes.items():
                if (protocol.precision, *shape) not in self._warm:
                    self._run(model, shape[0], span)
                    self._warm.add((protocol.precision, *shape))

    def _run(self, model: LanguageModel, batch: int, span: Span) -> None:
        device = next(model.parameters()).device
        tokens = torch.full((batch, span.length), 2, device=device)
        model.logits(model.hidden(tokens)[:, -span.scored :].flatten(0, 1))
