"""The block: attention and MLP, each added to the residual stream with a gain, and the MLP itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.model.architecture import ModelConfig
from trainer.model.attention import Attention, Context
from trainer.model.controls import Controls, norm_scale
from trainer.model.layers import bound_activations, mlp_widths, with_attention
from trainer.model.norms import rms_norm


def times(scale: Tensor | None, x: Tensor) -> Tensor:
    """Return scale · x; x where its scale is in a matrix already (`Block.fold_scales`)."""
    return x if scale is None else scale * x


class MLP(nn.Module):
    """proj(act(fc x)), or with a gated activation proj(act(gate x) · fc x)."""

    fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # of x and both weights; see trainer/kernels

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        activation = bound_activations(config)[layer]
        self.gated, self.act = activation[0], activation[1]
        self.layer, hidden_dim = layer, mlp_widths(config)[layer]
        self.fc = nn.Linear(config.model_dim, hidden_dim, bias=False)
        if self.gated:
            self.gate = nn.Linear(config.model_dim, hidden_dim, bias=False)
        self.proj = nn.Linear(hidden_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq_len, model_dim) → the same
        if self.fused is not None:
            return self.fused(x, self.fc.weight, self.proj.weight)
        if self.gated:
            return self.proj(self.act(self.gate(x)) * self.fc(x))
        return self.proj(self.act(self.fc(x)))


class Block(nn.Module):
    """One transformer block: a mix with the embedding, then attention and MLP, each added with a per-channel gain.

    A block may lack the mix, and attention or the MLP.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        self.config = config
        self.mixes_x0 = config.x0_mix
        self.has_attention, self.has_mlp = with_attention(config)[layer], mlp_widths(config)[layer] > 0
        if self.has_attention:
            self.attn = Attention(config, layer)
        if self.has_mlp:
            self.mlp = MLP(config, layer)
        if self.has_attention:
            self.attn_scale = nn.Parameter(torch.ones(dim))
        if self.has_mlp:
            self.mlp_scale = nn.Parameter(torch.ones(dim))
        if config.x0_mix:
            self.resid_mix = nn.Parameter(torch.tensor([[1.0] * dim, [0.0] * dim]))  # (2, model_dim): of x and x0
        self.norm_scale = norm_scale(config, layer)
        self.parallel = config.gptj_start is not None and layer >= config.gptj_start
        self.stream_in, self.stream_out = nn.Identity(), nn.Identity()  # the residual passes here, so it can be watched
        self.attn_adds, self.mlp_adds = nn.Identity(), nn.Identity()  # and here what is added to it

    def forward(
        self,
        x: Tensor,  # (batch, seq_len, model_dim)
        x0: Tensor,  # (batch, seq_len, model_dim), the embedding
        context: Context,
        mlp: MLP | None,  # the block's own, or a re-visit's
        controls: Controls | None = None,  # of a place that has its own; else the block's
    ) -> Tensor:
        own: Block | Controls = self if controls is None else controls
        if self.mixes_x0:
            x = own.resid_mix[0] * x + own.resid_mix[1] * x0
        normed = rms_norm(x) * own.norm_scale
        attended = x
        if self.has_attention:
            attended = x + self.attn_adds(times(own.attn_scale, self.attention_output(normed, context, controls)))
        if not self.has_mlp:
            return attended
        mlp_input = normed if self.parallel else rms_norm(attended) * own.norm_scale
        return attended + self.mlp_adds(times(own.mlp_scale, self.mlp_output(mlp_input, mlp)))

    def fold_scales(self) -> dict[str, str]:
        """Stop multiplying by gains of what a matrix gives; return the names gain → matrix, which must hold it now.

        Gains stay where a norm comes between, where every place has its own, where several MLPs share one, and where
        not all of this learns.
        """
        config, folded = self.config, {}
        if self.has_attention and config.sandwich_norm == "none":
            folded["attn_scale"] = "attn.proj.weight"
        if self.has_mlp and config.sandwich_norm != "both" and not config.untied_loop_mlps:
            folded["mlp_scale"] = "mlp.proj.weight"
        learn = all(self.get_parameter(name).requires_grad for names in folded.items() for name in names)
        if config.visit_controls or not learn:
            return {}
        for name in folded:
            setattr(self, name, None)
        return folded

    def attention_output(self, normed: Tensor, context: Context, controls: Controls | None) -> Tensor:
        """Return what attention makes of its input, normalised where the model has a sandwich norm."""
        output: Tensor = self.attn(normed, context, controls)
        return output if self.config.sandwich_norm == "none" else rms_norm(output)

    def mlp_output(self, normed: Tensor, mlp: nn.Module | None) -> Tensor:
        """Return what an MLP makes of its input, normalised where the model has a sandwich norm around both."""
        assert mlp is not None
        output: Tensor = mlp(normed)
        return rms_norm(output) if self.config.sandwich_norm == "both" else output


class BlockVisit:
    """A block with the gains of one visit, as lanes use it."""

    def __init__(self, block: Block, controls: Controls | None) -> None:
        self.block, self.controls = block, controls
        self.own: Block | Controls = block if controls is None else controls

    def mixed(self, x: Tensor, x0: Tensor) -> Tensor:
        """Return the block's input: the stream and the embedding, weighed per channel."""
        if not self.block.mixes_x0:
            return x
        return self.own.resid_mix[0] * x + self.own.resid_mix[1] * x0

    def attention_update(self, x: Tensor, context: Context) -> Tensor:  # (batch, seq_len, model_dim) → the same
        """Return what attention adds, from its lane after the mix."""
        if not self.block.has_attention:
            return torch.zeros_like(x)
        attended = self.block.attention_output(rms_norm(x) * self.own.norm_scale, context, self.controls)
        update: Tensor = self.block.attn_adds(times(self.own.attn_scale, attended))
        return update

    def mlp_update(self, x: Tensor, mlp: nn.Module | None) -> Tensor:  # (batch, seq_len, model_dim) → the same
        """Return what the MLP adds, from its lane."""
        if not self.block.has_mlp:
            return torch.zeros_like(x)
        output = self.block.mlp_output(rms_norm(x) * self.own.norm_scale, mlp)
        update: Tensor = self.block.mlp_adds(times(self.own.mlp_scale, output))
        return update
