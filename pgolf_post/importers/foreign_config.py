"""The settings of a foreign model: inferred from shapes, read from a log or config, or asked for by name.

A state dict says how wide and deep a model is, not which activation it used or where its loops are. Shapes count first.
The rest comes under the public scripts' hyperparameter names from a TOML file, `key=value` flags, or the
"Hyperparameters:" lines of a training log. What is still missing is an error that lists the keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import get_family

FAMILY = "golf_gpt"
OTHER_NAME = {
    "rope_yarn": "rope_ntk",
    "parallel_residual_start": "gptj_start",
    "parallel_start_layer": "lanes_start",
    "parallel_final_lane": "lane_output",
    "sparse_attn_gate_scale": "attn_gate_scale",
    "attn_out_gate_src": "attn_gate_source",
    "qk_gain_init": "q_gain_init",
    "tied_embed_init_std": "embedding_init_std",
    "rope_train_seq_len": "train_seq_len",
    "skip_gates_enabled": "skip_gates",
    "smear_gate_enabled": "smear_gate",
    "untie_loop_mlps": "untied_loop_mlps",
    "bigram_vocab_size": "bigram_buckets",
    "ve_dim": "value_embed_dim",
    "ve_layers": "value_embed_layers",
}
OTHER_SWITCH = {  # a public switch: what of ours it means when on; off, it says only what the model is not
    "gated_attn_enabled": ("attn_gate", "dense"),
    "sparse_attn_gate_enabled": ("attn_gate", "sparse"),
    "attn_out_gate_enabled": ("attn_gate", "double_sigmoid"),
    "ve_enabled": None,
}
OTHER_VALUE = {
    ("activation", "relu_squared"): "relu2",
    ("activation", "leaky_relu_0.5_squared"): "leaky_relu2",
    ("attn_gate_source", "proj"): "input",
    ("attn_gate_source", "q"): "query",
    ("rope_dims", "all"): 0,
    ("gptj_start", -1): None,
}
DETAILS = {  # what has no meaning where the shapes say that the model lacks the part; scripts state it anyway
    "num_loops": ("loop_start", "loop_end"),
    "bigram_buckets": ("bigram_dim", "trigram"),
    "value_embed_dim": ("value_embed_layers",),
    "attn_gate": ("attn_gate_scale", "attn_gate_source"),
}


@dataclass(frozen=True)
class Inferred:
    """A model's settings and how they were determined."""

    model: Mapping[str, Any]  # complete settings of family golf_gpt
    assumed: Mapping[str, Any]  # keys that were not given and that no shape determines, with the defaults taken
    unused: Sequence[str]  # given, but about a part that the model does not have


@cache
def our_keys() -> frozenset[str]:
    """Return the names of the family's model settings, as config.json has them."""
    return frozenset(get_family(FAMILY).complete({"vocab_size": 2, "train_seq_len": 2}))


def known_keys() -> frozenset[str]:
    """Return every name that a setting may be given by: ours, and the public scripts'."""
    return our_keys() | OTHER_NAME.keys() | OTHER_SWITCH.keys()


