"""Triton kernels for the two places where a training step writes a large tensor only to read it again.

`loss.py` is the soft-capped cross-entropy: eager PyTorch makes several float32 tensors of (tokens, vocab_size) on the
way from z = head(hidden) to the loss and back, the kernels one (dz, in z's own type). `mlp.py` is the (leaky-)relu²
MLP: the activation and its gradient happen in the epilogues of the two matmuls beside them, and of the three
hidden-sized tensors that eager keeps for backward, one is left, and a byte per element for the sign.

`run.kernels = "triton"` switches both on for training, "triton_loss" and "triton_mlp" one of them: in a compiled step
Inductor fuses the loss as well, and the MLP alone saves bytes. "auto", the default, takes the MLP in bfloat16 on the
GPUs that tests compile it for, and "eager" elsewhere. The kernels are checked for values and gradients by Triton's
interpreter but have not been timed on a GPU yet: `python -m benchmarks.bench_kernels` there says whether they pay.
Everything that scores a checkpoint is eager: the switch is a property of a Trainer, not of a model or its config.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from torch import Tensor

from pgolf_post.errors import SettingsError
from trainer.config import Kernels, Recipe
from trainer.model.activations import ACTIVATIONS, activation_of
from trainer.model.architecture import ArchitectureSettings
from trainer.model.attention_backends import Reach
from trainer.model.block import MLP
from trainer.model.gpt import GolfGPT
from trainer.model.layers import activation_names
from trainer.tables import read_keys

LOSS_KERNELS: tuple[Kernels, ...] = ("triton", "triton_loss")
MLP_KERNELS: tuple[Kernels, ...] = ("triton", "triton_mlp")
COMPILED_FOR = {(8, 0), (9, 0)}  # compute capabilities that tests compile every kernel for
EAGER_HINT = "train with --set run.kernels=eager"


def chosen_kernels(recipe: Recipe, device: torch.device, autocast: torch.dtype | None) -> Kernels:
    """Return the kernels of a run, "auto" decided: the fused MLP where it is known to compile and to apply."""
    if recipe.run.kernels != "auto":
        return recipe.run.kernels
    fits = (
        device.type == "cuda"
        and autocast == torch.bfloat16
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) in COMPILED_FOR
        and not _without_kernel(recipe.model)
    )
    return "triton_mlp" if fits else "eager"


def require_usable(recipe: Recipe, device_type: str) -> None:
    """Raise SettingsError if this recipe asks for Triton kernels that it cannot have on this machine."""
    kernels = recipe.run.kernels
    if kernels in ("auto", "eager"):
        return
    if importlib.util.find_spec("triton") is None:
        raise SettingsError(
            f'run.kernels = "{kernels}", but triton is not installed', hint=f"pip install triton, or {EAGER_HINT}"
        )
    if device_type != "cuda":
        raise SettingsError(
            f'run.kernels = "{kernels}" needs a CUDA GPU, and this run is on "{device_type}"', hint=EAGER_HINT
        )
    if recipe.run.precision == "fp64":
        raise SettingsError(
            f'run.kernels = "{kernels}" computes in float32, but run.precision = "fp64"', hint=EAGER_HINT
        )
    if kernels in LOSS_KERNELS and recipe.loss.is_on:
        wanted = ", ".join(f"loss.{key} {value}" for key, value in recipe.loss.settings_on().items())
        raise SettingsError(
            f'run.kernels = "{kernels}" has a loss of plain nats, not of {wanted}',
            hint="train with --set run.kernels=triton_mlp, or leave the table loss out",
        )
    if kernels in MLP_KERNELS and (lacking := _without_kernel(recipe.model)):
        fused = " and ".join(name for name, row in ACTIVATIONS.items() if row.kernel_slope)
        raise SettingsError(
            f'run.kernels = "{kernels}" has an MLP for {fused}, not for "{lacking[0]}"',
            hint=EAGER_HINT,
        )


def _without_kernel(model: ArchitectureSettings) -> list[str]:
    """Return the activations of a model that the fused MLP does not have."""
    return [name for name in activation_names(model) if activation_of(name).kernel_slope is None]


def fuse_mlps(model: GolfGPT) -> None:
    """Make every MLP of this model the fused one. Raises SettingsError for an activation that the kernel lacks."""
    if lacking := _without_kernel(model.config):
        raise SettingsError(f'no fused MLP has the activation "{lacking[0]}"', hint=EAGER_HINT)
    for module in model.modules():
        if isinstance(module, MLP):
            activation = activation_of(activation_names(model.config)[module.layer])
            assert activation.kernel_slope is not None
            slope = activation.kernel_slope(**read_keys(model.config, activation.reads))
            module.fused = partial(_fused, slope)


def _fused(slope: float, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the fused MLP of x, whose activation has this slope below 0."""
    from trainer.kernels.mlp import fused_mlp  # needs triton

    return fused_mlp(x, up, down, slope)


def fused_loss(
    model: GolfGPT,
    inputs: Tensor,  # (batch, seq_len) int64
    targets: Tensor,  # (batch, seq_len) int64
    reach: Reach,  # of inputs
) -> Tensor:  # () mean nats per token, float32
    """Return the training loss, with the head's output capped inside the cross-entropy."""
    from trainer.kernels.loss import softcapped_nats  # needs triton

    z = model.uncapped_logits(model.hidden(inputs, reach))
    return softcapped_nats(z.flatten(0, 1), targets.flatten(), model.config.logit_softcap).mean()
