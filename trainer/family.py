"""GolfGPT as a model family: the toolkit's view of the trainer's model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from pgolf_post.families import Fold, Lookup, Site
from pgolf_post.settings import parse_settings
from pgolf_post.watching import Watcher
from trainer.model.activations import activation_of
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.attention import Attention
from trainer.model.block import MLP
from trainer.model.gpt import GolfGPT
from trainer.model.layers import activation_names, mlp_widths, with_attention
from trainer.model.visits import visit_list
from trainer.watching import watched

ROLES = (  # first match wins
    (r"tok_emb\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
    (r"(embed_proj|head_proj)\.weight", "projection"),
    (r"blocks\.\d+\.attn\.(q|k|v)\.weight", r"\1"),
    (r"blocks\.\d+\.attn\.proj\.weight", "attn_proj"),
    (r"(blocks\.\d+\.mlp|override_mlps\.\d+_p\d+)\.(fc|gate)\.weight", "mlp_fc"),
    (r"(blocks\.\d+\.mlp|override_mlps\.\d+_p\d+)\.proj\.weight", "mlp_proj"),
    (r"(bigram|trigram|value_embed|token_type)\.embed\.weight", "embedding"),
    (r"(bigram|trigram|value_embed|token_type)\.proj\.weight|head_residual\.(down|up)\.weight", "projection"),
)

LOOKUPS = ("tok_emb", "bigram.embed", "trigram.embed", "value_embed.embed", "token_type.embed")
PROJECTIONS = (
    "embed_proj", "head_proj", "bigram.proj", "trigram.proj", "value_embed.proj", "token_type.proj",
    "head_residual.down", "head_residual.up",
)  # fmt: skip


def _attention_sites(module: GolfGPT, layer: int) -> list[Site]:
    """Return the sites of a block's attention; values have one of their own where they read the embedding too."""
    at = f"blocks.{layer}.attn"
    own_input = layer in module.config.value_x0_layers
    matrices = tuple(f"{at}.{part}.weight" for part in ("qk" if own_input else "qkv"))
    sites = [Site(f"{at}.in", f"{at}.q", matrices)]
    if own_input:
        sites.append(Site(f"{at}.v_in", f"{at}.v", (f"{at}.v.weight",)))
    return [*sites, Site(f"{at}.out", f"{at}.proj", (f"{at}.proj.weight",))]


def _mlp_sites(module: GolfGPT, layer: int, at: str) -> list[Site]:
    if not mlp_widths(module.config)[layer]:
        return []
    gate = (f"{at}.gate.weight",) if activation_of(activation_names(module.config)[layer]).gated else ()
    inner = Site(f"{at}.in", f"{at}.fc", (f"{at}.fc.weight", *gate))
    return [inner, Site(f"{at}.out", f"{at}.proj", (f"{at}.proj.weight",))]


class GolfGPTFamily:
    """Family `golf_gpt`; see `pgolf_post.families.ModelFamily`."""

    name = "golf_gpt"

    def build(self, model: Mapping[str, Any], graph: Mapping[str, Any]) -> GolfGPT:
        config = parse_settings(ModelConfig, model, "config.json: model")
        return GolfGPT(config, parse_settings(GraphState, graph, "config.json: graph"))

    def complete(self, model: Mapping[str, Any]) -> dict[str, Any]:
        return parse_settings(ModelConfig, model, "model settings").model_dump(mode="json")

    def sites(self, module: nn.Module) -> list[Site]:
        """Return the sites that the graph in its present state reaches.

        Lookup tables and MLPs of passes that are not run have none. Two matrices that read one input share a site.
        """
        assert isinstance(module, GolfGPT)
        sites: list[Site] = []
        seen: dict[int, int] = {}
        for layer in visit_list(module.config, module.graph.active_loops):
            revisit = seen.get(layer, 0)
            seen[layer] = revisit + 1
            if revisit == 0:
                sites += _attention_sites(module, layer) if with_attention(module.config)[layer] else []
                sites += _mlp_sites(module, layer, f"blocks.{layer}.mlp")
            elif module.config.untied_loop_mlps:
                sites += _mlp_sites(module, layer, f"override_mlps.{layer}_p{revisit}")
        for path in PROJECTIONS:
            if f"{path}.weight" in dict(module.named_parameters()):
                sites.append(Site(f"{path}.in", path, (f"{path}.weight",)))
        head = "tok_emb.weight" if module.config.tie_embeddings else "lm_head.weight"
        return [*sites, Site("head.in", "head_in", (head,), outputs=("head_out",), is_head=True)]

    def lookups(self, module: nn.Module) -> list[Lookup]:
        assert isinstance(module, GolfGPT)
        present = dict(module.named_modules())
        return [Lookup(f"{path}.weight", path) for path in LOOKUPS if path in present]

    def role(self, tensor_name: str) -> str:
        for pattern, role in ROLES:
            match = re.fullmatch(pattern, tensor_name)
            if match:
                return match.expand(role)
        return "control"

    def layer(self, tensor_name: str) -> int | None:
        match = re.match(r"(?:blocks|override_mlps)\.(\d+)", tensor_name)
        return int(match.group(1)) if match else None

    def num_layers(self, module: nn.Module) -> int:
        assert isinstance(module, GolfGPT)
        return module.config.num_layers

    def looped_layers(self, module: nn.Module) -> frozenset[int]:
        assert isinstance(module, GolfGPT)
        visits = Counter(visit_list(module.config, module.graph.active_loops))
        return frozenset(layer for layer, count in visits.items() if count > 1)

    def folds(self, module: nn.Module) -> dict[str, Fold]:
        """Return the folds of MLPs whose activation has a power: proj's input then scales with fc's rows."""
        assert isinstance(module, GolfGPT)
        powers = [activation_of(name).power for name in activation_names(module.config)]
        folds = {}
        for name in (name for name, _ in module.named_parameters() if self.role(name) == "mlp_proj"):
            layer = self.layer(name)
            assert layer is not None
            if power := powers[layer]:
                folds[name] = Fold(name.replace(".proj.", ".fc."), power)
        return folds

    def train_seq_len(self, module: nn.Module) -> int:
        assert isinstance(module, GolfGPT)
        return module.config.train_seq_len

    def branches(self, module: nn.Module) -> dict[int, tuple[str, ...]]:
        """Return the attention and the MLPs of each block that the graph, in its present state, visits."""
        assert isinstance(module, GolfGPT)
        names = [name for name, part in module.named_modules() if isinstance(part, Attention | MLP)]
        visited = sorted(set(visit_list(module.config, module.graph.active_loops)))
        return {layer: tuple(name for name in names if self.layer(f"{name}.") == layer) for layer in visited}

    def watch(self, module: nn.Module, watcher: Watcher) -> AbstractContextManager[None]:
        assert isinstance(module, GolfGPT)
        return watched(module, watcher)

    def logit_cap(self, module: nn.Module) -> float | None:
        assert isinstance(module, GolfGPT)
        return module.config.logit_softcap