def require_known(given: Mapping[str, Any]) -> None:
    """Raise SettingsError naming each key that is neither ours nor the public scripts', and the nearest that are."""
    unknown = []
    for name in given:
        if name not in known_keys():
            close = difflib.get_close_matches(name, sorted(known_keys()), n=3)
            unknown.append(f"{name!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""))
    if unknown:
        raise SettingsError(
            f"not a setting of the model: {', '.join(unknown)}",
            hint=f"settings are {', '.join(sorted(known_keys()))}",
        )


def split_log(logged: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split a log into settings of the model and the names of all others (optimizer, paths and so on)."""
    other = [name for name in logged if name not in known_keys()]
    return {name: value for name, value in logged.items() if name in known_keys()}, other


def infer_model(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Inferred:
    """Return settings for canonical tensors. `given` is in our names or the public scripts'.

    Raises SettingsError for names of neither and for keys that no shape determines and nobody gave, MismatchError where
    a given value contradicts the shapes.
    """
    # what the shapes say, and what was given
    shapes, stated = settings_from_shapes(tensors), translate(given)
    if stated.get("embedding_dim") == shapes["model_dim"]:
        stated["embedding_dim"] = None  # our word for "as wide as the model"
    known = {**stated, **shapes}

    # details of parts that the model lacks are reported, and dropped
    idle = {detail for part in DETAILS if known.get(part) in (0, "none") for detail in DETAILS[part]}
    unused = sorted(idle & stated.keys())
    stated, known = ({key: value for key, value in tree.items() if key not in idle} for tree in (stated, known))

    # what is given must not contradict the shapes, and nothing may be missing
    contradictions = [
        f"{key}: shapes say {shapes[key]!r}, given {value!r}"
        for key, value in stated.items()
        if key in shapes and shapes[key] != value
    ]
    if contradictions:
        raise MismatchError("settings contradict the tensors: " + "; ".join(contradictions))
    taken = {"carry": "frozen"} if "recur_beta" in tensors and "carry" not in known else {}  # buffers in the scripts
    known |= taken
    missing = [key for key in required_keys(tensors, known) if key not in known]
    if missing:
        raise SettingsError(
            f"no shape determines these settings and nobody gave them: {', '.join(missing)}",
            hint="give them with --set key=value, --config FILE.toml, or --log train.log of the run",
        )

    # the family fills in the rest
    complete = get_family(FAMILY).complete(known)
    assumed = {key: value for key, value in complete.items() if (key not in known and key not in idle) or key in taken}
    return Inferred(complete, assumed, unused)


def required_keys(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> list[str]:
    """Return the keys that must be given for these tensors."""
    required = ["activation", "logit_softcap", "rope_base", "rope_dims", "rope_ntk", "xsa_last_n", "ln_scale"]
    required += ["num_loops", "train_seq_len"]
    if known.get("num_loops"):
        required += ["loop_start", "loop_end"]
    if known["attn_gate"] == "sparse":
        required.append("attn_gate_scale")
    if known["attn_gate"] == "double_sigmoid":
        required.append("attn_gate_source")
    if "parallel_post_lambdas" in tensors:
        required += ["lanes_start", "lane_output"]
    if known["value_embed_dim"]:
        required.append("value_embed_layers")
    return required


def settings_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the shapes determine. Raises MismatchError if the basic matrices are not there."""
    basic = ("tok_emb.weight", "blocks.0.attn.k.weight", "blocks.0.attn.q_gain", "blocks.0.mlp.fc.weight")
    absent = [name for name in basic if name not in tensors]
    if absent:
        raise MismatchError(f"not a whole model: missing {', '.join(absent)}")
    vocab_size, embedding_dim = tensors["tok_emb.weight"].shape
    hidden_dim, model_dim = tensors["blocks.0.mlp.fc.weight"].shape
    num_heads = tensors["blocks.0.attn.q_gain"].numel()
    if num_heads == 0 or model_dim % num_heads:
        raise MismatchError(f"{num_heads} query gains do not divide a width of {model_dim}")
    gate = tensors.get("blocks.0.attn.gate")
    double_gate = tensors.get("blocks.0.attn.double_gate")
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embedding_dim": embedding_dim if embedding_dim != model_dim else None,
        "num_layers": sum(name.endswith(".attn.q.weight") for name in tensors),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": tensors["blocks.0.attn.k.weight"].size(0) // (model_dim // num_heads),
        "mlp_mult": hidden_dim / model_dim,
        "tie_embeddings": "lm_head.weight" not in tensors,
        "skip_gates": "skip_gates" in tensors,
        "smear_gate": "smear_gate" in tensors,
        "attn_gate": "none",
        "untied_loop_mlps": any(name.startswith("override_mlps.") for name in tensors),
        "value_residual": any(name.endswith(".attn.value_mix") for name in tensors),
        **_settings_of_tables(tensors, embedding_dim),
    }
    if gate is not None:
        settings["attn_gate"] = "dense" if gate.size(1) == model_dim else "sparse"
    if double_gate is not None:
        settings["attn_gate"] = "double_sigmoid"
    if "recur_beta" in tensors:
        settings["carry_per_pass"] = tensors["recur_beta"].ndim == 2
    windows = [t for t in (tensors.get("smear_gate"), double_gate, gate) if t is not None and t.size(1) != model_dim]
    return {**settings, "gate_window": windows[0].size(1)} if windows else settings


def _settings_of_tables(tensors: Mapping[str, Tensor], embedding_dim: int) -> dict[str, Any]:
    """Return the settings of n-gram and value-embedding tables; 0 rows or columns where there is none."""
    bigram, values = tensors.get("bigram.embed.weight"), tensors.get("value_embed.embed.weight")
    settings: dict[str, Any] = {"bigram_buckets": 0, "value_embed_dim": 0 if values is None else values.size(1)}
    if bigram is not None:
        settings["bigram_buckets"], width = bigram.shape
        settings["bigram_dim"] = width if width != embedding_dim else None
    return settings


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the public scripts' names and values into ours. Raises SettingsError for names of neither."""
    require_known(given)
    translated: dict[str, Any] = {}
    for name, value in given.items():
        if name in OTHER_SWITCH:
            meaning = OTHER_SWITCH[name]
            translated |= dict([meaning]) if meaning and value else {}
        else:
            key = OTHER_NAME.get(name, name)
            translated[key] = _our_value(key, value)
    return translated


def _our_value(key: str, value: object) -> object:
    """Translate a value as the public scripts write it; lists and tables stay."""
    if key == "value_embed_layers" and isinstance(value, str | int):
        return [layer.strip() for layer in str(value).split(",") if layer.strip()]
    return value if isinstance(value, list | dict) else OTHER_VALUE.get((key, value), value)
