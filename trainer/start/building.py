"""A recipe's model as a run begins with it: initialised, on its device, with its kernels and its attention.

The loop builds it to train it, a dry run to see what a start from another model's weights would make of it.
"""

from __future__ import annotations

import torch

from pgolf_post.data import DataFolder
from trainer.config import Recipe
from trainer.kernels import MLP_KERNELS, chosen_kernels, fuse_mlps
from trainer.model.architecture import GraphState
from trainer.model.attention_backends import choose_backend
from trainer.model.gpt import GolfGPT
from trainer.start.from_text import start_from_text


def new_model(recipe: Recipe, data: DataFolder, device: torch.device, autocast: torch.dtype | None) -> GolfGPT:
    """Return the recipe's model, initialised by its seed, on the device, with its kernels and its attention."""
    torch.manual_seed(recipe.run.seed)
    model = GolfGPT(recipe.model_config_in(data), GraphState())
    model.initialise()
    start_from_text(model, data)
    model.to(device, torch.float64 if recipe.run.precision == "fp64" else torch.float32)
    if chosen_kernels(recipe, device, autocast) in MLP_KERNELS:
        fuse_mlps(model)
    isolated, compute_dtype = recipe.model.isolate_documents, autocast or model.tok_emb.weight.dtype
    model.attention_backend = choose_backend(recipe.run.attention, device, compute_dtype, isolated)
    return model
