"""Calibration: one pass over training text → the Hessian Σxxᵀ of every site, cached by content.

A site's Hessian is the sum over calibration tokens (and, for a looped layer, over all its passes) of the outer product
of the input that its matrices multiply; q, k and v share one. Sums are un-normalised and come with a token count, so
that H(A) + H(B) = H(A ∪ B). Products are float32, chunk sums float64; on disk, packed upper triangles in float32.

The calibration set is an explicit list of (shard, offset, length) drawn from the *training* split by seed and hashed by
content. Validation text is never read here: the challenge forbids calibrating on what will be scored.
Source of the use of Σxxᵀ: GPTQ (Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pgolf_post.checkpoint import View, read_tensors, write_tensors
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, load_or_make
from pgolf_post.errors import MismatchError, NumericsError
from pgolf_post.families import ModelFamily, Site, get_family, load_module
from pgolf_post.progress import progress_bar
from pgolf_post.settings import Settings

STAGE, STAGE_VERSION, PAYLOAD = "stats", 1, "stats.safetensors"
BATCH_TOKENS = 8192


class CalibrationSettings(Settings):
    """How much text, and which."""

    tokens: int = Field(65536, ge=2, description="training tokens to run through the model")
    seed: int = Field(0, ge=0, description="draws the windows")
    seq_len: int | None = Field(None, ge=1, description="window length; default the model's training length")


@dataclass(frozen=True)
class CalibrationSet:
    """The text itself: where each window lies, and its tokens."""

    spans: tuple[tuple[str, int, int], ...]  # (shard file name, offset, length)
    tokens: np.ndarray  # (windows, seq_len) int64

    @property
    def sha256(self) -> str:
        """Content hash: the tokens themselves, not where they were found."""
        shape = f"{self.tokens.shape}\0".encode()
        return hashlib.sha256(shape + self.tokens.astype("<u2").tobytes()).hexdigest()


@dataclass(frozen=True)
class Stats:
    """Calibration statistics of one view of one checkpoint."""

    id: str
    hessians: Mapping[str, Tensor]  # site → (in, in) float64, Σxxᵀ
    num_tokens: int
    cached: bool

    def mean_hessian(self, site: str) -> Tensor:  # (in, in) float64, a fresh tensor
        """Σxxᵀ / num_tokens. Raises MismatchError if the site was not calibrated."""
        if site not in self.hessians:
            raise MismatchError(f"no statistics for site {site!r}; calibrated: {', '.join(sorted(self.hessians))}")
        return self.hessians[site] / self.num_tokens


def draw_calibration_set(data: DataFolder, settings: CalibrationSettings, seq_len: int) -> CalibrationSet:
    """Draw distinct windows of the training split. Raises MismatchError if it holds too few."""
    places = [
        (path, shard, offset)
        for path, shard in data.shards("train")
        for offset in range(0, len(shard) - seq_len + 1, seq_len)
    ]
    wanted = max(1, settings.tokens // seq_len)
    if wanted > len(places):
        raise MismatchError(
            f"{data.path}: {settings.tokens} calibration tokens need {wanted} windows of {seq_len}, "
            f"the training split has {len(places)}",
            hint=f"--calibration-tokens {len(places) * seq_len}",
        )
    generator = np.random.Generator(np.random.Philox(key=(settings.seed, 0)))
    chosen = [places[i] for i in sorted(generator.choice(len(places), size=wanted, replace=False))]
    rows = [shard[offset : offset + seq_len] for _, shard, offset in chosen]
    spans = tuple((path.name, offset, seq_len) for path, _, offset in chosen)
    return CalibrationSet(spans, np.stack(rows).astype(np.int64))


@contextmanager
def observed_inputs(module: nn.Module, sites: list[Site], sums: dict[str, Tensor]) -> Iterator[None]:
    """While active, every forward pass adds each site's Σxxᵀ to `sums` (float64)."""

    def hook_for(site: Site) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()  # (tokens, in)
            product = (x.mT @ x).double().cpu()
            sums[site.name] = sums[site.name] + product if site.name in sums else product

        return hook

    handles = [module.get_submodule(site.module).register_forward_pre_hook(hook_for(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_hessians(
    module: Any,  # a LanguageModel
    sites: list[Site],
    tokens: np.ndarray,  # (windows, seq_len) int64
) -> dict[str, Tensor]:  # site → (in, in) float64
    """Σxxᵀ of every site over the given windows. Raises NumericsError naming a site whose sum is not finite."""
    device = next(module.parameters()).device
    windows_per_batch = max(1, BATCH_TOKENS // tokens.shape[1])
    sums: dict[str, Tensor] = {}
    with progress_bar("calibrating", len(tokens)) as advance, observed_inputs(module, sites, sums):
        for start in range(0, len(tokens), windows_per_batch):
            batch = torch.from_numpy(tokens[start : start + windows_per_batch]).to(device)
            module.hidden(batch)
            advance(len(batch))
    for site in sites:
        check_hessian(site.name, sums[site.name])
    return sums


def check_hessian(site: str, hessian: Tensor) -> None:
    """Raise NumericsError naming the site if its Hessian holds NaN or infinity."""
    if not torch.isfinite(hessian).all():
        bad = int((~torch.isfinite(hessian)).sum())
        raise NumericsError(
            f"Hessian of site {site!r} has {bad} of {hessian.numel()} values that are NaN or infinite",
            hint="calibrate again with --fresh; if it persists the weights overflow: pgolf-post eval CKPT",
        )


def pack_upper(matrix: Tensor) -> Tensor:  # (n, n) → (n(n+1)/2,) float32
    """The upper triangle of a symmetric matrix, row by row."""
    rows, cols = torch.triu_indices(*matrix.shape)
    return matrix[rows, cols].float()


def unpack_upper(packed: Tensor) -> Tensor:  # (n(n+1)/2,) → (n, n) float64
    """The inverse of `pack_upper`."""
    n = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    matrix = torch.zeros(n, n, dtype=torch.float64)
    rows, cols = torch.triu_indices(n, n)
    matrix[rows, cols] = packed.double()
    matrix[cols, rows] = packed.double()
    return matrix


def calibrate(view: View, data: DataFolder, settings: CalibrationSettings, fresh: bool = False) -> Stats:
    """The view's statistics: from the cache if this exact calibration was done before, else collected and stored."""
    module = load_module(view.config, view.tensors, str(view))
    family: ModelFamily = get_family(view.config["family"])
    seq_len = settings.seq_len or family.train_seq_len(module)
    calibration = draw_calibration_set(data, settings, seq_len)
    identity = {"calibration_sha256": calibration.sha256, **settings.model_dump(mode="json"), "seq_len": seq_len}
    stats_id = derived_id(STAGE, STAGE_VERSION, [view.id], identity)
    folder = view.checkpoint.derived(STAGE, stats_id)

    def make(building: Path) -> Mapping[str, Any]:
        sums = collect_hessians(module, family.sites(module), calibration.tokens)
        write_tensors(building / PAYLOAD, {f"hessian.{site}": pack_upper(h) for site, h in sums.items()})
        return {"num_tokens": int(calibration.tokens.size), "sites": sorted(sums)}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, **identity}
    config["data_manifest_sha256"] = data.manifest_sha256
    config["spans"] = [list(span) for span in calibration.spans]
    meta, cached = load_or_make(folder, PAYLOAD, config, make, fresh)
    packed = read_tensors(folder / PAYLOAD)
    hessians = {name.removeprefix("hessian."): unpack_upper(tensor) for name, tensor in packed.items()}
    for site, hessian in hessians.items():
        check_hessian(site, hessian)
    return Stats(stats_id, hessians, int(meta["num_tokens"]), cached)
