"""The words of the public scripts for a model's settings, and what they mean in ours.

Scripts print every hyperparameter that they have, also those of parts that are switched off, so a switch that is off
says which other settings mean nothing. A few of their options change the model in ways that ours does not compute;
those are refused by name, because the tensors alone would not show it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import build_module

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
    "rope_train_seq_len": "train_seq_len",  # printed, and not read: the scripts use train_seq_len, which goes first
    "recur_layers_str": "recur_layers",
    "negative_slope": "leaky_slope",
    "bigram_hash_buckets": "bigram_buckets",
    "bigram_hash_dim": "bigram_dim",
    "skip_gates_enabled": "skip_gates",
    "smear_gate_enabled": "smear_gate",
    "untie_loop_mlps": "untied_loop_mlps",
    "bigram_vocab_size": "bigram_buckets",
    "ve_dim": "value_embed_dim",
    "ve_layers": "value_embed_layers",
    "trigram_vocab_size": "trigram_buckets",
    "layer_mlp_mult_schedule": "mlp_mult",
}
LISTS_OF_LAYERS = (
    "value_embed_layers", "recur_layers", "attn_layers", "xsa_layers", "nope_layers", "value_x0_layers",
)  # fmt: skip
OTHER_SWITCH = {  # a public switch: what of ours it means when on; off, it says only what the model is not
    "gated_attn_enabled": ("attn_gate", "dense"),
    "sparse_attn_gate_enabled": ("attn_gate", "sparse"),
    "attn_out_gate_enabled": ("attn_gate", "double_sigmoid"),
    "ve_enabled": None,
    "bigram_enabled": None,
    "use_smeargate": None,
    "parallel_residual": ("lane_kind", "sequential"),
    "disable_layer0_attn": ("first_attention", False),
    "pos_conditional_bigram": ("bigram_classes", "word_start"),
    "loop_pass_emb_enabled": ("pass_embeddings", "pass"),
    "loop_pass_embeddings": ("pass_embeddings", "pass"),
}
SWITCHED_OFF = {  # a public switch: the part that the model lacks when it is off, and what else then says nothing
    "ve_enabled": ("value_embed_dim", "value_embed_layers"),
    "bigram_enabled": ("bigram_buckets", "bigram_dim", "bigram_hash", "trigram"),
    "use_smeargate": ("channel_smear",),
    "parallel_residual": ("lanes_start", "lane_output", "lane_kind"),
}
EXTRA = frozenset({"recur_layers"})  # theirs without a name of ours: see foreign_config.py
NOT_COMPUTED = {  # an option of some scripts: values that leave the model as it is, what any other one does
    "canon_ac_layers": (("", "none"), "short convolutions before attention and MLP"),
    "dtg_enabled": ((False,), "a gate on each block's update"),
    "repeat_untie_mlp": (("none", "full", ""), "a second matrix of their own in the MLPs of repeated layers"),
    "parallel_start_layer_is_physical": ((True,), "lanes that begin at a visit, not at a layer"),
}
OTHER_VALUE = {
    ("activation", "relu_squared"): "relu2",
    ("activation", "leaky_relu_0.5_squared"): "leaky_relu2",
    ("attn_gate_source", "proj"): "input",
    ("attn_gate_source", "q"): "query",
    ("rope_dims", "all"): 0,
    ("gptj_start", -1): None,
    ("lanes_start", -1): 0,
}


@cache
def our_keys() -> frozenset[str]:
    """Return the names of the family's model settings; config.json leaves out those of parts that a model lacks."""
    config = {"family": FAMILY, "model": {"vocab_size": 2, "train_seq_len": 2}, "graph": {}}
    settings: Any = build_module(config).config
    return frozenset(type(settings).model_fields)


def known_keys() -> frozenset[str]:
    """Return every name that a setting may be given by: ours, and the public scripts'."""
    return our_keys() | OTHER_NAME.keys() | OTHER_SWITCH.keys() | EXTRA | NOT_COMPUTED.keys()


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


def require_computed(given: Mapping[str, Any]) -> None:
    """Raise SettingsError naming each option that changes the model in a way that ours does not compute."""
    other = [f"{name} = {given[name]!r} ({NOT_COMPUTED[name][1]})" for name in NOT_COMPUTED if _changes(name, given)]
    if other:
        raise SettingsError(
            f"this model is not computed: {', '.join(other)}",
            hint="write it as a family of your own: docs/howto/families.md",
        )


def _changes(name: str, given: Mapping[str, Any]) -> bool:
    harmless = NOT_COMPUTED[name][0]
    return name in given and given[name] is not None and given[name] not in harmless


def switched_off(given: Mapping[str, Any], present: Mapping[str, Any]) -> set[str]:
    """Return our names of settings that belong to parts that a public switch says are off.

    Raises MismatchError if `present`, our settings of the parts that the file has, says otherwise.
    """
    off = {name: keys for name, keys in SWITCHED_OFF.items() if name in given and not given[name]}
    wrong = [
        f"{name} = {given[name]!r}, but {keys[0]} = {present[keys[0]]!r}"
        for name, keys in off.items()
        if present.get(keys[0]) not in (None, 0, "none")
    ]
    if wrong:
        raise MismatchError(f"settings contradict the tensors: {'; '.join(wrong)}")
    return {key for keys in off.values() for key in keys}


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the public scripts' names and values into ours. Raises SettingsError for names of neither."""
    require_known(given)
    translated: dict[str, Any] = {}
    for name, value in given.items():
        if name in NOT_COMPUTED or (name == "rope_train_seq_len" and "train_seq_len" in given):
            continue
        if name == "layer_mlp_mult_schedule" and not value:
            continue
        if name == "xsa_layers" and isinstance(value, int):  # scripts that count them from the last one
            translated["xsa_last_n"] = value
        elif name in OTHER_SWITCH:
            meaning = OTHER_SWITCH[name]
            translated |= dict([meaning]) if meaning and value else {}
        else:
            key = OTHER_NAME.get(name, name)
            translated[key] = _our_value(key, value)
    return translated


def _our_value(key: str, value: object) -> object:
    """Translate a value as the public scripts write it; lists and tables stay."""
    if key == "mlp_mult" and isinstance(value, str):
        return _numbers(key, value)
    if key in LISTS_OF_LAYERS[:2] or (key in LISTS_OF_LAYERS and value is not None):
        layers = _layers(key, value)
        return sorted(set(layers)) if key == "recur_layers" else layers
    return value if isinstance(value, list | dict) else OTHER_VALUE.get((key, value), value)


def _numbers(key: str, text: str) -> list[float]:
    """Return the numbers in a text like "4,4,3". Raises SettingsError for anything else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError(f"{key} = {text!r} is no list of numbers, such as 4,4,3") from None


def _layers(key: str, value: object) -> list[int]:
    """Return the layers in a list, or in a text like "4,5". Raises SettingsError for anything else."""
    parts = value if isinstance(value, list | tuple) else str("" if value is None else value).split(",")
    try:
        return [int(str(part).strip()) for part in parts if str(part).strip()]
    except ValueError:
        raise SettingsError(f"{key} = {value!r} is no list of layers, such as 4,5") from None
