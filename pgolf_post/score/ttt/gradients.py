"""Gradients of the mean loss over sequences, the same whatever the number of ranks that share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from pgolf_post.base.autocast import autocast_to
from pgolf_post.base.copying import to_device
from pgolf_post.base.ranks import Ranks
from pgolf_post.errors import PgolfError, VerificationError
from pgolf_post.families import LanguageModel
from pgolf_post.score.nats import target_nats
from pgolf_post.score.plain import BATCH_TOKENS
from pgolf_post.score.spans import fitting, is_out_of_memory

IGNORED = -1  # the target of a padded position
PROBE_TOKENS = 8

Sequence = tuple[np.ndarray, np.ndarray]  # inputs and targets, each (length,)


def cut_sequences(tokens: np.ndarray, seq_len: int) -> list[Sequence]:  # tokens: (n + 1,) → n targets
    """Return neighbouring sequences of at most seq_len inputs, each with its targets."""
    starts = range(0, len(tokens) - 1, seq_len)
    return [(tokens[i : i + seq_len][: len(tokens) - 1 - i], tokens[i + 1 : i + seq_len + 1]) for i in starts]


def pad(sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (batch, longest) int64 each; padding stands at the end, with target IGNORED."""
    longest = max(len(inputs) for inputs, _ in sequences)
    inputs = np.zeros((len(sequences), longest), dtype=np.int64)
    targets = np.full((len(sequences), longest), IGNORED, dtype=np.int64)
    for row, (own_inputs, own_targets) in enumerate(sequences):
        inputs[row, : len(own_inputs)], targets[row, : len(own_targets)] = own_inputs, own_targets
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def micro_batches(sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    """Yield parts of one step of about `batch_tokens` tokens, or one sequence, which fit in memory at once."""
    longest = max((len(inputs) for inputs, _ in sequences), default=1)
    size = max(1, batch_tokens // longest)
    for first in range(0, len(sequences), size):
        yield sequences[first : first + size]


@torch.enable_grad()
def backward(
    module: LanguageModel,
    parameters: Mapping[str, Tensor],
    sequences: list[Sequence],
    ranks: Ranks,
    autocast: torch.dtype | None = None,  # of the forward's products
) -> None:
    """Set gradients of the mean nats per target, the same on every rank; each rank takes a part of the sequences.

    Raises PgolfError naming the setting to lower where memory runs out.
    """
    own = [sequences[number] for number in ranks.share(range(len(sequences)))]
    total = sum(len(targets) for _, targets in sequences)
    device = next(module.parameters()).device
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for part in micro_batches(own, fitting(BATCH_TOKENS, module)):
            inputs, targets = pad(part)
            real = (targets.flatten() != IGNORED).nonzero().squeeze(1)  # found here: a GPU would be waited for
            inputs, wanted, places = (to_device(x, device) for x in (inputs, targets.flatten()[real], real))
            with autocast_to(device, autocast):
                nats = target_nats(module, module.hidden(inputs).flatten(0, 1)[places], wanted)
            (nats.sum() / total).backward()
        sum_gradients(parameters, ranks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PgolfError(
            f"out of memory while training on {len(part)} sequences of {inputs.size(1)} tokens",
            hint=f"train on shorter or fewer sequences: --seq-len {inputs.size(1) // 2}, or --set train_batch_seqs=1",
        ) from None
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


@torch.no_grad()
def sum_gradients(parameters: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Add up gradients over ranks, in one message; a rank without a sequence adds zeros."""
    if ranks.world_size == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters.values()])
    ranks.sum_(flat)
    for parameter, gradient in zip(
        parameters.values(), flat.split([p.numel() for p in parameters.values()]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def synthetic_tokens(module: LanguageModel, count: int = PROBE_TOKENS) -> Tensor:  # (2, count)
    """Return made-up token ids for a check before anything is scored; ids 2 and 3 are no BOS in any vocabulary."""
    device = next(module.parameters()).device
    ids = torch.arange(2 * count, device=device).view(2, count)
    return 2 + ids % 2


def require_same_forward(module: LanguageModel) -> None:
    """Raise VerificationError unless the forward that is trained is, bit for bit, the one that scores."""
    tokens = synthetic_tokens(module)
    with torch.no_grad():
        scoring = module.logits(module.hidden(tokens))
    with torch.enable_grad():
        training = module.logits(module.hidden(tokens)).detach()
    if not torch.equal(scoring, training):
        worst = float((scoring - training).abs().max())
        raise VerificationError(
            f"the model's forward with gradients is not the one that scores: logits differ by {worst:g}"
        )
