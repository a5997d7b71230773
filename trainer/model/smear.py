"""Smear gates: each token's embedding takes a share of its predecessor's, before attention sees either.

The public scripts of openai/parameter-golf have three forms. The *narrow* gate (from #1667 on) adds its share, decided
per token from a few leading dimensions; #1851 and later leave a document's BOS alone, earlier ones do not. The
*channel* gates of March decide once per channel and blend: after the norm, by the predecessor's share (#162, #198,
#549, #1019 and their kin), or before it, by the token's own share (#65). Those know no BOS.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_post.data.tokenizer import BOS_ID

ChannelSmear = Literal["none", "after_norm", "before_norm"]


def narrow_smear(
    x: Tensor,  # (batch, seq_len, dim), before the norm
    tokens: Tensor,  # (batch, seq_len)
    gate: Tensor,  # (1, window): of the token's leading dimensions
    strength: Tensor,  # (1,)
    across_bos: bool,
) -> Tensor:  # (batch, seq_len, dim)
    """Return x_t + strength · σ(gate · x_t[:window]) · x_{t-1}; a BOS takes nothing unless `across_bos`."""
    share = torch.sigmoid(F.linear(x[:, 1:, : gate.size(1)], gate))
    share = strength * share if across_bos else strength * share * (tokens[:, 1:, None] != BOS_ID)
    return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)


def channel_smear(
    x: Tensor,  # (batch, seq_len, dim)
    logits: Tensor,  # (dim,) of the share
    of_predecessor: bool,  # the share σ(logits) is the predecessor's; else the token's own
) -> Tensor:  # (batch, seq_len, dim)
    """Return the blend of each position with its predecessor, per channel; before the first position stands zero."""
    share = torch.sigmoid(logits).to(x.dtype)
    own, previous = (1 - share, share) if of_predecessor else (share, 1 - share)
    return own * x + previous * F.pad(x[:, :-1], (0, 0, 1, 0))
