"""The backward half (`--fisher`): sensitivity of the loss to errors, per row of each matrix and per token.

At every token a label ŷ is drawn from the model's own distribution, and the loss L = Σ_t -log p_t(ŷ_t) is
differentiated once. Labels drawn from the model make this the true Fisher information, not the empirical one: given the
text, the score of each label has mean zero and the labels are independent, so the cross terms between tokens in
(∂L/∂z)² vanish in expectation, and one backward pass per batch is an unbiased estimate of what one pass per token would
sum to.

With z = Wx at one token of one visit and δ = ∂L/∂z:

    rows       Σδ² per output row, over tokens and visits
    weighted   Σ s·xxᵀ, s = the token's mean of δ² over the rows of W: the Hessian with each token weighted by the
               loss's sensitivity to it. It is GuidedQuant's Hessian (arXiv 2505.07004) with all rows in one group and,
               up to a constant, the first step of YAQA's power iteration for the input factor of the Fisher matrix
               (arXiv 2505.22988). It pairs the δ of each visit of a looped layer with the x of that visit, which a
               product of marginal sums cannot.
    outputs    Σδδᵀ: how errors of different rows act on the loss together, the output factor of the Fisher matrix.
               Weighting tokens by |x|² as well made no difference. Left out for the head: it would be (vocab, vocab).

The head needs no sample: over ŷ ~ p the mean of δ_v² is p(v)(1 - p(v))·cap'(z_v)², with cap' the slope of the logit
soft-cap; its rows and its s use that mean. The slope and its product with the residual p - 1[ŷ] come from the model's
own `logits` by autograd. A lookup table (the other side of a tied embedding) has no input vector: its error enters
where a row is looked up. So its sums are each row's count, Σg² (mean over columns) and Σggᵀ over all lookups, with
g = ∂L/∂(the looked-up row).
Where the model detaches a path from the gradient (a frozen carry), δ leaves that path out too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pgolf_post.calibrate.forward import add_head_input, hooks, observed_inputs
from pgolf_post.calibrate.products import token_means
from pgolf_post.calibrate.sums import Sums
from pgolf_post.errors import SettingsError
from pgolf_post.families import Lookup, Site

HEAD_TOKENS = 1024  # logits of this many tokens exist at a time


def sample_labels(
    probabilities: Tensor,  # (tokens, vocab)
    uniforms: Tensor,  # (tokens,) float64 in [0, 1)
) -> Tensor:  # (tokens,) int64
    """Draw a label per token: where its cumulative distribution passes its uniform number."""
    cumulative = probabilities.double().cumsum(-1)
    targets = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_(max=probabilities.size(-1) - 1)


@contextlib.contextmanager
def observed_gradients(module: nn.Module, sites: Sequence[Site], sums: Sums) -> Iterator[None]:
    """Add the δ of every matrix product inside the block to `sums` when the backward pass reaches it."""

    def hook_for(tensor: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)  # (tokens, in): this visit's
            output.register_hook(lambda gradient: _add_delta(sums, tensor, x, gradient.flatten(0, -2)))

        return hook

    products = [(site.output_of(tensor), tensor) for site in sites if not site.is_head for tensor in site.tensors]
    with hooks(module.get_submodule(path).register_forward_hook(hook_for(tensor)) for path, tensor in products):
        yield


def _add_delta(sums: Sums, tensor: str, x: Tensor, delta: Tensor) -> None:  # (tokens, in), (tokens, out)
    delta = delta.detach().float()
    sums.add_gram(f"weighted.{tensor}", x.float() * token_means(delta).sqrt()[:, None])
    sums.add(f"rows.{tensor}", sums.add_gram(f"outputs.{tensor}", delta))


@contextlib.contextmanager
def observed_lookups(module: nn.Module, lookups: Sequence[Lookup], sums: Sums) -> Iterator[None]:
    """Make looked-up rows the leaves of the graph inside the block, and add the gradients that reach them to `sums`."""

    def hook_for(lookup: Lookup) -> Callable[..., Tensor]:
        num_rows = module.get_parameter(lookup.tensor).size(0)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            indices, rows = inputs[0].flatten(), output.detach().requires_grad_()
            rows.register_hook(lambda gradient: _add_lookup(sums, lookup.tensor, num_rows, indices, gradient))
            return rows

        return hook

    with hooks(module.get_submodule(lookup.module).register_forward_hook(hook_for(lookup)) for lookup in lookups):
        yield


def _add_lookup(sums: Sums, table: str, num_rows: int, indices: Tensor, gradient: Tensor) -> None:
    g = gradient.detach().flatten(0, -2).float()  # (tokens, width)
    sums.add_gram(f"lookup.{table}", g)
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=g.device)
    sums.add(f"counts.{table}", zeros.index_add(0, indices, torch.ones_like(indices, dtype=torch.float64)))
    sums.add(f"lookup_rows.{table}", zeros.index_add(0, indices, token_means(g).double()))


def head_gradient(
    module: Any,  # a LanguageModel
    head: Site,
    hidden: Tensor,  # (tokens, dim), detached
    uniforms: Tensor,  # (tokens,) float64
    sums: Sums,
) -> Tensor:  # (tokens, dim): ∂L/∂hidden
    """Draw a label for each token, add the head's statistics, and return the gradient to start the backward pass."""
    (tensor,) = head.tensors
    products: list[Tensor] = []
    submodule = module.get_submodule(head.output_of(tensor))
    gradients = []
    with hooks([submodule.register_forward_hook(lambda _, __, output: products.append(output))]):
        for piece, numbers in zip(hidden.split(HEAD_TOKENS), uniforms.split(HEAD_TOKENS), strict=True):
            x = piece.detach().requires_grad_()
            logits, z = module.logits(x), products.pop()  # (tokens, vocab)
            p = torch.softmax(logits.detach().float(), -1)
            (slope,) = torch.autograd.grad(logits, z, torch.ones_like(logits), retain_graph=True)
            residual = p.scatter_add(1, sample_labels(p, numbers)[:, None], -torch.ones_like(p[:, :1]))
            gradients.append(torch.autograd.grad(logits, x, residual.to(logits.dtype))[0])
            _add_head(sums, tensor, x.detach(), p * (1 - p) * slope.float().square())
    return torch.cat(gradients)


