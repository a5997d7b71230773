"""The objective of a run: `trainer.step.loss` with this run's model and vocabulary.

It holds what the formula takes from elsewhere: the weight of every token, which its class in the tokenizer and the
progress decide, and the model's own terms. It exists only where the recipe's table `loss` sets something.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.data import DataFolder
from pgolf_post.errors import SettingsError
from pgolf_post.score.breakdown.token_text import CLASSES, TokenText
from trainer.model.attention import Attention
from trainer.model.attention_backends import Reach
from trainer.model.gpt import GolfGPT
from trainer.step.compiled import LossFunction
from trainer.step.future_heads import FutureHeads
from trainer.step.loss import LossSettings, objective, share_of


class TokenWeights:
    """The weight of every token of the vocabulary as a target, which changes over a ramp."""

    def __init__(self, settings: LossSettings, data: DataFolder, device: torch.device) -> None:
        """Look ids and classes up. Raises SettingsError for an id or a class that the vocabulary does not have."""
        outside = [token for token in settings.ignore_ids if token >= data.vocab_size]
        if outside:
            raise SettingsError(
                f"loss.ignore_ids {outside} are outside the vocabulary of {data.name}, whose ids end at "
                f"{data.vocab_size - 1}",
                hint="leave them out",
            )
        self.ramp = settings.class_weight_ramp
        self.kept = torch.ones(data.vocab_size, dtype=torch.float64)
        self.kept[list(settings.ignore_ids)] = 0
        self.full = self.kept * _class_weights(settings, data)
        if not self.full.any():
            raise SettingsError(
                "loss.ignore_ids and loss.class_weights leave no token to train on", hint="give one a weight above 0"
            )
        self.now = self.full.to(device, copy=True)  # (vocab_size,) float64, changed in place

    def move_to(self, at: float) -> None:
        """Take the weights of progress `at`."""
        if self.ramp[1]:
            self.now.copy_(self.kept + share_of(self.ramp, at) * (self.full - self.kept))


def _class_weights(settings: LossSettings, data: DataFolder) -> Tensor:  # (vocab_size,) float64
    """Return the weight of each token's class. Raises SettingsError for a class that no token has."""
    weights = torch.ones(data.vocab_size, dtype=torch.float64)
    if not settings.class_weights:
        return weights
    token_class = torch.from_numpy(TokenText.from_tokenizer(data.tokenizer).token_class)
    for name, weight in settings.class_weights.items():
        members = token_class == CLASSES.index(name)
        if not members.any():
            found = ", ".join(f'"{CLASSES[number]}"' for number in token_class.unique().tolist())
            raise SettingsError(
                f'loss.class_weights["{name}"] = {weight:g} acts on no token: {data.name} has {found}',
                hint="leave it out",
            )
        weights[members] = weight
    return weights


def head_similarity(model: GolfGPT) -> Tensor:  # () float32, in [0, 1]
    """Return the mean squared cosine between the query projections of two heads of a layer, over pairs and layers."""
    heads = model.config.num_heads
    means = []
    for module in model.modules():
        if isinstance(module, Attention):
            unit = F.normalize(module.query_weight().reshape(heads, -1).float(), dim=1)
            means.append((unit @ unit.mT).triu(1).square().sum() * 2 / (heads * (heads - 1)))
    return torch.stack(means).mean()


def objective_function(
    settings: LossSettings,
    weights: Tensor | None,
    gamma: Tensor | None = None,  # (), read at every call
    heads: FutureHeads | None = None,
) -> LossFunction:
    """Return the loss function of a step: (2,), the objective and plain nats, of a model and a micro-batch."""

    def loss(model: GolfGPT, inputs: Tensor, targets: Tensor, reach: Reach) -> Tensor:
        hidden = model.hidden(inputs, reach)
        logits = model.logits(hidden)
        both = objective(settings, logits.flatten(0, 1), targets.flatten(), weights, gamma)
        if heads is not None:
            later = settings.future_weight * heads.nats(hidden, targets)
            both = torch.stack([both[0] + later.to(both.dtype), both[1]])
        if settings.head_diversity:
            extra = settings.head_diversity * head_similarity(model)
            both = torch.stack([both[0] + extra.to(both.dtype), both[1]])
        return both

    return loss


class Objective:
    """The objective of a run: its loss function, and the weights that move with progress."""

    def __init__(
        self,
        settings: LossSettings,
        num_heads: int,
        data: DataFolder,
        device: torch.device,
        heads: FutureHeads | None = None,  # of later tokens
    ) -> None:
        """Check the settings against model and vocabulary. Raises SettingsError for one that cannot act."""
        require_heads(settings, num_heads)
        weighted = settings.ignore_ids or settings.class_weights
        self.weights = TokenWeights(settings, data, device) if weighted else None
        self.settings = settings
        ramped = bool(settings.focal_gamma_ramp[1])
        self.gamma = torch.tensor(settings.focal_gamma, dtype=torch.float64, device=device) if ramped else None
        self.function = objective_function(settings, self.weights.now if self.weights else None, self.gamma, heads)
        self.heads = heads

    def move_to(self, at: float) -> None:
        """Take what the settings say of progress `at`."""
        if self.weights:
            self.weights.move_to(at)
        if self.gamma is not None:
            self.gamma.fill_(self.settings.focal_gamma * share_of(self.settings.focal_gamma_ramp, at))


def require_heads(settings: LossSettings, num_heads: int) -> None:
    """Raise SettingsError if heads are to differ and there is one."""
    if settings.head_diversity and num_heads < 2:
        raise SettingsError(
            f"loss.head_diversity {settings.head_diversity:g} needs two heads, model.num_heads is {num_heads}",
            hint="leave it out",
        )
