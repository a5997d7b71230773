"""Muon for matrices (`trainer.optim.muon`), AdamW for the rest, one step over both.

The step takes each rank's own gradients and owns every transfer between them: sums of matrices' gradients are scattered
over ranks, sums of the rest go to all. Every parameter belongs to exactly one group by GROUP_RULES; one that fits none,
or two, is an error. The recipe may divide these further (`trainer.optim.tensor_groups`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from trainer.optim.muon import Scheme, UpdateFunction, make_banks, muon_updates, narrow_dtype
from trainer.optim.settings import OptimSettings
from trainer.optim.tensor_groups import StepGroup, split
from trainer.step.distributed import SINGLE_PROCESS, TrainingRanks


def _is_weight_matrix(name: str, parameter: Tensor, module: nn.Module) -> bool:
    return name.endswith(".weight") and parameter.ndim > 1


# group → whether a parameter belongs to it, from its name, itself and its module
GROUP_RULES: dict[str, Callable[[str, Tensor, nn.Module], bool]] = {
    "embed": lambda name, parameter, module: isinstance(module, nn.Embedding),
    "head": lambda name, parameter, module: name == "lm_head.weight",
    "matrix": lambda name, parameter, module: (
        _is_weight_matrix(name, parameter, module)
        and parameter.ndim == 2
        and not isinstance(module, nn.Embedding)
        and name != "lm_head.weight"
    ),
    "scalar": lambda name, parameter, module: not _is_weight_matrix(name, parameter, module),
}


def assign_groups(model: nn.Module) -> dict[str, list[str]]:
    """Return group → names of its parameters. Raises SettingsError for a parameter that no group takes, or two do.

    A tensor under two names (a tied head, say) counts once, under the first, if both belong to the same group.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    names: dict[Tensor, list[str]] = defaultdict(list)
    taken: dict[Tensor, dict[str, None]] = defaultdict(dict)  # its groups, in order
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = modules[name.rpartition(".")[0]]
        names[parameter].append(name)
        taken[parameter].update({group: None for group, rule in GROUP_RULES.items() if rule(name, parameter, module)})
    for tensor, its_groups in taken.items():
        if len(its_groups) != 1:
            which = f"groups {' and '.join(its_groups)}" if its_groups else "no group"
            raise SettingsError(
                f"parameter {' = '.join(names[tensor])} of shape {tuple(tensor.shape)} is in {which} of the "
                f"optimizer; it must be in exactly one of {', '.join(GROUP_RULES)}",
                hint="2-D weights step by Muon; untie a shared one, name a control tensor something other than weight",
            )
        groups[next(iter(its_groups))].append(names[tensor][0])
    return groups


def step_groups(model: nn.Module, settings: OptimSettings) -> list[StepGroup]:
    """Return the parameters that step alike: the groups of GROUP_RULES, divided by `optim.groups`.

    Raises SettingsError as `assign_groups`, and for a table of `optim.groups` that cannot act on this model.
    """
    peaks, decays = settings.peak_learning_rates(), settings.peak_weight_decays()
    kinds = [
        StepGroup(kind, tuple(names), "muon" if kind == "matrix" else "adamw", peaks[kind], decays[kind])
        for kind, names in assign_groups(model).items()
    ]
    return split(kinds, dict(model.named_parameters()), settings.groups) if settings.groups else kinds


