"""Names of parts that other architectures have, so that a file which cannot be read is at least called what it is."""

from __future__ import annotations

import re
from collections.abc import Iterable

OWN_FAMILY = (
    "leave tensors that are no weights out of the file; another architecture is written as a family of your own: "
    "docs/howto/families.md"
)
PARTS = {  # a tensor's name: what it belongs to; the first that fits
    r"shared_blocks?\.": "weights shared between layers (one block visited by several, as in universal transformers)",
    (
        r"(?<![a-z_])(gate_up(_proj)?|gate_proj|up_proj|w_gate|mlp\.gate|mlp\.(w1|w2|w3))(_bank)?\b"
    ): "a gated MLP (SwiGLU or GEGLU)",
    r"\bexperts?\.|\brouter\.": "a mixture of experts",
    r"lora_[AB]\b|lora_(a|b)\.": "LoRA adapters beside the weights",
    r"(c_qkv|qkv_proj|qkv|Wqkv|c_attn)\.weight": "queries, keys and values in one matrix",
    r"\btransformer\.(wte|wpe|h)\.": "a GPT-2 or nanoGPT model",
    r"\b(model\.)?layers\.\d+\.(self_attn|input_layernorm)": "a Llama-style model of Hugging Face",
    r"\b(mixer|A_log|dt_bias|conv1d)\b": "a state-space model (Mamba)",
    r"\b(mtp_heads?|mtp_projs?)\.": "heads that predict further tokens, unused when scoring",
    r"\binv_freq$|\b(cos|sin)_cached$": "rotary tables, which are computed from rope_base and not weights",
    r"(ln_?\d|norm\d?|ln_f|layernorm)\.(weight|bias)$": "norms with weights",
    r"\.bias$": "biases",
    r"\.(weight_)?(scale(_inv)?|absmax|zero_point|zeros)$": "scales of a quantized matrix that stands beside them",
}


def call_parts(names: Iterable[str]) -> str:
    """Return what the names of tensors belong to, with an example of each; nothing if none is known."""
    called: dict[str, str] = {}
    for name in sorted(names):
        words = next((words for pattern, words in PARTS.items() if re.search(pattern, name)), None)
        if words:
            called.setdefault(words, name)
    return "; ".join(f"{name}: {words}" for words, name in called.items())
