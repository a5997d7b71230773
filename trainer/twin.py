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

import torch
from torch import nn

from pgolf_post.errors import SettingsError
from trainer.config import Stream
from trainer.model import GolfGPT


def narrow_stream(choice: Stream, device: torch.device, autocast: torch.dtype | None) -> bool:
    """Return whether a step computes in bfloat16 throughout: "auto" does on a GPU under bfloat16 autocast.

    Raises SettingsError for "bf16" without that autocast.
    """
    if choice == "bf16" and autocast != torch.bfloat16:
        raise SettingsError(
            'run.stream = "bf16" acts only where products are bfloat16 too', hint="set run.precision = bf16 as well"
        )
    return choice == "bf16" or (choice == "auto" and device.type == "cuda" and autocast == torch.bfloat16)


class Twin:
    """The twin, and what passes between it and the model."""

    def __init__(self, model: GolfGPT) -> None:
        self.model = model
        self.pairs = [
            (wide, nn.Parameter(wide.detach().to(torch.bfloat16), wide.requires_grad)) for wide in model.parameters()
        ]
        self.module = copy.deepcopy(model, {id(wide): narrow for wide, narrow in self.pairs})

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the model's weights to the twin, and take its graph and its attention."""
        self.module.set_graph(self.model.graph)
        self.module.attention_backend = self.model.attention_backend
        torch._foreach_copy_([narrow for _, narrow in self.pairs], [wide.detach() for wide, _ in self.pairs])

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Add the twin's gradients to the model's, in float32, and clear them; what has none is left alone."""
        pairs = [(wide, narrow.grad) for wide, narrow in self.pairs if narrow.grad is not None]
        if not pairs:
            return
        widened = [torch.empty_like(wide) for wide, _ in pairs]
        torch._foreach_copy_(widened, [gradient for _, gradient in pairs])
        before = [(wide.grad, own) for (wide, _), own in zip(pairs, widened, strict=True) if wide.grad is not None]
        if before:
            torch._foreach_add_([sums for sums, _ in before], [own for _, own in before])
        for (wide, _), own in zip(pairs, widened, strict=True):
            if wide.grad is None:
                wide.grad = own
        for _, narrow in self.pairs:
            narrow.grad = None