def num_moments(model: nn.Module, settings: OptimSettings) -> int:
    """Return how many numbers the optimizer keeps: one for each of a matrix that Muon steps, two for each by AdamW."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    kept = {"muon": 1, "adamw": 2}
    return sum(kept[group.method] * sizes[name] for group in step_groups(model, settings) for name in group.names)


class Optimizer:
    """Muon and AdamW over a model's parameters. State is a flat dict of named tensors, saved as one file."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimSettings,
        ranks: TrainingRanks = SINGLE_PROCESS,
        updates: UpdateFunction = muon_updates,  # or a compiled form of it
    ) -> None:
        self.settings, self.ranks, self.updates = settings, ranks, updates
        self.parameters = dict(model.named_parameters())
        self.step_groups = step_groups(model, settings)
        muon = [group for group in self.step_groups if group.method == "muon"]
        adamw = [group for group in self.step_groups if group.method == "adamw"]
        self.adam_names = {group.label: list(group.names) for group in adamw}
        stacks = [(make_banks({name: self.parameters[name] for name in group.names}, ranks), group) for group in muon]
        self.banks = [bank for banks, _ in stacks for bank in banks]
        self.peaks = {bank: (group.lr, group.weight_decay) for banks, group in stacks for bank in banks}
        betas = (settings.adam_beta1, settings.adam_beta2)
        groups = [self._adam_group(group) for group in adamw]
        self.on_gpu = next(iter(self.parameters.values())).device.type == "cuda"
        kernel: dict[str, Any] = {"fused": True} if self.on_gpu else {"foreach": True}
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=settings.adam_eps, **kernel)

    def _adam_group(self, group: StepGroup) -> dict[str, Any]:
        """Return AdamW's settings for one group; the schedule multiplies `peak_lr` and `peak_weight_decay`."""
        parameters = [self.parameters[name] for name in group.names]
        decays = {"weight_decay": group.weight_decay, "peak_weight_decay": group.weight_decay}
        return {"params": parameters, "lr": group.lr, "peak_lr": group.lr, **decays}

    def learning_rates(self, lr_multiplier: float, at: float = 0.0) -> dict[str, float]:
        """Return each group's learning rate under a multiplier, matrices first; 0 where frozen at progress `at`."""
        matrices_first = sorted(self.step_groups, key=lambda group: group.method != "muon")
        return {group.label: 0.0 if group.is_frozen(at) else group.lr * lr_multiplier for group in matrices_first}

    def freeze(self, at: float) -> None:
        """Drop the gradients of tensors that are frozen at progress `at`, so that the step leaves them alone."""
        for group in self.step_groups:
            for name in group.names if group.is_frozen(at) else ():
                self.parameters[name].grad = None

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float, weight_decay_multiplier: float = 1.0) -> Tensor:
        """Sum gradients over ranks, clip, update every parameter, clear gradients: on all ranks, right after backward.

        Return the global gradient norm before clipping, () float64: nothing here waits for a GPU.
        """
        # Every rank's gradients set out: matrices to the ranks that own them, the rest to all.
        settings, rest = self.settings, self._adam_gradients()
        clip_all = settings.grad_clip > 0 and settings.clip_norm_of == "all"
        clip_own = settings.grad_clip > 0 and not clip_all
        own_norm = self._clip_own() if clip_own else None
        dtype = narrow_dtype(settings.newton_schulz_dtype, self.on_gpu)
        scheme = Scheme(settings.newton_schulz, dtype, settings.newton_schulz_steps)
        banks = [bank for bank in self.banks if bank.used()]
        coming = [bank.send_gradients() for bank in banks]
        finish_rest = self.ranks.begin_sum_(rest)

        # The norm of all gradients is known once all are there: the first momentum changes after that.
        if clip_all:
            finish_rest()
            norm = self._clip([transfer.wait() for transfer in coming], rest)

        # Matrices: each bank steps its momenta once its gradients are there, and its updates set out for all ranks.
        updates = [
            bank.send_updates(transfer.wait(), momentum, scheme, settings.row_normalize, self.updates)
            for bank, transfer in zip(banks, coming, strict=True)
        ]
        if not clip_all:
            finish_rest()
            norm = self._norm([transfer.wait() for transfer in coming], rest) if own_norm is None else own_norm

        # AdamW steps the rest while the matrices' updates are on their way.
        self._step_adam(lr_multiplier, weight_decay_multiplier)

        # Matrices take their updates; gradients have served.
        for bank, transfer in zip(banks, updates, strict=True):
            lr, decay = self.peaks[bank]
            bank.apply(transfer.wait(), lr * lr_multiplier, decay * weight_decay_multiplier)
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def _adam_gradients(self) -> list[Tensor]:
        """Return the gradients of everything but matrices, where this step's graph has any."""
        gradients = [self.parameters[name].grad for name in self._adam_parameters()]
        return [gradient for gradient in gradients if gradient is not None]

    def _step_adam(self, lr_multiplier: float, weight_decay_multiplier: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = group["peak_lr"] * lr_multiplier
            group["weight_decay"] = group["peak_weight_decay"] * weight_decay_multiplier
        self.adam.step()

    def _norm(self, own: list[Tensor], rest: list[Tensor]) -> Tensor:  # () float64
        """Return the global gradient norm: `own` is this rank's share of the matrices, `rest` is on every rank."""
        device = next(iter(self.parameters.values())).device
        squares = _sum_of_squares(own, device)
        self.ranks.sum_(squares)
        return (squares + _sum_of_squares(rest, device)).sqrt()

    def _clip(self, own: list[Tensor], rest: list[Tensor]) -> Tensor:  # () float64
        """Scale gradients down, in place, to a global norm of at most grad_clip. Return the norm before."""
        norm = self._norm(own, rest)
        if not own + rest:
            return norm
        scale = (self.settings.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*own, *rest], scale.to((own + rest)[0].dtype))
        return norm

    def _clip_own(self) -> Tensor:  # () float64
        """Scale this rank's own gradients down, in place, to a norm of at most grad_clip. Return the norm before.

        A rank's gradients are its share of a mean over all ranks' tokens: of the mean over its own tokens alone they
        are a world_size-th, and that mean is what is clipped. On one rank it is the same as clipping the sum.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        device = next(iter(self.parameters.values())).device
        norm = _sum_of_squares(gradients, device).sqrt() * self.ranks.world_size
        if gradients:
            scale = (self.settings.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        return norm

    def state(self) -> dict[str, Tensor]:
        """Return every moment as a named tensor: momentum.NAME, exp_avg.NAME, exp_avg_sq.NAME, adam_step.NAME.

        It is the same whatever the number of ranks. All of them must call it: each holds a share of the momenta.
        """
        state = {f"momentum.{name}": momentum for bank in self.banks for name, momentum in bank.state().items()}
        for name in self._adam_parameters():
            moments = self.adam.state.get(self.parameters[name], {})
            state.update({f"{key.replace('step', 'adam_step')}.{name}": value for key, value in moments.items()})
        return state

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Restore what `state` returned. Raises SettingsError listing tensors that are missing."""
        missing = [f"momentum.{name}" for bank in self.banks for name in bank.names if f"momentum.{name}" not in state]
        if missing:
            raise SettingsError(
                f"{source}: optimizer state lacks {', '.join(missing)}",
                hint="resume with the optim.groups and loss.future_tokens that it was trained with (meta.json, recipe)",
            )
        for bank in self.banks:
            bank.load_state({name: state[f"momentum.{name}"] for name in bank.names})
        for name in self._adam_parameters():
            if f"exp_avg.{name}" in state:
                device = self.parameters[name].device  # of a number too, where AdamW is one kernel
                self.adam.state[self.parameters[name]] = {
                    "step": state[f"adam_step.{name}"].to(device if self.on_gpu else "cpu", copy=True),
                    "exp_avg": state[f"exp_avg.{name}"].to(device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(device, copy=True),
                }

    def _adam_parameters(self) -> Iterable[str]:
        return (name for names in self.adam_names.values() for name in names)


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:  # () float64
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
