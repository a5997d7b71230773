"""The whole form of an artifact of `fit`: what its program is told.

The search itself is part of the script (fitting.py). What the artifact's config.json and meta.json say of its making
decides which of its steps are.
"""

from __future__ import annotations

from typing import Any

from pgolf_post.families import ModelFamily
from pgolf_post.fit.regularize import pairs_of
from pgolf_post.fit.settings import FitSettings
from pgolf_post.quantize.gptq.trellis import DIAGONALS
from pgolf_post.submit.seeds import Seed
from pgolf_post.submit.sources import Sources, address

ROUND_ALONG_DIAGONALS = """
def gptq_jobs(jobs, advance):
    symbols = list(map_items(lambda job: torch.from_numpy(round_diagonals(job, True)), jobs))
    for job, rounded in zip(jobs, symbols):
        check_range(job.name, rounded, None)
    return symbols
"""
COMPILED_SWEEP = """
def _compiled_sweep(grid, length):
    run = compiled()
    if run is None:
        return partial(_numpy_sweep, grid)
    return lambda sheet, first, stop: run(sheet, grid.bounds, grid.came_from, first, stop)
"""
SHARE_NOTHING = """
class SharedCalls:
    def __init__(self, module, run):
        pass
    def given(self, changed):
        return nullcontext()
"""
LOAD_MODULE = """
def load_module(config, tensors, source, copy):
    return built({name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, "cpu")
"""


def choices_of(seed: Seed) -> list[FitSettings]:
    """Return the settings that the fit was tried with: one, or one for each pair of regularisation."""
    settings = FitSettings.of_identity(seed.settings["fit"])
    return pairs_of(settings) if "regularized" in seed.meta else [settings]


def asked_by_fit(seed: Seed, module: Any, family: ModelFamily) -> dict[str, Any]:
    """Return what the program of a fit asks for by name."""
    choices, sites, lookups = choices_of(seed), family.sites(module), family.lookups(module)
    settings = choices[0]
    return {
        "fits": True,
        "backward": True,
        "choices": choices,
        "regularizes": "regularized" in seed.meta,
        "kappa": settings.kappa if "kappa" in seed.meta["train_seconds"] else "off",
        "kappa_tokens": settings.kappa_tokens,
        "kappa_seed": settings.kappa_seed,
        "limit": int(seed.settings["artifact_limit"]),
        "codec": seed.settings["codec"],
        "lookups": lookups,
        "head": next(site.tensors[0] for site in sites if site.is_head),
        "token_table": lookups[0].tensor,
        "roles": {name: family.role(name) for name in module.state_dict()},
        "train_seq_len": family.train_seq_len(module),
        "checkpoint_id": seed.manifest["lineage"]["checkpoint_id"],
        "stats_id": seed.manifest["lineage"]["stats_id"],
    }


def settle_fit(sources: Sources, choices: list[FitSettings]) -> None:
    """Replace what only other settings of a fit need."""
    sources.replace(
        address("pgolf_post.families", "load_module"),
        LOAD_MODULE,
        {"built": address("pgolf_post.submit.evaluate", "built"), "torch": address("torch")},
    )
    # κ in a third more time, the same bits
    names = {"nullcontext": address("contextlib", "nullcontext")}
    sources.replace(address("pgolf_post.fit.shared_calls", "SharedCalls"), SHARE_NOTHING, names)
    settings = choices[0]
    if settings.trellis_states and settings.lane_rows == DIAGONALS:
        sources.replace(address("pgolf_post.quantize.gptq.driver", "gptq_jobs"), ROUND_ALONG_DIAGONALS)
        names = {"compiled": address("pgolf_post.submit.swept", "compiled")}
        sources.replace(address("pgolf_post.quantize.gptq.diagonals", "_compiled_sweep"), COMPILED_SWEEP, names)
