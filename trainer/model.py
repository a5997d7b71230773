"""The one model and its one forward: the record architecture's flat family.

Embedding → RMSNorm → a list of block visits in U-Net order → RMSNorm → tied (or own) head → tanh soft-cap. Some blocks
are visited several times (depth recurrence); how often is runtime state (`GraphState`), not a weight, and is stored in
every checkpoint, because a model evaluated with its loops off silently loses most of its quality.
The definition of right is the logits of the public scripts (openai/parameter-golf, train_gpt.py and its records).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pgolf_post.errors import SettingsError
from pgolf_post.settings import Settings
from trainer.attention import Attention, rms_norm, rotary_angles

Activation = Literal["relu2", "leaky_relu2"]


class ArchitectureSettings(Settings):
    """The architecture, without what the data decides. Defaults: the record line's values at width 512."""

    num_layers: int = Field(11, ge=1)
    model_dim: int = Field(512, ge=2)
    embedding_dim: int | None = Field(None, ge=1, description="width of the embedding; default model_dim")
    num_heads: int = Field(8, ge=1)
    num_kv_heads: int = Field(4, ge=1)
    mlp_mult: float = Field(4.0, gt=0, description="hidden width = int(mlp_mult · model_dim)")
    activation: Activation = "leaky_relu2"
    leaky_slope: float = Field(0.5, ge=0, le=1)
    tie_embeddings: bool = True
    logit_softcap: float = Field(30.0, gt=0)
    rope_base: float = Field(10000.0, gt=1)
    rope_dims: int = Field(16, ge=0, description="rotated dimensions per head; 0 = all")
    rope_ntk: bool = Field(True, description="stretch the rotary base beyond the training length")
    q_gain_init: float = 4.0
    xsa_last_n: int = Field(11, ge=0, description="XSA on the last n layers")
    ln_scale: bool = Field(True, description="scale layer i's normalised input by 1/√(i+1)")
    skip_gates: bool = True
    loop_start: int = Field(0, ge=0)
    loop_end: int = Field(0, ge=0)
    num_loops: int = Field(0, ge=0, description="extra visits of blocks loop_start..loop_end")
    gptj_start: int | None = Field(None, ge=0, description="from this layer on, attention and MLP read the same input")
    embedding_init_std: float = Field(0.005, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ArchitectureSettings:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        head_dim = self.model_dim // self.num_heads
        if self.rope_dims > head_dim or self.rope_dims % 2 or head_dim % 2:
            raise ValueError(f"rope_dims {self.rope_dims} must be even and at most the (even) head width {head_dim}")
        if self.num_loops and not self.loop_start <= self.loop_end < self.num_layers:
            raise ValueError(f"loops need loop_start ≤ loop_end < num_layers, got {self.loop_start}, {self.loop_end}")
        return self


class ModelConfig(ArchitectureSettings):
    """Everything `GolfGPT` is built from; stored in a checkpoint's config.json."""

    vocab_size: int = Field(ge=2, le=65536)
    train_seq_len: int = Field(ge=2)


class GraphState(Settings):
    """Runtime graph state: how many of the configured extra visits are active."""

    active_loops: int = Field(0, ge=0)


def visit_list(config: ModelConfig, active_loops: int) -> list[int]:
    """Blocks in the order they are visited: [0..a-1] + (active_loops + 1)·[a..b] + [b+1..n-1]."""
    layers = list(range(config.num_layers))
    if not active_loops:
        return layers
    a, b = config.loop_start, config.loop_end
    return layers[:a] + layers[a : b + 1] * (active_loops + 1) + layers[b + 1 :]


class MLP(nn.Module):
    """proj(act(fc x)) with a squared activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_dim = int(config.mlp_mult * config.model_dim)
        self.fc = nn.Linear(config.model_dim, hidden_dim, bias=False)
        self.proj = nn.Linear(hidden_dim, config.model_dim, bias=False)
        self.negative_slope = config.leaky_slope if config.activation == "leaky_relu2" else 0.0

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq_len, model_dim) → the same
        return self.proj(F.leaky_relu(self.fc(x), self.negative_slope).square())


class Block(nn.Module):
    """One transformer block: a mix with the embedding, attention, MLP, each added with a learned per-channel scale."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        use_xsa = layer >= config.num_layers - config.xsa_last_n
        self.attn = Attention(dim, config.num_heads, config.num_kv_heads, config.q_gain_init, use_xsa)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))  # (2, model_dim)
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.parallel = config.gptj_start is not None and layer >= config.gptj_start

    def forward(
        self,
        x: Tensor,  # (batch, seq_len, model_dim)
        x0: Tensor,  # (batch, seq_len, model_dim), the embedding
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        normed = rms_norm(x) * self.norm_scale
        attended = x + self.attn_scale * self.attn(normed, cos, sin)
        mlp_input = normed if self.parallel else rms_norm(attended) * self.norm_scale
        return attended + self.mlp_scale * self.mlp(mlp_input)


class GolfGPT(nn.Module):
    """The model. `graph.active_loops` may be changed between calls; weights never depend on it."""

    def __init__(self, config: ModelConfig, graph: GraphState) -> None:
        super().__init__()
        self.config = config
        self.set_graph(graph)
        embedding_dim = config.embedding_dim or config.model_dim
        self.tok_emb = nn.Embedding(config.vocab_size, embedding_dim)
        if embedding_dim != config.model_dim:
            self.embed_proj = nn.Linear(embedding_dim, config.model_dim, bias=False)
            self.head_proj = nn.Linear(config.model_dim, embedding_dim, bias=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        num_skips = len(visit_list(config, config.num_loops)) // 2
        self.skip_weights = nn.Parameter(torch.ones(num_skips, config.model_dim))
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips, config.model_dim))
        self.head_in = nn.Identity()  # the head's input passes here, so that calibration can see it
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(embedding_dim, config.vocab_size, bias=False)

    def set_graph(self, graph: GraphState) -> None:
        """Change the runtime graph state. Raises SettingsError beyond the configured loops."""
        if graph.active_loops > self.config.num_loops:
            raise SettingsError(
                f"active_loops {graph.active_loops} exceeds the configured num_loops {self.config.num_loops}"
            )
        self.graph = graph

    def initialise(self) -> None:
        """The record's init: orthogonal matrices, zero output projections, small embedding; draws from torch's RNG."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            elif name == "tok_emb.weight":
                nn.init.normal_(parameter, std=self.config.embedding_init_std)
            elif name.endswith(".weight"):
                nn.init.orthogonal_(parameter)

    def _rotary(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.config
        dims = config.rope_dims or config.model_dim // config.num_heads
        base = config.rope_base
        if config.rope_ntk and seq_len > config.train_seq_len:
            base *= (seq_len / config.train_seq_len) ** (dims / (dims - 2))
        return rotary_angles(seq_len, dims, base, device)

    def _skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """Add the U-Net skip of second-half visit `index`, gated where the model has gates."""
        weighted = self.skip_weights[index] * skip
        if self.config.skip_gates:
            return torch.lerp(weighted, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype))
        return x + weighted

    def hidden(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) int64 → (batch, seq_len, embedding_dim)
        """The head's input: final hidden states after the last norm (and head_proj)."""
        cos, sin = self._rotary(tokens.size(1), tokens.device)
        x = rms_norm(self.tok_emb(tokens))
        if hasattr(self, "embed_proj"):
            x = self.embed_proj(x)
        x0 = x
        visits = visit_list(self.config, self.graph.active_loops)
        num_encoder = len(visits) // 2
        skips: list[Tensor] = []
        for position, layer in enumerate(visits):
            index = position - num_encoder
            if 0 <= index < self.skip_weights.size(0) and skips:
                x = self._skip(x, skips.pop(), index)
            x = self.blocks[layer](x, x0, cos, sin)
            if index < 0:
                skips.append(x)
        x = rms_norm(x)
        if hasattr(self, "head_proj"):
            x = self.head_proj(x)
        return self.head_in(x)

    def logits(self, hidden: Tensor) -> Tensor:  # (…, embedding_dim) → (…, vocab_size) float32
        """Soft-capped logits: cap·tanh(z / cap)."""
        head = self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight
        cap = self.config.logit_softcap
        return cap * torch.tanh(F.linear(hidden, head).float() / cap)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, seq_len) int64 → (batch, seq_len, vocab_size) float32
        return self.logits(self.hidden(tokens))
