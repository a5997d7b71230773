"""GolfGPT as a model family: the toolkit's view of the trainer's model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from pgolf_post.families import Site
from pgolf_post.settings import parse_settings
from trainer.architecture import GraphState, ModelConfig
from trainer.model import GolfGPT

ROLES = (  # first match wins
    (r"tok_emb\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
    (r"(embed_proj|head_proj)\.weight", "projection"),
    (r"blocks\.\d+\.attn\.(q|k|v)\.weight", r"\1"),
    (r"blocks\.\d+\.attn\.proj\.weight", "attn_proj"),
    (r"blocks\.\d+\.mlp\.fc\.weight", "mlp_fc"),
    (r"blocks\.\d+\.mlp\.proj\.weight", "mlp_proj"),
)


class GolfGPTFamily:
    """Family `golf_gpt`; see `pgolf_post.families.ModelFamily`."""

    name = "golf_gpt"

    def build(self, model: Mapping[str, Any], graph: Mapping[str, Any]) -> GolfGPT:
        config = parse_settings(ModelConfig, model, "config.json: model")
        return GolfGPT(config, parse_settings(GraphState, graph, "config.json: graph"))

    def complete(self, model: Mapping[str, Any]) -> dict[str, Any]:
        return parse_settings(ModelConfig, model, "model settings").model_dump(mode="json")

    def sites(self, module: nn.Module) -> list[Site]:
        assert isinstance(module, GolfGPT)
        sites = []
        for i in range(module.config.num_layers):
            at = f"blocks.{i}"
            qkv = tuple(f"{at}.attn.{part}.weight" for part in "qkv")
            sites.append(Site(f"{at}.attn.in", f"{at}.attn.q", qkv))
            sites.append(Site(f"{at}.attn.out", f"{at}.attn.proj", (f"{at}.attn.proj.weight",)))
            sites.append(Site(f"{at}.mlp.in", f"{at}.mlp.fc", (f"{at}.mlp.fc.weight",)))
            sites.append(Site(f"{at}.mlp.out", f"{at}.mlp.proj", (f"{at}.mlp.proj.weight",)))
        if hasattr(module, "embed_proj"):
            sites.append(Site("embed_proj.in", "embed_proj", ("embed_proj.weight",)))
            sites.append(Site("head_proj.in", "head_proj", ("head_proj.weight",)))
        head = "tok_emb.weight" if module.config.tie_embeddings else "lm_head.weight"
        return [*sites, Site("head.in", "head_in", (head,))]

    def role(self, tensor_name: str) -> str:
        for pattern, role in ROLES:
            match = re.fullmatch(pattern, tensor_name)
            if match:
                return match.expand(role)
        return "control"

    def train_seq_len(self, module: nn.Module) -> int:
        assert isinstance(module, GolfGPT)
        return module.config.train_seq_len
