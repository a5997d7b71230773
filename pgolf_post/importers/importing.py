"""Import a foreign checkpoint as a native folder, and export one back."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf_post.base.progress import say
from pgolf_post.base.ranks import ALONE
from pgolf_post.base.storage import atomic_file, require_new, sha256_file
from pgolf_post.checkpoint import CHECKPOINT_ROOT, Checkpoint, View, ViewName, save_checkpoint, write_tensors
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, SettingsError
from pgolf_post.families import load_module, train_seq_len
from pgolf_post.importers import FORMATS, get_format, recognise
from pgolf_post.importers.agreement import require_agreement
from pgolf_post.importers.foreign_config import infer_model
from pgolf_post.importers.foreign_file import ForeignFile, read_foreign
from pgolf_post.importers.script_words import FAMILY, translate
from pgolf_post.importers.strangers import OWN_FAMILY, call_parts
from pgolf_post.importers.visits import name_visits
from pgolf_post.importers.vocabulary import Views, fit_vocabulary, retie
from pgolf_post.score.metric import measure_module
from pgolf_post.score.plain import PlainProtocol


@dataclass(frozen=True)
class Imported:
    """An imported checkpoint, and what was assumed about it."""

    checkpoint: Checkpoint
    format: str
    assumed: Mapping[str, Any]
    unused: Sequence[str]  # settings given for parts that the model does not have
    notes: Sequence[str] = ()  # what was read, ignored, renamed, converted, tied or trimmed


def import_file(
    path: Path,
    given: Mapping[str, Any],
    data: DataFolder,
    name: str,
    active_loops: int | None = None,
    metric_tokens: int | None = 65536,
    root: Path = CHECKPOINT_ROOT,
    phase: str = "imported",
    trim_vocab: bool = False,
) -> Imported:
    """Turn `path` into `<root>/<name>/step_…-<phase>`, raw and EMA views, metrics measured on `data`.

    Files of one run imported under one name are one run: they can be averaged, by step or from a phase on.
    `trim_vocab` cuts rows off that only pad the vocabulary. `active_loops` is runtime graph state, which no foreign
    file records; all configured loops by default, as at the end of a run. Raises SettingsError for settings that are
    missing, MismatchError for tensors that do not fit.
    """
    # tensors in canonical names, one head if it is tied, one row per token
    foreign = read_foreign(path)
    form, views = canonical_views(foreign, str(path))
    for view, tensors in views.items():
        require_agreement(tensors, f"{path} ({view})")
    views, visits = _with_visits(views, given)
    rows = views["raw"]["tok_emb.weight"].size(0) if "tok_emb.weight" in views["raw"] else 0
    views, tied = retie(views, given)
    views, trimmed = (
        fit_vocabulary(views, data.vocab_size, trim_vocab, str(path), str(data.path)) if rows else (views, [])
    )
    notes = [*foreign.notes, *visits, *tied, *trimmed]
    for note in notes:
        say(note)

    # the model that they fit; a log states the vocabulary before it was trimmed
    stated = {k: v for k, v in given.items() if not (trimmed and k == "vocab_size" and v == rows)}
    inferred = infer_model(views["raw"], stated, data.tokenizer)

    # what would fail at the end fails now
    step = foreign.step or 0
    folder = root / name / f"step_{step:06d}-{phase}"
    require_new(folder)

    # the config, with runtime graph state
    assumed = dict(inferred.assumed)
    if active_loops is None:
        active_loops = 1 if inferred.model.get("visits") else int(inferred.model["num_loops"])
        assumed["active_loops"] = active_loops
    config = {
        "family": FAMILY,
        "model": dict(inferred.model),
        "graph": {"active_loops": active_loops},
        "tokenizer": {"sha256": data.tokenizer_sha256, "vocab_size": data.vocab_size},
        "data": {"manifest_sha256": data.manifest_sha256},
    }

    # measured as a training run measures its checkpoints, then saved
    metrics = _measure(config, views, data, metric_tokens)
    source = {"file": path.name, "sha256": sha256_file(path), "format": form, "assumed": assumed, "notes": notes}
    meta = {"kind": "imported", "run": name, "phase": phase, "step": step, "parents": [], "source": source}
    checkpoint = save_checkpoint(folder, config, views, {**meta, "data_dir": str(data.path)}, metrics)
    return Imported(checkpoint, form, assumed, inferred.unused, notes)


def _with_visits(views: Views, given: Mapping[str, Any]) -> tuple[Views, list[str]]:
    """Return views with the tensors of visits named by their layers, and notes on it."""
    stated = translate(given)
    named: Views = {}
    notes: list[str] = []
    for view, tensors in views.items():
        named[view], more = name_visits(tensors, stated)
        notes += more
    return named, list(dict.fromkeys(notes))


def canonical_views(foreign: ForeignFile, source: str) -> tuple[str, dict[ViewName, dict[str, Tensor]]]:
    """Return the format's name and each view's canonical tensors. Raises MismatchError if the formats differ."""
    forms = {name: recognise(state, f"{source} ({name})") for name, state in foreign.views.items()}
    if len(set(forms.values())) != 1:
        raise MismatchError(f"{source}: its weights and EMA are of different formats: {forms}")
    form = next(iter(forms.values()))
    return form, {name: _canonical(form, state, f"{source} ({name})") for name, state in foreign.views.items()}


def _canonical(form: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return canonical tensors; an error names the file, and the parts that another architecture has."""
    try:
        return FORMATS[form].to_canonical(state)
    except MismatchError as error:
        unknown = [name for name in state if name in str(error)]
        parts = call_parts(unknown)
        about = f". Of these {parts}" if parts else ""
        raise MismatchError(f"{source}: {error}{about}", hint=error.hint or (OWN_FAMILY if parts else None)) from None


def _measure(
    config: Mapping[str, Any],
    views: Mapping[ViewName, Mapping[str, Tensor]],
    data: DataFolder,
    metric_tokens: int | None,
) -> dict[str, dict[str, Any]]:
    protocol = PlainProtocol(seq_len=train_seq_len(config), max_tokens=metric_tokens)
    return {
        name: measure_module(load_module(config, tensors, name).to(ALONE.device), data, protocol)
        for name, tensors in views.items()
    }


def export_view(view: View, form: str, out: Path) -> None:
    """Write a view's weights as a foreign state dict, .pt or .safetensors by `out`'s ending, in one atomic step."""
    state = get_format(form).from_canonical(view.tensors)
    with atomic_file(out) as temporary:
        if out.suffix == ".safetensors":
            write_tensors(temporary, state)
        elif out.suffix == ".pt":
            buffer = io.BytesIO()  # torch reports a full disk as RuntimeError
            torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
            temporary.write_bytes(buffer.getbuffer())
        else:
            raise SettingsError(f"{out}: write a .pt or a .safetensors file")
    say(f"wrote {out}: {len(state)} tensors, format {form}")
