"""A bfloat16 twin of the model, in which a step computes on a GPU: half the bytes wherever memory is the bound.

Autocast narrows the operands of matrix products alone. Whatever meets a float32 parameter stays float32, and so do the
residual stream, its norms, and their gradients; every weight is converted by a kernel of its own, and its gradient by
another. The public record scripts (openai/parameter-golf) hold the model itself in bfloat16. Here the weights that are
trained, the gradients of a step and the optimizer's state stay float32: before each step the twin takes the weights,
all in a few kernels, and after each backward it gives its gradients back the same way. What rounds is what rounds in
the scripts: the stream, and the gains that are applied to it. Logits and the loss are float32 all the same.

The twin also computes in forms that launch fewer kernels (`docs/results/gpu.md` counts them): one product for q, k and
v, and one kernel to norm and turn q and k. A gain right after a matrix, as of attention and of the MLP, is a factor of
the matrix's rows before both are rounded: its gradient is then a sum over a row of weights, not over all positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from trainer.config import Stream
from trainer.model.block import Block
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
    holder: nn.Parameter  # the twin's parameter
    rows: slice | EllipsisType = ...  # of the holder; all

    def gradient(self) -> Tensor | None:
        """Return the twin's gradient of this parameter."""
        gradient = self.holder.grad
        return None if gradient is None else gradient[self.rows]


@dataclass
class Folded:
    """Matrices of one shape that hold gains of their rows in the twin, as few tensors of all of them."""

    weights: list[nn.Parameter]  # the model's, each (rows, columns)
    scales: list[nn.Parameter]  # the model's, each (rows,)
    holders: list[nn.Parameter]  # the twin's scaled weights

    def scaled(
        self,
        stacked_scales: Tensor,  # (matrices, rows, 1)
    ) -> list[Tensor]:  # each (rows, columns) float32
        """Return the weights times their scales, and keep both as they are now."""
        self.stacked_weights = torch.stack([weight.detach() for weight in self.weights])
        self.stacked_scales = stacked_scales
        return list((self.stacked_weights * stacked_scales).unbind())

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield float32 gradients of weights and scales: of W' = s·W, dW = s·dW' and ds the sums of rows of W·dW'."""
        places = [place for place, holder in enumerate(self.holders) if holder.grad is not None]
        if not places:
            return
        stacked = self.stacked_weights, self.stacked_scales
        weights, scales = (x[places] if len(places) < len(x) else x for x in stacked)
        given = torch.stack([gradient for holder in self.holders if (gradient := holder.grad) is not None])
        yield from zip((self.weights[place] for place in places), scales * given, strict=True)
        yield from zip((self.scales[place] for place in places), (weights * given).sum(-1), strict=True)


class Twin:
    """The twin, and what passes between it and the model."""

    def __init__(
        self,
        model: GolfGPT,
        seq_len: int,  # of a step's windows
    ) -> None:
        self.model = model
        pairs: dict[int, Pair] = {}
        for wide in model.parameters():
            own = nn.Parameter(wide.detach().to(torch.bfloat16), wide.requires_grad)
            pairs[id(wide)] = Pair(wide, own)
        self.module = copy.deepcopy(model, {key: pair.holder for key, pair in pairs.items()})
        self.folded = self._merge(pairs)
        self.module.few_kernels = True
        self.module.fix_angles(seq_len, model.skip_weights.device, torch.bfloat16)
        self.pairs = list(pairs.values())

    def _merge(self, pairs: dict[int, Pair]) -> list[Folded]:
        """Have the twin compute q, k and v by one parameter, and its matrices hold the gains that follow them.

        Say where the first now are, take the others from the pairs, and return them.
        """
        groups: dict[torch.Size, Folded] = {}
        for wide, narrow in zip(self.model.blocks, self.module.blocks, strict=True):
            assert isinstance(wide, Block)
            assert isinstance(narrow, Block)
            for name, place in (narrow.attn.stack_projections() if narrow.has_attention else {}).items():
                parameter = wide.attn.get_parameter(name)
                pairs[id(parameter)] = Pair(parameter, *place)
            for names in narrow.fold_scales().items():
                scale, weight = (wide.get_parameter(name) for name in names)
                group = groups.setdefault(weight.shape, Folded([], [], []))
                group.weights.append(weight)
                group.scales.append(scale)
                group.holders.append(narrow.get_parameter(names[1]))
                del pairs[id(weight)], pairs[id(scale)]
        return list(groups.values())

    @torch.no_grad()
    def take_weights(self) -> None:
        """Round the model's weights to the twin, and take its graph and its attention."""
        self.module.set_graph(self.model.graph)
        self.module.attention_backend = self.model.attention_backend
        narrow = [pair.holder.detach()[pair.rows] for pair in self.pairs]
        wide = [pair.wide.detach() for pair in self.pairs]
        if self.folded:
            scales = torch.stack([scale.detach() for group in self.folded for scale in group.scales]).unsqueeze(-1)
            for group, own in zip(self.folded, scales.split([len(group.scales) for group in self.folded]), strict=True):
                narrow += [holder.detach() for holder in group.holders]
                wide += group.scaled(own)
        torch._foreach_copy_(narrow, wide)

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Add the twin's gradients to the model's, in float32, and clear them; what has none is left alone."""
        given = [(pair.wide, own) for pair in self.pairs if (own := pair.gradient()) is not None]
        widened = [torch.empty_like(wide) for wide, _ in given]
        if given:
            torch._foreach_copy_(widened, [gradient for _, gradient in given])
        found = list(zip([wide for wide, _ in given], widened, strict=True))
        found += [pair for group in self.folded for pair in group.gradients()]
        before = [(wide.grad, own) for wide, own in found if wide.grad is not None]
        if before:
            torch._foreach_add_([sums for sums, _ in before], [own for _, own in before])
        for wide, own in found:
            if wide.grad is None:
                wide.grad = own
        self.module.zero_grad()
