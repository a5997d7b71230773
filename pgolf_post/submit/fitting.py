"""The quantization of a record folder that trains, where its artifact was made by `fit`.

Ordinary code that never runs here: `pgolf-post submit --recipe` makes a script of it (forms.py, fit_form.py). κ is
measured again, pairs of regularisation are tried again where they were tried, and c is searched again, because all
three depend on the weights. What needs no search was decided when the script was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from pgolf_post.calibrate.packed import pack_upper, unpack_upper
from pgolf_post.calibrate.stats import Fisher, Stats
from pgolf_post.calibrate.sums import Sums
from pgolf_post.fit.build import Builder
from pgolf_post.fit.kappa import by_tensor, measure_kappas
from pgolf_post.fit.probe import Probe, probe_text
from pgolf_post.fit.regularize import least_divergent
from pgolf_post.fit.settings import FitSettings
from pgolf_post.fit.solve import Search


def known(name: str) -> Any:
    """Return what is known when the program is made: choices, limit, codec, kappa, sites, lookups, roles, …"""
    raise NotImplementedError(name)


def fisher(sums: Sums, num_tokens: int) -> Fisher:
    """Return the backward half of the statistics, rounded as a file of them is."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for key in sums:
        kind, _, name = key.partition(".")
        kinds.setdefault(kind, {})[name] = sums[key].cpu()
    rounded = {
        kind: {name: unpack_upper(pack_upper(tensor)) for name, tensor in kinds[kind].items()}
        for kind in ("weighted", "outputs", "lookup")
    }
    return Fisher(
        rows=kinds["rows"],
        weighted=rounded["weighted"],
        outputs=rounded["outputs"],
        lookup_counts=kinds["counts"],
        lookup_rows=kinds["lookup_rows"],
        lookup_hessians=rounded["lookup"],
        num_tokens=num_tokens,
        head=known("head"),
        token_table=known("token_table"),
    )


def fitted(tensors: Mapping[str, Tensor], stats: Stats, text: Any) -> bytes:
    """Return the packed artifact that fills the bytes; `text` is the training shards."""
    view: Any = SimpleNamespace(
        id=known("checkpoint_id"),
        config=known("config"),
        tensors=tensors,
        module=None,
        train_seq_len=known("train_seq_len"),
        family=SimpleNamespace(
            sites=lambda module: known("sites"), lookups=lambda module: known("lookups"), role=known("roles").get
        ),
    )
    choices: list[FitSettings] = known("choices")
    builder, start, kappas = Builder(view, stats, choices[0]), None, {}
    if known("kappa") != "off":
        probe = Probe(view, probe_text(view, text, known("kappa_tokens"), known("kappa_seed")))
        kappas = measure_kappas(builder, probe, known("kappa"))
    kappa = by_tensor(builder, kappas, known("kappa"))
    if known("regularizes"):
        builder, start = least_divergent(view, stats, choices, kappa, probe, known("limit"), known("codec"))[:2]
    return Search(builder, kappa, known("codec")).solve(known("limit"), start=start).data
