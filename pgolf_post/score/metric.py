"""The metric a checkpoint carries: measured once when it is saved, recomputed by `checkpoint verify`.

It is a plain score in float32 of the first tokens of the validation split, kept as sums with the protocol and the data
manifest's sha256, so that anyone who has the folder and the data can reproduce it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pgolf_post.base.ranks import ALONE
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.errors import NotFoundError, VerificationError
from pgolf_post.families import load_module
from pgolf_post.score.plain import PlainProtocol, score_folder
from pgolf_post.settings import parse_settings

TOLERANCE_NATS = 1e-5  # per token: float32 sums differ in the last digits between thread counts and machines


def measure_module(module: nn.Module, data: DataFolder, protocol: PlainProtocol) -> dict[str, Any]:
    """Score a module and return the metric as it is recorded."""
    score = score_folder(module, data, protocol, "scoring checkpoint")
    return {**score.sums(), **protocol.model_dump(), "data_manifest_sha256": data.manifest_sha256}


def recorded_protocol(checkpoint: Checkpoint, view: str) -> tuple[dict[str, Any], PlainProtocol]:
    """Return a view's recorded metric and its protocol. Raises NotFoundError if none was recorded."""
    metric = checkpoint.meta["views"][view].get("metric")
    if not metric:
        raise NotFoundError(f"{checkpoint.path} records no metric for its {view!r} weights")
    fields = {key: metric[key] for key in PlainProtocol.model_fields if key in metric}
    return metric, parse_settings(PlainProtocol, fields, f"{checkpoint.path}: metric")


def measure(like: Checkpoint, tensors: Mapping[str, Tensor], data: DataFolder) -> dict[str, Any]:
    """Measure other weights of the same config by the protocol that `like` recorded."""
    _, protocol = recorded_protocol(like, like.view_name(None))
    return measure_module(load_module(like.config, tensors, "blend").to(ALONE.device), data, protocol)


@dataclass(frozen=True)
class Verification:
    """A recorded metric next to the same metric recomputed."""

    view: str
    recorded_bpb: float
    recomputed_bpb: float
    difference_nats: float  # per token

    @property
    def passed(self) -> bool:
        return abs(self.difference_nats) <= TOLERANCE_NATS


def verify_metric(view: View, data: DataFolder) -> Verification:
    """Recompute a view's recorded metric: its nats and its bpb, whichever is further off, counts exactly.

    Raises VerificationError if the data is not what it was measured on, or stands for other tokens or bytes.
    """
    metric, protocol = recorded_protocol(view.checkpoint, view.name)
    if metric["data_manifest_sha256"] != data.manifest_sha256:
        raise VerificationError(
            f"{data.path} is not the data that {view.checkpoint.path} was measured on "
            f"(manifest {data.manifest_sha256[:12]}, recorded {metric['data_manifest_sha256'][:12]})",
            hint="pass the right folder with --data",
        )
    module = load_module(view.config, view.tensors, str(view)).to(ALONE.device)
    recomputed = measure_module(module, data, protocol)
    for count in ("tokens", "bytes"):
        if recomputed[count] != metric[count]:
            raise VerificationError(
                f"{view.checkpoint.path}: {view.name} records {metric[count]:,} {count}, found {recomputed[count]:,}"
            )
    by_nats = recomputed["nats"] - metric["nats"]
    by_bpb = (recomputed["bpb"] - metric["bpb"]) * math.log(2) * recomputed["bytes"]
    return Verification(
        view.name, metric["bpb"], recomputed["bpb"], max(by_nats, by_bpb, key=abs) / recomputed["tokens"]
    )
