"""Heads that predict later tokens while training, and are dropped at the end: `loss.future_tokens`.

Head j reads the same hidden state as the model's own head and predicts the token j places further on, with a matrix of
its own (Gloeckle et al. 2024, arXiv:2404.19737, with linear heads as in public scripts of the challenge). The heads
start at zero. They are trained and resumed with the run, in training.safetensors, and are no part of the model: neither
a checkpoint's weights nor its averages have them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from trainer.config import Recipe
from trainer.model.gpt import GolfGPT


class FutureHeads(nn.Module):
    """One matrix for each later token."""

    def __init__(self, model: GolfGPT, num_heads: int) -> None:
        super().__init__()
        table = model.tok_emb.weight  # (vocab_size, embedding_dim)
        zeros = (torch.zeros(table.shape, dtype=table.dtype, device=table.device) for _ in range(num_heads))
        self.weights = nn.ParameterList([nn.Parameter(matrix) for matrix in zeros])
        self.softcap = model.config.logit_softcap

    def nats(
        self,
        hidden: Tensor,  # (batch, seq_len, embedding_dim), the head's input
        targets: Tensor,  # (batch, seq_len) int64, the next token of each position
    ) -> Tensor:  # () at least float32
        """Return the mean over heads of their mean nats, over positions whose later token is in the window."""
        each = []
        for ahead, weight in enumerate(self.weights, start=1):
            z = F.linear(hidden[:, :-ahead], weight.to(hidden.dtype))
            logits = self.softcap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / self.softcap)
            each.append(F.cross_entropy(logits.flatten(0, 1), targets[:, ahead:].flatten()))
        return torch.stack(each).mean()


class WithHeads(nn.Module):
    """A model and heads as one module that shares their parameters, under the model's own names."""

    def __init__(self, model: nn.Module, heads: FutureHeads) -> None:
        super().__init__()
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in model.named_children():
            self.add_module(name, child)
        self.future = nn.ModuleList([_Holder(weight) for weight in heads.weights])


class _Holder(nn.Module):
    """A matrix under the name `weight`, by which the optimizer knows matrices."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def future_heads(recipe: Recipe, model: GolfGPT) -> FutureHeads | None:
    """Return the heads of a recipe; None without. Raises SettingsError for windows without such late tokens."""
    count = recipe.loss.future_tokens
    shortest = min(stage.seq_len for stage in recipe.stages)
    if count >= shortest:
        raise SettingsError(
            f"loss.future_tokens {count}: windows of {shortest} tokens have no token so far ahead",
            hint=f"take at most {shortest - 1}",
        )
    return FutureHeads(model, count) if count else None


def with_heads(recipe: Recipe, model: GolfGPT) -> nn.Module:
    """Return what a recipe trains: the model, with heads of later tokens where it has them. Raises SettingsError."""
    heads = future_heads(recipe, model)
    return WithHeads(model, heads) if heads else model


def state_of(heads: FutureHeads | None) -> dict[str, Tensor]:
    """Return the heads as tensors of training.safetensors; none without heads."""
    each = () if heads is None else heads.weights
    return {f"future.{number}.weight": weight.detach() for number, weight in enumerate(each)}


@torch.no_grad()
def load_heads(heads: FutureHeads | None, tensors: Mapping[str, Tensor]) -> None:
    """Take what `state_of` returned. The optimizer, which has their moments, is loaded first and misses what lacks."""
    for name, weight in state_of(heads).items():
        weight.copy_(tensors[name])
