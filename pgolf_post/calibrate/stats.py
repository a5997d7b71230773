"""The statistics of one view of one checkpoint as later stages read them: lazily, fresh, in float64 on the CPU.

Sums are un-normalised, as they were collected; `mean_…` divides by the number of tokens. In a layer that is visited P
times both the Hessian Σxxᵀ and the row sums Σδ² run over its visits, so their product counts P² pairs of visits: divide
it by P (`visits`), or take `fisher.weighted`, which pairs each visit's δ with its own x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf_post.calibrate.packed import LazyTensors, named, pack_upper, unpack_upper
from pgolf_post.calibrate.sums import FISHER_KINDS, MATRICES, Sums, kind_of
from pgolf_post.checkpoint import write_tensors
from pgolf_post.errors import MismatchError

PAYLOAD, FISHER_PAYLOAD = "stats.safetensors", "fisher.safetensors"

Tensors = Mapping[str, Tensor]
NONE: Tensors = {}


@dataclass(frozen=True)
class Fisher:
    """The backward half; backward.py defines each sum. All are keyed by tensor."""

    rows: Tensors  # tensor → (out,) Σδ²; of the head, Σ p(1 - p)·cap'(z)²
    weighted: Tensors  # tensor → (in, in) Σ s·xxᵀ
    outputs: Tensors  # tensor → (out, out) Σδδᵀ; not of the head
    lookup_counts: Tensors  # table → (rows,) how often each row was looked up
    lookup_rows: Tensors  # table → (rows,) Σ over the row's lookups of the mean over columns of g²
    lookup_hessians: Tensors  # table → (width, width) Σggᵀ over all lookups
    num_tokens: int
    head: str  # the head's matrix
    token_table: str  # the token embedding's table; the same tensor where embeddings are tied

    def mean_rows(self, tensor: str) -> Tensor:  # (out,) float64, fresh
        """Return Σδ² / num_tokens, each row's Fisher information. Raises MismatchError if the tensor is missing."""
        return named(self.rows, tensor, "row statistics") / self.num_tokens

    def mean_weighted(self, tensor: str) -> Tensor:  # (in, in) float64, fresh
        """Return Σ s·xxᵀ / num_tokens. Raises MismatchError if the statistics lack the tensor."""
        return named(self.weighted, tensor, "weighted Hessian") / self.num_tokens

    def mean_outputs(self, tensor: str) -> Tensor:  # (out, out) float64, fresh
        """Return Σδδᵀ / num_tokens. Raises MismatchError if the statistics lack the tensor, or it is the head."""
        return named(self.outputs, tensor, "output Hessian") / self.num_tokens


@dataclass(frozen=True)
class Stats:
    """Calibration statistics of one view of one checkpoint. Sums made by hand need the first four fields only."""

    id: str
    hessians: Tensors  # site → (in, in) Σxxᵀ
    num_tokens: int
    cached: bool
    abs_sums: Tensors = field(default_factory=dict)  # site → (in,) Σ|x|
    abs_maxima: Tensors = field(default_factory=dict)  # site → (in,) max|x|
    pass_traces: Tensors = field(default_factory=dict)  # site → (passes,) Σ|x|² of each visit
    fisher: Fisher | None = None
    view_id: str | None = None  # the weights they were collected on
    stale: Mapping[str, Any] | None = None  # if used for other weights: whose statistics, and the result of the probe
    seconds: float = 0.0  # duration of collecting them

    def mean_hessian(self, site: str) -> Tensor:  # (in, in) float64, a fresh tensor
        """Return Σxxᵀ / num_tokens. Raises MismatchError if the site was not calibrated."""
        return named(self.hessians, site, "Hessian") / self.num_tokens

    def mean_abs(self, site: str) -> Tensor:  # (in,) float64, a fresh tensor
        """Return Σ|x| / num_tokens. Raises MismatchError if the site was not calibrated."""
        return named(self.abs_sums, site, "magnitudes") / self.num_tokens

    def visits(self, site: str) -> int:
        """Return the visits of one forward pass to the site. Raises MismatchError if the site was not calibrated."""
        return len(named(self.pass_traces, site, "traces"))

    def lineage(self) -> dict[str, Any]:
        """Return what a result made from these statistics records of them."""
        stale = {} if self.stale is None else {"stale_view_id": str(self.stale["view_id"])[:12]}
        return {"stats_id": self.id[:12], **stale}

    def require_view(self, view_id: str) -> None:
        """Raise MismatchError if these are statistics of other weights and not marked stale (`--allow-stale`)."""
        if self.view_id not in (None, view_id) and self.stale is None:
            raise MismatchError(
                f"statistics {self.id[:12]} are of weights {str(self.view_id)[:12]}, not of these, {view_id[:12]}",
                hint=f"calibrate these weights, or reuse them knowingly: --allow-stale {self.id[:12]}",
            )


def write_stats(folder: Path, sums: Sums) -> None:
    """Write collected sums: matrices as packed float32 triangles, the rest float64; the backward half apart."""
    files: dict[str, dict[str, Tensor]] = {PAYLOAD: {}, FISHER_PAYLOAD: {}}
    for key in sums:
        kind = kind_of(key)
        if kind == "tokens":
            continue
        packed = pack_upper(sums[key]) if kind in MATRICES else sums[key]
        files[FISHER_PAYLOAD if kind in FISHER_KINDS else PAYLOAD][key] = packed
    for name, tensors in files.items():
        if tensors:
            write_tensors(folder / name, tensors)


def open_stats(folder: Path, stats_id: str, meta: Mapping[str, Any], cached: bool) -> Stats:
    """Return the statistics in a verified folder; matrices are read on access."""

    def lazy(kind: str) -> LazyTensors:
        name = FISHER_PAYLOAD if kind in FISHER_KINDS else PAYLOAD
        return LazyTensors(folder / name, kind, unpack_upper if kind in MATRICES else Tensor.double)

    num_tokens = int(meta["num_tokens"])
    fisher = None
    if meta.get("fisher"):
        fisher = Fisher(
            rows=lazy("rows"),
            weighted=lazy("weighted"),
            outputs=lazy("outputs"),
            lookup_counts=lazy("counts"),
            lookup_rows=lazy("lookup_rows"),
            lookup_hessians=lazy("lookup"),
            num_tokens=num_tokens,
            head=str(meta["fisher"]["head"]),
            token_table=str(meta["fisher"]["token_table"]),
        )
    return Stats(
        id=stats_id,
        hessians=lazy("hessian"),
        num_tokens=num_tokens,
        cached=cached,
        abs_sums=lazy("abs"),
        abs_maxima=lazy("max"),
        pass_traces=lazy("trace"),
        fisher=fisher,
        view_id=str(meta["view_id"]),
        seconds=float(meta["seconds"]),
    )
