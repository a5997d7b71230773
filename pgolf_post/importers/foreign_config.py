"""The settings of a foreign model: inferred from shapes, read from a log or config, or asked for by name.

A state dict says how wide and deep a model is, not which activation it used or where its loops are. Shapes count first.
The rest comes under the public scripts' hyperparameter names from a TOML file, `key=value` flags, or the
"Hyperparameters:" lines of a training log. What is still missing is an error that lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import build_module, get_family
from pgolf_post.importers.from_shapes import settings_from_shapes
from pgolf_post.importers.script_words import FAMILY, SWITCHED_OFF, require_computed, switched_off, translate
from pgolf_post.score.breakdown.token_text import token_kinds

DETAILS: dict[str, tuple[str, ...]] = {  # what has no meaning where the model lacks the part; scripts state it anyway
    "num_loops": ("loop_start", "loop_end"),
    "rope_ntk": ("rope_ntk_from",),
    "smear_gate": ("smear_across_bos",),
    "bigram_buckets": (
        "bigram_dim", "bigram_hash", "trigram", "bigram_classes", "bigram_heads", "bigram_gate", "word_start_boost",
    ),
    "value_embed_dim": ("value_embed_layers",),
    "attn_gate": ("attn_gate_scale", "attn_gate_source"),
}  # fmt: skip
KINDS_READ_BY = ("bigram_classes", "word_start_boost", "token_type_dim")
LANE_TENSORS = ("parallel_post_lambdas", "lane_merge")
ASKED = {  # a key that no log states: how to know it
    "smear_across_bos": "true for scripts up to PR #1797 (2026-04-16 to 04-25), false from #1851 on (`not_bos` in it)",
    "rope_ntk_from": "1024 for the 11-layer scripts of 2026-03-20 to 03-31, which trained at 2048",
    "reuse_last_skip": "true if the script uses min(i, num_skip_weights - 1), as 2026-04-03 does; else false",
}


@dataclass(frozen=True)
class Inferred:
    """A model's settings and how they were determined."""

    model: Mapping[str, Any]  # complete settings of family golf_gpt
    assumed: Mapping[str, Any]  # keys that were not given and that no shape determines, with the defaults taken
    unused: Sequence[str]  # given, but about a part that the model does not have


def infer_model(
    tensors: Mapping[str, Tensor],
    given: Mapping[str, Any],
    tokenizer: Any = None,  # a sentencepiece processor, where the model may read what kind a token is
) -> Inferred:
    """Return settings for canonical tensors. `given` is in our names or the public scripts'.

    Raises SettingsError for names of neither, for options that ours does not compute, and for keys that no shape
    determines and nobody gave; MismatchError where a given value contradicts the shapes.
    """
    # what the shapes say, and what was given
    require_computed(given)
    shapes, stated = settings_from_shapes(tensors), translate(given)
    if stated.get("embedding_dim") == shapes["model_dim"]:
        stated["embedding_dim"] = None  # our word for "as wide as the model"
    _require_whole(shapes, stated)
    shapes |= _widths(shapes.pop("mlp_widths"), shapes["model_dim"], stated)
    stated = _without_repeated_length(_with_loops(stated, shapes["num_layers"]))
    known = {**stated, **shapes}

    # details of parts that the model lacks are reported, and dropped
    idle = {detail for part in DETAILS if known.get(part) in (0, "none") for detail in DETAILS[part]}
    idle |= switched_off(given, shapes) | _idle_lanes(tensors, stated, given, shapes["num_layers"])
    if known.get("num_loops") == 0 and not known.get("visits") and not shapes["untied_loop_mlps"]:
        idle.add("untied_loop_mlps")
    said, stated = stated, {key: value for key, value in stated.items() if key not in idle}
    known = {**stated, **shapes}

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
    _require(required_keys(tensors, known), known)
    if tokenizer is not None and any(known.get(key) not in (None, 0, "none") for key in KINDS_READ_BY):
        known["token_kinds"] = token_kinds(tokenizer)
    known, without_meaning = _with_skips(tensors, known)
    idle |= without_meaning

    # the family fills in the rest
    complete = get_family(FAMILY).complete(known)
    assumed = {key: value for key, value in complete.items() if (key not in known and key not in idle) or key in taken}
    unused = sorted(key for key in idle & said.keys() if said[key] not in (None, False))
    return Inferred(complete, assumed, unused)


