"""The settings of a model that the names and shapes of its tensors determine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pgolf_post.errors import MismatchError
from pgolf_post.importers.agreement import require_agreement

MATRIX = re.compile(r"blocks\.(\d+)\.(?:mlp\.fc|attn\.q)\.weight")
CHANNEL_SMEARS = {"channel_smear": "after_norm", "channel_keep": "before_norm"}  # tensor: where it blends


def settings_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the shapes determine.

    Raises MismatchError if the basic matrices are not there, or naming tensors whose shapes do not go together.
    """
    num_layers = 1 + max((int(match[1]) for name in tensors if (match := MATRIX.fullmatch(name))), default=0)
    attends = [layer for layer in range(num_layers) if f"blocks.{layer}.attn.q.weight" in tensors]
    first = attends[0] if attends else 0  # #1204 may leave out that of block 0
    basic = ("tok_emb.weight", f"blocks.{first}.attn.k.weight", f"blocks.{first}.attn.q_gain")
    absent = [name for name in basic if name not in tensors]
    if absent:
        raise MismatchError(f"not a whole model: missing {', '.join(absent)}")
    require_agreement(tensors)
    vocab_size, embedding_dim = tensors["tok_emb.weight"].shape
    model_dim = tensors[f"blocks.{first}.attn.k.weight"].size(1)
    num_heads = tensors[f"blocks.{first}.attn.q_gain"].numel()
    gate = tensors.get(f"blocks.{first}.attn.gate")
    double_gate = tensors.get(f"blocks.{first}.attn.double_gate")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embedding_dim": embedding_dim if embedding_dim != model_dim else None,
        "num_layers": num_layers,
        **_settings_of_attention(attends, num_layers),
        "visit_controls": any(name.startswith("places.") for name in tensors),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": tensors[f"blocks.{first}.attn.k.weight"].size(0) // (model_dim // num_heads),
        "mlp_widths": mlp_widths(tensors, num_layers),  # a setting under one of two names: see foreign_config._widths
        "tie_embeddings": "lm_head.weight" not in tensors,
        "skip_gates": "skip_gates" in tensors,
        "smear_gate": "smear_gate" in tensors,
        "channel_smear": next((form for name, form in CHANNEL_SMEARS.items() if name in tensors), "none"),
        "attn_gate": "none",
        "untied_loop_mlps": any(name.startswith("override_mlps.") for name in tensors),
        "value_residual": any(name.endswith(".attn.value_mix") for name in tensors),
        **_settings_of_tables(tensors, embedding_dim),
    }
    if gate is not None:
        settings["attn_gate"] = "dense" if gate.size(1) == model_dim else "sparse"
    if double_gate is not None:
        settings["attn_gate"] = "double_sigmoid"
    if "lane_merge" in tensors:
        settings["lane_kind"] = "separate"
    if "passes.embed" in tensors:
        settings["pass_embeddings"] = "pass"
    if "recur_beta" in tensors:
        settings["carry_per_pass"] = tensors["recur_beta"].ndim == 2
    windows = [t for t in (tensors.get("smear_gate"), double_gate, gate) if t is not None and t.size(1) != model_dim]
    return {**settings, "gate_window": windows[0].size(1)} if windows else settings


def mlp_widths(tensors: Mapping[str, Tensor], num_layers: int) -> list[int]:
    """Return the hidden width of each layer's MLP; 0 where there is none."""
    matrices = (tensors.get(f"blocks.{layer}.mlp.fc.weight") for layer in range(num_layers))
    return [0 if matrix is None else matrix.size(0) for matrix in matrices]


def _settings_of_attention(attends: list[int], num_layers: int) -> dict[str, Any]:
    """Return which layers have attention: all, all but the first (#1204), or those of a list."""
    if len(attends) == num_layers or attends == list(range(1, num_layers)):
        return {"first_attention": attends[:1] == [0]}
    return {"first_attention": True, "attn_layers": attends}


def _settings_of_tables(tensors: Mapping[str, Tensor], embedding_dim: int) -> dict[str, Any]:
    """Return the settings of n-gram and value-embedding tables; 0 rows or columns where there is none."""
    bigram, values = tensors.get("bigram.embed.weight"), tensors.get("value_embed.embed.weight")
    settings: dict[str, Any] = {"bigram_buckets": 0, "value_embed_dim": 0 if values is None else values.size(1)}
    if bigram is not None:
        settings["bigram_buckets"], width = bigram.shape
        settings["bigram_dim"] = width if width != embedding_dim else None
        settings["bigram_hash"] = "xor" if "bigram.scale" in tensors else "product"
    return settings
