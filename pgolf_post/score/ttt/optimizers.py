"""PyTorch's optimizers by name, their state as a flat dictionary of tensors that can be kept in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf_post.score.ttt.settings import TTTProtocol

Optimizers = dict[str, torch.optim.Optimizer]


def make_optimizers(parameters: Mapping[str, Tensor], settings: TTTProtocol) -> Optimizers:
    """Return the optimizers that the settings name; Muon (Jordan et al. 2024) takes matrices, AdamW the rest."""
    rate, decay = settings.learning_rate, settings.weight_decay
    adam = {
        "lr": rate,
        "weight_decay": decay,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "fused": True,
    }
    if settings.optimizer == "sgd":
        made = torch.optim.SGD(list(parameters.values()), lr=rate, momentum=settings.beta1, weight_decay=decay)
        return {"sgd": made}
    if settings.optimizer == "adamw":
        return {"adamw": torch.optim.AdamW(list(parameters.values()), **adam)}  # type: ignore[arg-type]
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and name.endswith(".weight")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    both: Optimizers = {}
    if matrices:
        both["muon"] = torch.optim.Muon(matrices, lr=rate, momentum=settings.beta1, weight_decay=decay)
    if rest:
        both["adamw"] = torch.optim.AdamW(rest, **adam)  # type: ignore[arg-type]
    return both


def cosine(step: int, steps: int) -> float:
    """Return a factor of the learning rate: 1 at the first of `steps`, 0 at the last; 1 where there is but one."""
    return 0.5 * (1 + math.cos(math.pi * step / (steps - 1))) if steps > 1 else 1.0


def optimizer_step(optimizers: Optimizers, parameters: Mapping[str, Tensor], learning_rate: float, clip: float) -> None:
    """Clip the global gradient norm, step, clear gradients."""
    if clip:
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizers_state(optimizers: Optimizers, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizers' moments as `KIND.KEY.NAME`."""
    state = {}
    for kind, optimizer in optimizers.items():
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                state[f"{kind}.{key}.{name}"] = value
    return state


def load_optimizers_state(
    optimizers: Optimizers, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Load what `optimizers_state` returned."""
    for full_name, value in state.items():
        kind, _, rest = full_name.partition(".")
        key, _, name = rest.partition(".")
        parameter = parameters[name]
        optimizers[kind].state[parameter][key] = value.to(parameter.device, copy=True)
