"""`--init-from CHECKPOINT`: a run whose weights start from another model's, by a rule for each tensor.

The model is built and initialised as ever; then every tensor that the other model has, or has in another shape, is
filled by a rule of `init_rules`. Optimizer state, averages, clock and data position start anew, so this is no resumed
run. How far the function moved is measured, not claimed: both models read the same validation tokens, and the largest
difference of their logits is told and recorded beside the rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import print_table, say
from pgolf_post.checkpoint import Checkpoint, View, complete_config
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.settings import parse_settings
from trainer.model.architecture import GraphState, ModelConfig
from trainer.model.gpt import GolfGPT
from trainer.model.layers import activation_names, has_xsa, rotations, with_attention
from trainer.start.init_layers import origins, skip_rows
from trainer.start.init_rules import LAYER, Pair, TensorStart, is_fresh, start_values
from trainer.start.init_settings import IDENTITY, InitSettings

COMPARED_TOKENS = 256
BY_TOKEN = ("tok_emb.", "lm_head.", "output_bias", "bigram.embed.", "trigram.embed.", "value_embed.embed.")
UNNAMED = ("num_layers", "train_seq_len", "token_kinds")  # settings whose difference other lines tell


@dataclass(frozen=True)
class Start:
    """Origin of the weights of a run, tensor by tensor, and the distance of its function from the base's."""

    checkpoint: str
    view: str
    id: str
    layers: tuple[int, ...]
    tensors: tuple[TensorStart, ...]
    settings: dict[str, tuple[Any, Any]]  # of the model, that differ: there, here
    logits_differ_by: dict[int, float]  # largest difference of a logit, by active loops; of one vocabulary alone

    def facts(self) -> dict[str, Any]:
        """Return the start as meta.json keeps it."""
        told = {key: value for key, value in asdict(self).items() if key not in ("tensors", "layers", "settings")}
        return {
            **told,
            "logits_differ_by": {str(loops): value for loops, value in self.logits_differ_by.items()},
            "layers": list(self.layers),
            "settings": {key: list(pair) for key, pair in self.settings.items()},
            "tensors": [
                {**asdict(one), "there": _listed(one.there), "here": _listed(one.here)} for one in self.tensors
            ],
        }


def _listed(shape: tuple[int, ...] | None) -> list[int] | None:
    return None if shape is None else list(shape)


def start_from_checkpoint(model: GolfGPT, settings: InitSettings, data: DataFolder, compare: bool = True) -> Start:
    """Fill an initialised model by the rules, in place. Return what was done.

    Raises NotFoundError for a folder that is not there, MismatchError for another family or vocabulary, layers that do
    not fit, or a tensor that no rule covers; the model is then as it was.
    """
    assert settings.checkpoint is not None
    checkpoint = Checkpoint.open(settings.checkpoint)
    same_words = require_same_words(checkpoint, model, settings, data)
    base = parse_settings(ModelConfig, complete_config(checkpoint.config)["model"], f"{checkpoint.path}: config.json")
    layers = origins(base, model.config, settings.layers)
    pair = Pair(base, model.config, layers, skip_rows(base, model.config, layers), settings.fresh)
    require_patterns(settings.fresh, model)
    view = checkpoint.load(settings.weights)
    own = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    values, rows = start_values(own, view.tensors, pair)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    differ = compared(view, base, model.config, values, data) if compare and same_words else {}
    return Start(
        str(checkpoint.path),
        view.name,
        view.id,
        layers,
        tuple(rows),
        other_settings(base, model.config, layers),
        differ,
    )


def require_same_words(checkpoint: Checkpoint, model: GolfGPT, settings: InitSettings, data: DataFolder) -> bool:
    """Return whether tokens are the same pieces of text in both models.

    Raises MismatchError for a model of another family, or of other words where a tensor has a row for each.
    """
    if (family := checkpoint.config["family"]) != "golf_gpt":
        raise MismatchError(f"{checkpoint.path} is a model of family {family!r}; a run can start from golf_gpt alone")
    theirs = (checkpoint.config.get("tokenizer") or {}).get("sha256")
    size = complete_config(checkpoint.config)["model"]["vocab_size"]
    if size == model.config.vocab_size and theirs in (None, data.tokenizer_sha256):
        if theirs is None:
            say(f"{checkpoint.path} does not say which tokenizer it was trained with; {size:,} pieces there and here")
        return True
    kept = [
        name for name, _ in model.named_parameters() if name.startswith(BY_TOKEN) and not is_fresh(name, settings.fresh)
    ]
    if kept:
        named = ", ".join(f'"{name}"' for name in kept)
        there = f"{size:,} pieces of tokenizer {str(theirs)[:12]}"
        here = f"{model.config.vocab_size:,} of {data.tokenizer_sha256[:12]}"
        raise MismatchError(
            f"{checkpoint.path} has another vocabulary ({there}) than {data.path} ({here}): rows of "
            f"{', '.join(kept)} mean other pieces of text",
            hint=f"train on its tokenizer's data, or start these anew: --set 'init.fresh=[{named}]'",
        )
    return False


