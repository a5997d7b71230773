"""A bfloat16 twin of the model, in which a step computes on a GPU: half the bytes wherever memory is the bound.

Autocast narrows the operands of matrix products alone. Whatever meets a float32 parameter stays float32, and so do the
residual stream, its norms, and their gradients; every weight is converted by a kernel of its own, and its gradient by
another. The public record scripts (openai/parameter-golf) hold the model itself in bfloat16. Here the weights that are
trained, the gradients of a step and the optimizer's state stay float32: before each step the twin takes the weights,
all in a few kernels, and after each backward it gives its gradients back the same way. What rounds is what rounds in
the scripts: the stream, and the gains that are applied to it. Logits and the loss are float32 all the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from trainer.config import Stream
from trainer.model.attention import Attention
from trainer.model.gpt import GolfGPT


def narrow_stream(choice: Stream, device: torch.device, autocast: torch.dtype | None) -> bool:
    """Return whether a step computes in bfloat16 throughout: "auto" does on a GPU under bfloat16 autocast.

    Raises SettingsError for "bf16" without that autocast.
    """
    if choice == "bf16" and autocast != torch.bfloat16:
        raise SettingsError(
            'run.stream = "bf16" acts only where products are bfloat16 too', hint="set run.precision = bf16 as well"
        )
    return choice == "bf16" or (choice == "auto" and device.type == "cuda" and autocast == torch.bfloat16)


@dataclass
class Pair:
    """A parameter, and where the twin has it."""

    wide: nn.Parameter
    narrow: Tensor  # the twin's parameter, or its rows
    holder: nn.Parameter  # the twin's parameter
    rows: slice | None = None  # of the holder, where it is not the whole of it

    def gradient(self) -> Tensor | None:
        """Return the twin's gradient of this parameter."""
        gradient = self.holder.grad
        return gradient if gradient is None or self.rows is None else gradient[self.rows]


class Twin:
    """The twin, and what passes between it and the model. Its projections to q, k and v are one product a layer."""

    def __init__(
        self,
        model: GolfGPT,
        seq_len: int,  # of a step's windows
    ) -> None:
        self.model = model
        pairs: dict[int, Pair] = {}
        for wide in model.parameters():
            own = nn.Parameter(wide.detach().to(torch.bfloat16), wide.requires_grad)
            pairs[id(wide)] = Pair(wide, own, own)
        self.module = copy.deepcopy(model, {key: pair.holder for key, pair in pairs.items()})
        for attention, narrow in zip(model.modules(), self.module.modules(), strict=True):
            if isinstance(attention, Attention) and isinstance(narrow, Attention):
                self._stack_projections(attention, narrow, pairs)
        self.module.fix_angles(seq_len, model.skip_weights.device, torch.bfloat16)
        self.pairs = list(pairs.values())
        self.holders = list({id(pair.holder): pair.holder for pair in self.pairs}.values())

    def _stack_projections(self, wide: Attention, narrow: Attention, pairs: dict[int, Pair]) -> None:
        """Have the twin compute q, k and v by one parameter, and say which rows of it are whose."""
        begin = 0
        for projection, rows in zip((wide.q, wide.k, wide.v), narrow.stack_projections(), strict=False):
            assert narrow.qkv is not None
            place = slice(begin, begin := begin + len(rows))
            pair = pairs[id(projection.weight)]
            pairs[id(projection.weight)] = replace(pair, narrow=rows, holder=narrow.qkv, rows=place)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the model's weights to the twin, and take its graph and its attention."""
        self.module.set_graph(self.model.graph)
        self.module.attention_backend = self.model.attention_backend
        narrow, wide = [pair.narrow for pair in self.pairs], [pair.wide.detach() for pair in self.pairs]
        torch._foreach_copy_(narrow, wide)

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Add the twin's gradients to the model's, in float32, and clear them; what has none is left alone."""
        given = [(pair.wide, own) for pair in self.pairs if (own := pair.gradient()) is not None]
        if not given:
            return
        widened = [torch.empty_like(wide) for wide, _ in given]
        torch._foreach_copy_(widened, [gradient for _, gradient in given])
        before = [(wide.grad, own) for (wide, _), own in zip(given, widened, strict=True) if wide.grad is not None]
        if before:
            torch._foreach_add_([sums for sums, _ in before], [own for _, own in before])
        for (wide, _), own in zip(given, widened, strict=True):
            if wide.grad is None:
                wide.grad = own
        for holder in self.holders:
            holder.grad = None
