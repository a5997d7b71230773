"""The architecture as settings: what a model is built from, its runtime graph state, and the order of its visits.

The depth-recurrent U-Net of the record line is a *list of visits* to blocks, split into an encoder half, whose outputs
are kept, and a decoder half, which takes them back in reverse. How many of the configured repeats are active is runtime
state (`GraphState`), not a weight: it changes during training and is stored in every checkpoint.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pgolf_post.settings import Settings

Activation = Literal["relu2", "leaky_relu2", "silu2", "gelu2", "swiglu"]
AttentionGate = Literal["none", "sparse", "dense", "double_sigmoid"]
LaneOutput = Literal["mean", "attn", "mlp"]


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
    smear_gate: bool = Field(False, description="mix each token's embedding with its predecessor's, gated, BOS-safe")
    attn_gate: AttentionGate = Field("none", description="gate on each head's output")
    attn_gate_scale: float = Field(0.5, gt=0, description="of the sparse gate's logit")
    attn_gate_source: Literal["input", "query"] = Field("input", description="what the double-sigmoid gate reads")
    gate_window: int = Field(12, ge=1, description="leading dimensions that the narrow gates read")
    lanes_start: int | None = Field(
        None,
        ge=0,
        description="two residual lanes from this layer on, in the decoder half; 0 = weights kept, unused",
    )
    lane_output: LaneOutput = "mean"

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
        if self.lanes_start and self.gptj_start is not None:
            raise ValueError("lanes_start and gptj_start are two forms of parallel residuals; set one")
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