def _add_head(sums: Sums, tensor: str, x: Tensor, variance: Tensor) -> None:  # (tokens, dim), (tokens, vocab)
    sums.add(f"rows.{tensor}", variance.sum(0))
    sums.add_gram(f"weighted.{tensor}", x.float() * variance.mean(1).sqrt()[:, None])


def fisher_batch(
    module: Any,  # a LanguageModel whose parameters need no gradient
    sites: Sequence[Site],
    lookups: Sequence[Lookup],
    tokens: Tensor,  # (batch, seq_len) int64, on the module's device
    uniforms: Tensor,  # (batch, seq_len) float64 in [0, 1), on the module's device
    sums: Sums,
) -> None:
    """Run one batch forward and backward; add both halves. Raises SettingsError if the family names no head."""
    heads = [site for site in sites if site.is_head]
    if len(heads) != 1 or not lookups:
        raise SettingsError(
            f"the model family names {len(heads)} heads and {len(lookups)} lookup tables; --fisher needs one head and "
            "at least one table",
            hint="set is_head and outputs on the head's Site, and implement lookups() in the family",
        )
    # forward with hooks, the head's gradient by hand, and from there backward through the rest
    with (
        torch.enable_grad(),
        observed_inputs(module, sites, sums),
        observed_gradients(module, sites, sums),
        observed_lookups(module, lookups, sums),
    ):
        hidden = module.hidden(tokens)
        add_head_input(sums, sites, hidden)
        start = head_gradient(module, heads[0], hidden.detach().flatten(0, 1), uniforms.flatten(), sums)
        hidden.backward(start.view_as(hidden).to(hidden.dtype))
    sums.add("tokens.all", torch.full((), tokens.numel(), dtype=torch.float64, device=tokens.device))