def _require_whole(shapes: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """Raise MismatchError for blocks without attention or MLP, unless the settings say that they have none."""
    if not shapes["first_attention"] and stated.get("first_attention") is not False:
        raise MismatchError(
            "not a whole model: block 0 has no attention",
            hint="if the script had switched it off: --set disable_layer0_attn=true",
        )
    if "attn_layers" in shapes and "attn_layers" not in stated:
        raise MismatchError(
            f"not a whole model: blocks {shapes['attn_layers']} alone have attention",
            hint=f"if the script built it so: --set attn_layers={shapes['attn_layers']}",
        )
    without = [layer for layer, width in enumerate(shapes["mlp_widths"]) if not width]
    listed = next((value for key in ("mlp_hidden", "mlp_mult") if isinstance(value := stated.get(key), list)), [])
    if without and [layer for layer, width in enumerate(listed) if not width] != without:
        raise MismatchError(
            f"not a whole model: blocks {without} have no MLP",
            hint="if the script built it so: --set mlp_mult=[…], with 0 for them",
        )


def _require(keys: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raise SettingsError naming the keys that nobody gave."""
    missing = [key for key in keys if key not in known]
    if missing:
        how = "".join(f"; {key}: {ASKED[key]}" for key in missing if key in ASKED)
        raise SettingsError(
            f"no shape determines these settings and nobody gave them: {', '.join(missing)}",
            hint=f"give them with --set key=value, --config FILE.toml, or --log train.log of the run{how}",
        )


def required_keys(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> list[str]:
    """Return the keys that must be given for these tensors."""
    required = ["activation", "logit_softcap", "rope_base", "rope_dims", "rope_ntk", "xsa_last_n", "ln_scale"]
    required += ["train_seq_len"] if known.get("visits") else ["num_loops", "train_seq_len"]
    if known.get("num_loops"):
        required += ["loop_start", "loop_end"]
    if known["attn_gate"] == "sparse":
        required.append("attn_gate_scale")
    if known["attn_gate"] == "double_sigmoid":
        required.append("attn_gate_source")
    if any(name in tensors for name in LANE_TENSORS):
        required.append("lanes_start")
    if "parallel_post_lambdas" in tensors:
        required.append("lane_output")
    if known["value_embed_dim"]:
        required.append("value_embed_layers")
    if known["smear_gate"]:
        required.append("smear_across_bos")
    if known["channel_smear"] != "none" and known.get("rope_ntk"):
        required.append("rope_ntk_from")
    return required


# settings that scripts state in several ways


def _widths(widths: list[int], dim: int, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the hidden widths as `_width` does; where layers differ, as lists.

    Raises MismatchError if what is stated contradicts the shapes.
    """
    lists = [key for key in ("mlp_hidden", "mlp_mult") if isinstance(stated.get(key), list)]
    if len(set(widths)) == 1 and not lists:
        return _width(widths[0], dim, stated)
    hidden, mults = stated.pop("mlp_hidden", None), stated.pop("mlp_mult", None)
    for key, given, meant in (
        ("mlp_hidden", hidden, hidden),
        ("mlp_mult", mults, [int(mult * dim) for mult in mults] if isinstance(mults, list) else mults),
    ):
        if given and not (key == "mlp_mult" and hidden) and meant != widths:
            raise MismatchError(f"settings contradict the tensors: {key}: shapes say {widths}, given {given!r}")
    for multiples in (mults, [width / dim for width in widths]):
        if isinstance(multiples, list) and [int(multiple * dim) for multiple in multiples] == widths:
            return {"mlp_mult": [float(multiple) for multiple in multiples], "mlp_hidden": None}
    return {"mlp_hidden": widths}


def _width(hidden: int, dim: int, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the hidden width as a multiple or, where none gives it, as a number; what is stated of it is used up.

    Raises MismatchError if it contradicts the shapes.
    """
    given, mult = stated.pop("mlp_hidden", None), stated.pop("mlp_mult", None)
    if given not in (None, 0, hidden):
        raise MismatchError(f"settings contradict the tensors: mlp_hidden: shapes say {hidden}, given {given!r}")
    if mult is not None and not given and int(mult * dim) != hidden:
        raise MismatchError(
            f"settings contradict the tensors: mlp_mult: shapes say {hidden / dim!r}, given {mult!r} "
            f"(int({mult!r} · {dim}) = {int(mult * dim)}, not {hidden})"
        )
    for multiple in (mult, hidden / dim):
        if multiple is not None and int(multiple * dim) == hidden:
            return {"mlp_mult": float(multiple), "mlp_hidden": None}
    return {"mlp_mult": hidden / dim, "mlp_hidden": hidden}


def _with_loops(stated: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Return settings with `recur_layers` in our words: loops if the layers follow each other, else a list of visits.

    Raises SettingsError if they are no layers, or the loops are given twice.
    """
    if "recur_layers" not in stated:
        return dict(stated)
    rest = {key: value for key, value in stated.items() if key != "recur_layers"}
    layers: list[int] = stated["recur_layers"]
    twice = [key for key in ("visits", "num_loops", "loop_start", "loop_end") if rest.get(key)]
    if layers and twice:
        raise SettingsError(f"recur_layers and {', '.join(twice)} both say which layers are visited again; give one")
    if any(not 0 <= layer < num_layers for layer in layers):
        raise SettingsError(f"recur_layers: {layers} are not all layers; layers are 0..{num_layers - 1}")
    if not layers:
        return {"num_loops": 0, **rest}
    if layers == list(range(layers[0], layers[-1] + 1)):
        return {**rest, "num_loops": 1, "loop_start": layers[0], "loop_end": layers[-1]}
    rest = {key: value for key, value in rest.items() if key not in ("num_loops", "loop_start", "loop_end")}
    return {**rest, "visits": [*range(layers[-1] + 1), *layers, *range(layers[-1] + 1, num_layers)]}


def _without_repeated_length(stated: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which rope_ntk_from is left out if it is the training length, which is its default."""
    if "rope_ntk_from" in stated and stated["rope_ntk_from"] == stated.get("train_seq_len"):
        stated["rope_ntk_from"] = None
    return stated


def _idle_lanes(
    tensors: Mapping[str, Tensor], stated: Mapping[str, Any], given: Mapping[str, Any], num_layers: int
) -> set[str]:
    """Return what says nothing in a file without lanes. Raises MismatchError for lanes that would need some tensors."""
    if any(name in tensors for name in LANE_TENSORS):
        if given.get("parallel_residual") is False:
            raise MismatchError("settings contradict the tensors: parallel_residual = False, but the file has lanes")
        return set()
    start = stated.get("lanes_start")
    if start is not None and 0 < start < num_layers and given.get("parallel_residual") is not False:
        raise MismatchError(
            f"lanes_start (parallel_start_layer) is given as {start}, but the file has no {' or '.join(LANE_TENSORS)}",
            hint="if the script's lanes were off: --set parallel_residual=false; if attention and MLP read one input: "
            "--set gptj_start=LAYER, and leave lanes_start out",
        )
    return set(SWITCHED_OFF["parallel_residual"])


def _with_skips(tensors: Mapping[str, Tensor], known: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return settings with the number of skips that the file stores, if the visits could use more; and what is idle.

    Raises SettingsError if nobody said what the visits without a skip of their own do.
    """
    complete = {**known, "stored_skips": None, "reuse_last_skip": False}
    config = {"family": FAMILY, "model": get_family(FAMILY).complete(complete), "graph": {"active_loops": 0}}
    usable = build_module(config).get_parameter("skip_weights").size(0)
    stored = tensors["skip_weights"].size(0) if "skip_weights" in tensors else usable
    if stored >= usable:
        idle = set() if known.get("stored_skips") else {"stored_skips", "reuse_last_skip"}
        return {key: value for key, value in known.items() if key not in idle}, idle
    if "reuse_last_skip" not in known:
        raise SettingsError(
            f"skip_weights has {stored} rows, and the visits could use {usable}: nobody gave reuse_last_skip",
            hint=f"--set reuse_last_skip=…: {ASKED['reuse_last_skip']}; if no layer was visited twice, num_loops is 0",
        )
    return {**known, "stored_skips": stored}, set()
