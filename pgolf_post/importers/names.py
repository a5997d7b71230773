"""Names shared by the formats: renaming by the ends of names, and the parts that only some models have.

Names of parts are those of the public scripts (openai/parameter-golf): hashed n-grams (`bigram`), value embeddings
(`ve_shared`, one scale per layer in `ve_layer_scales`), value residual (`vr_lambda`), untied loop MLPs
(`override_mlps.{block}_p{re-visit}`), head gates, the smear gate, and the older ones with one share per channel:
`smear.gate` is the predecessor's, `smeargate.gate` the token's own; a vector for each pass of the loop is
`loop_pass_emb`. What two lanes and a carry consist of stands in
banked files and in every compressed artifact, which names its matrices as flat files do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pgolf_post.errors import MismatchError

if TYPE_CHECKING:
    from torch import Tensor

PART_RENAMES = {  # foreign suffix: canonical suffix
    ".attn.attn_gate_w": ".attn.gate",
    ".attn.attn_gate_proj.weight": ".attn.double_gate",
    ".attn.vr_lambda": ".attn.value_mix",
    "smear_gate.weight": "smear_gate",
    "smear.gate": "channel_smear",
    "smeargate.gate": "channel_keep",
    "ve_shared.embed.weight": "value_embed.embed.weight",
    "ve_shared.proj.weight": "value_embed.proj.weight",
    "ve_shared.scale": "value_embed.scale",
    "loop_pass_emb.weight": "passes.embed",
}

PARTS = (
    r"tok_emb\.weight|lm_head\.weight|embed_proj\.weight|head_proj\.weight|skip_weights|skip_gates"
    r"|smear_gate\.weight|smear_lambda|smear(gate)?\.gate|bigram\.(embed\.weight|proj\.weight|scale)"
    r"|bigram_hash\.(table|proj)\.weight"
    r"|ve_shared\.(embed\.weight|proj\.weight|scale)|ve_layer_scales\.\d+"
    r"|override_mlps\.\d+_p\d+\.(fc|proj)\.weight|repeat_mlp\.\d+\.(fc|proj)\.weight|blocks\.\d+\.(attn_scale|mlp_scale|resid_mix)"
    r"|blocks\.\d+\.attn\.(q_gain|vr_lambda|attn_gate_w|attn_gate_proj\.weight)"
    r"|recur_(alpha|beta)|loop_pass_emb\.weight|parallel_(post|resid)_lambdas|lane_merge"
)

PRODUCT_HASH = {  # of the script that hashes bigrams by a product (#65): its table has no scale
    "bigram_hash.table.weight": "bigram.embed.weight",
    "bigram_hash.proj.weight": "bigram.proj.weight",
}

LAYER_SCALE = re.compile(r"ve_layer_scales\.(\d+)")
LAYER_SCALES = "value_embed.layer_scales"


def rename(name: str, suffixes: Mapping[str, str]) -> str:
    """Return `name` with the first matching suffix replaced; unchanged if none matches."""
    for old, new in suffixes.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def reversed_names(suffixes: Mapping[str, str]) -> dict[str, str]:
    """Return canonical suffix → foreign suffix."""
    return {canonical: foreign for foreign, canonical in suffixes.items()}


def gather_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join `ve_layer_scales.0`, `.1`, … of one element each to one canonical vector, and name bigrams as all others do.

    Raises MismatchError if one of them is missing or has more than one element.
    """
    import torch  # here, so that naming the formats does not load it

    scales = {int(match[1]): tensor for name, tensor in state.items() if (match := LAYER_SCALE.fullmatch(name))}
    rest = {PRODUCT_HASH.get(name, name): t for name, t in state.items() if not LAYER_SCALE.fullmatch(name)}
    if not scales:
        return rest
    wrong = [f"ve_layer_scales.{i} is {tuple(t.shape)}" for i, t in sorted(scales.items()) if t.numel() != 1]
    wrong += [f"ve_layer_scales.{i} is missing" for i in range(max(scales)) if i not in scales]
    if wrong:
        raise MismatchError(f"one scale of one element per layer with value embeddings expected: {'; '.join(wrong)}")
    return {**rest, LAYER_SCALES: torch.cat([scales[i].reshape(1) for i in range(len(scales))])}


def spread_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `gather_parts`: the canonical vector → foreign vectors of one element, a table without scale → its name."""
    own = {} if "bigram.scale" in tensors else reversed_names(PRODUCT_HASH)
    rest = {own.get(name, name): tensor for name, tensor in tensors.items() if name != LAYER_SCALES}
    scales = tensors.get(LAYER_SCALES, ())
    return {**rest, **{f"ve_layer_scales.{i}": scale.reshape(1).clone() for i, scale in enumerate(scales)}}
