"""Attribution of the loss from quantization, and of the bytes it saves, to groups of tensors.

A view is quantized once. Then one group at a time (a role, a block, a tensor) is left in float while everything else
stays as decoded, and the validation text is scored again: the bpb gained, with its interval paired by document, is what
quantizing that group costs, measured, or averaged over the unquantized model's predictions (score/compare/expected.py:
far less noise). Its bytes are the artifact's less those of the artifact packed without the group. Gains of groups need
not add up to that of all, because errors interact.

A group whose decoded tensors are what they would be in float is marked NO-OP: leaving it in float changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.artifacts import plan_identity, quantize_by_plan
from pgolf_post.attribute.groups import By, groups
from pgolf_post.attribute.measure import GroupMeasurer, Row
from pgolf_post.base.storage import read_json, write_json
from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, intact_meta, require_writable_result, store
from pgolf_post.families import get_family
from pgolf_post.pack.container import PackSettings
from pgolf_post.plan import Plan
from pgolf_post.score.cached import require_tokenizer
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.settings import parse_settings

STAGE, STAGE_VERSION, PAYLOAD = "attribution", 1, "rows.json"


@dataclass(frozen=True)
class Attribution:
    """A finished attribution on disk."""

    folder: Path
    control: Mapping[str, Any]  # {bpb, nats, tokens, bytes} of the quantized model, and its symbols_sha256
    rows: Sequence[Row]  # one per group, `all` last
    cached: bool


def attribute(
    view: View,
    stats: Stats,
    plan: Plan,
    data: DataFolder,
    protocol: PlainProtocol,
    by: By = "role",
    codec: str = "rans",
    fresh: bool = False,
    text: CalibrationSet | None = None,
    expected: bool = False,
) -> Attribution:
    """Attribute a plan's loss to groups of tensors; cached by all that decides it. `text` as for `requant`.

    With `expected`, scores are the unquantized model's loss plus a model's divergence from it, instead of measured.

    Raises SettingsError for an unknown codec, MismatchError for data of another tokenizer, PgolfError if the plan
    quantizes nothing.
    """
    packing = parse_settings(PackSettings, {"codec": codec}, "attribute")
    require_tokenizer(view.config, data, str(view))
    identity: dict[str, Any] = {
        "by": by,
        "codec": codec,
        "plan": plan_identity(plan, text),
        "protocol": protocol.model_dump(mode="json"),
    }
    identity["data_manifest_sha256"] = data.manifest_sha256
    if expected:
        identity["expected"] = True
    folder = view.checkpoint.derived(STAGE, derived_id(STAGE, STAGE_VERSION, [view.id, stats.id], identity))
    partial = folder.with_name(f"{folder.name}.partial")
    if fresh:
        shutil.rmtree(partial, ignore_errors=True)
    elif intact_meta(folder, PAYLOAD) is not None:
        return _open(folder, cached=True)
    require_writable_result(folder)
    model, floats, _ = quantize_by_plan(view, stats, plan, None, text)
    measurer = GroupMeasurer(model, floats, data, protocol, packing, partial, view if expected else None)
    control, rows = measurer.run(groups(model, get_family(view.config["family"]), by))

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / PAYLOAD, {"control": control, "rows": rows})
        return {}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, "stats_id": stats.id}
    store(folder, PAYLOAD, {**config, **identity}, make)
    shutil.rmtree(partial, ignore_errors=True)
    return _open(folder, cached=False)


def _open(folder: Path, cached: bool) -> Attribution:
    payload = read_json(folder / PAYLOAD)
    return Attribution(folder, payload["control"], payload["rows"], cached)