def require_patterns(patterns: Iterable[str], model: GolfGPT) -> None:
    """Raise SettingsError for a pattern of init.fresh that matches no tensor."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(is_fresh(name, (pattern,)) for name in names):
            raise SettingsError(f"init.fresh: {pattern!r} matches no tensor of this model, such as {names[0]}")


def other_settings(base: ModelConfig, config: ModelConfig, layers: Sequence[int]) -> dict[str, tuple[Any, Any]]:
    """Return what differs there and here and is no tensor: settings of the model, and what they give a copied layer."""
    there, here = base.model_dump(mode="json"), config.model_dump(mode="json")
    pairs = {key: (there.get(key), here.get(key)) for key in {**there, **here} if key not in UNNAMED}
    differ = {f"model.{key}": pair for key, pair in pairs.items() if pair[0] != pair[1]}
    for layer, origin in enumerate(layers):
        for key, value in of_layer(config, layer).items() if origin != IDENTITY else ():
            if (there_value := of_layer(base, origin)[key]) != value:
                differ[f"{key} of layer {layer}"] = there_value, value
    return differ


def of_layer(config: ModelConfig, layer: int) -> dict[str, Any]:
    """Return what settings give a layer by its place, apart from tensors: a layer that moves may lose it."""
    return {
        "XSA": with_attention(config)[layer] and has_xsa(config, layer, config.num_layers),
        "rotation": rotations(config)[layer],
        "activation": activation_names(config)[layer],
        "parallel form": config.gptj_start is not None and layer >= config.gptj_start,
        "value embedding": layer in config.value_embed_layers,
    }


@torch.no_grad()
def compared(
    view: View, base: ModelConfig, config: ModelConfig, values: Mapping[str, Tensor], data: DataFolder
) -> dict[int, float]:
    """Return the largest difference of two models' logits on the first validation tokens, by active loops.

    Both compute in float32 on the CPU. All loops are compared too where both models have as many.
    """
    _, shard = next(iter(data.shards("val")))
    tokens = torch.as_tensor(shard[: min(COMPARED_TOKENS, config.train_seq_len)].astype("int64"))[None]
    theirs, ours = (GolfGPT(each, GraphState()).eval() for each in (base, config))
    theirs.load_state_dict({name: tensor.float() for name, tensor in view.tensors.items()})
    ours.load_state_dict({name: tensor.float() for name, tensor in values.items()})
    differ = {}
    for loops in sorted({0, config.max_active_loops if base.max_active_loops == config.max_active_loops else 0}):
        graph = GraphState(active_loops=loops)
        theirs.set_graph(graph)
        ours.set_graph(graph)
        differ[loops] = float((theirs(tokens) - ours(tokens)).abs().max())
    return differ


# ---- what is shown -------------------------------------------------------------------------------------------------


def show_start(start: Start) -> None:
    """Show the rule of each tensor, layers that are treated alike in one row, and how far the function moved."""
    rows = [(name, rule, _shape(there), _shape(here)) for name, rule, there, here in merged(start.tensors)]
    print_table(f"start from {start.checkpoint} ({start.view} weights)", ("tensor", "rule", "there", "here"), rows)
    if start.layers != tuple(range(len(start.layers))):
        say("layers: " + ", ".join("new" if at < 0 else f"{at}" for at in start.layers) + " (of the base, in order)")
    if start.settings:
        told = ", ".join(f"{key} {there} → {here}" for key, (there, here) in start.settings.items())
        say(f"settings that differ: {told}")
    if not start.logits_differ_by:
        say("another vocabulary: a token is other text to each of the two models, so their logits are not compared")
    for loops, difference in start.logits_differ_by.items():
        where = f"{loops} loops on" if loops else "loops off"
        say(f"{where}: logits differ by {difference:.2g} at most on {COMPARED_TOKENS} validation tokens")
    say("optimizer state, averages, clock and data position start anew")


def merged(
    tensors: Iterable[TensorStart],
) -> list[tuple[str, str, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """Return rows of the table: tensors of several layers with one rule and one shape stand in one row."""
    layers: dict[tuple[Any, ...], list[str]] = {}
    for one in tensors:
        match = LAYER.fullmatch(one.tensor)
        parts = (match[1], match[3]) if match else (one.tensor, None)
        layers.setdefault((*parts, one.rule, one.there, one.here), []).append(match[2] if match else "")
    return [
        (head if rest is None else f"{head}.{_span(numbers)}{rest}", rule, there, here)
        for (head, rest, rule, there, here), numbers in layers.items()
    ]


def _span(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "×".join(map(str, shape)) or "1"
