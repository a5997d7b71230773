"""Attribution: what each group of tensors loses by being quantized, and what it saves in bytes.

A view is quantized once. Then one group at a time (a role, a block, a tensor) is left in float while everything else
stays as decoded, and the validation text is scored again: the bpb gained, with its interval paired by document, is what
quantizing that group costs, measured, or as the unquantized model expects it (score/expected.py: far less noise). Its
bytes are the artifact's less those of the artifact packed without the group, so that shared streams and tables are
charged to whom they are due. Gains of groups need not add up to that of all: errors meet.

A group whose decoded tensors are what they would be in float is marked NO-OP: leaving it in float changes nothing.
Rows are kept one by one; an interrupted attribution goes on after the last.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pgolf_post.artifacts import plan_identity, quantize_by_plan
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.calibrate import Stats
from pgolf_post.calibrate.text import CalibrationSet
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.derived import derived_id, intact_meta, store
from pgolf_post.errors import PgolfError
from pgolf_post.families import ModelFamily, get_family, load_module
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import Plan
from pgolf_post.quantize.tensor import LOW_RANK, QuantizedModel
from pgolf_post.score.bpb import Score
from pgolf_post.score.cached import require_tokenizer
from pgolf_post.score.compare.compare import paired_documents
from pgolf_post.score.compare.expected import expected_score
from pgolf_post.score.compare.paired import t_interval
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import folder_text, protocol_spans, score_text
from pgolf_post.score.session import Session
from pgolf_post.score.spans import num_targets
from pgolf_post.settings import parse_settings

STAGE, STAGE_VERSION, PAYLOAD = "attribution", 1, "rows.json"
CONTROL, ROWS, SCORING = "control.safetensors", "rows.json", "scoring.safetensors"  # of an unfinished attribution
ALL = "all"
UNIT_BYTES = 100_000  # gains are also given per so many bytes

By = Literal["role", "layer", "tensor"]
Row = dict[str, Any]


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

    `expected`: scores are the unquantized model's loss plus a model's divergence from it, instead of measured ones.

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
    model, floats, _ = quantize_by_plan(view, stats, plan, None, text)
    work = _Work(model, floats, data, protocol, packing, partial, view if expected else None)
    control, rows = work.run(groups(model, view.family, by))

    def make(building: Path) -> Mapping[str, Any]:
        write_json(building / PAYLOAD, {"control": control, "rows": rows})
        return {}

    config = {"stage": STAGE, "version": STAGE_VERSION, "view": view.name, "view_id": view.id, "stats_id": stats.id}
    store(folder, PAYLOAD, {**config, **identity}, make)
    shutil.rmtree(partial, ignore_errors=True)
    return _open(folder, cached=False)


def _open(folder: Path, cached: bool) -> Attribution:
    found = read_json(folder / PAYLOAD)
    return Attribution(folder, found["control"], found["rows"], cached)


def groups(model: QuantizedModel, family: ModelFamily, by: By) -> dict[str, list[str]]:
    """Group → the names of its quantized tensors, low-rank corrections beside what they correct; `all` last.

    Raises PgolfError if nothing is quantized.
    """
    found: dict[str, list[str]] = {}
    for name in model.quantized:
        found.setdefault(_group(corrected(name), family, by), []).append(name)
    if not found:
        raise PgolfError("the plan quantizes no tensor: there is nothing to attribute")
    return {**found, ALL: list(model.quantized)}


def _group(name: str, family: ModelFamily, by: By) -> str:
    if by == "tensor":
        return name
    if by == "role":
        return family.role(name)
    layer = family.layer(name)
    return "outside the blocks" if layer is None else f"block {layer}"


def corrected(name: str) -> str:
    """The matrix that a quantized tensor belongs to: itself, or what its low-rank factor corrects."""
    for suffix in LOW_RANK:
        name = name.removesuffix(suffix)
    return name


class _Work:
    """One model built once, scored with one group after another in float."""

    def __init__(
        self,
        model: QuantizedModel,
        floats: Mapping[str, Tensor],
        data: DataFolder,
        protocol: PlainProtocol,
        packing: PackSettings,
        partial: Path,
        reference: View | None = None,  # whose expectations are wanted
    ) -> None:
        self.model, self.floats, self.packing, self.partial = model, floats, packing, partial
        self.decoded = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
        self.family, self.protocol = get_family(model.config["family"]), protocol
        self.text, self.pool = folder_text(data, protocol), ModelPool()
        self.symbols = model.symbols_sha256()
        self.reference = load_module(reference.config, reference.tensors, str(reference)) if reference else None

    def run(self, named: Mapping[str, list[str]]) -> tuple[dict[str, Any], list[Row]]:
        """The control's sums, and a row per group."""
        rows = self._kept_rows()
        if rows:
            say(f"going on from {self.partial}: {len(rows)} of {len(named)} groups done")
        with progress_bar("attributing", len(named) + 1) as advance:
            control = self._control()
            packed = len(pack(self.model, self.packing))
            advance(1 + len(rows))
            for name, members in named.items():
                if name not in rows:
                    rows[name] = self._row(name, members, control, packed)
                    self._keep_rows(rows)
                    advance(note=name)
        sums = {**control.sums(), "artifact_bytes": packed, "symbols_sha256": self.symbols}
        return sums, [rows[name] for name in named]

    def _row(self, name: str, members: list[str], control: Score, packed: int) -> Row:
        """A group's row: scored with its tensors in float, packed without them."""
        matrices = list(dict.fromkeys(corrected(member) for member in members))
        exchanged = {matrix: self.floats[matrix].float() for matrix in matrices}
        no_op = all(torch.equal(tensor, self.decoded[matrix]) for matrix, tensor in exchanged.items())
        score = control if no_op else self._score(name, {**self.decoded, **exchanged})
        facts = t_interval(paired_documents(score, control)).facts()
        rest = {key: tensor for key, tensor in self.model.quantized.items() if key not in members}
        count = packed - len(pack(replace(self.model, quantized=rest), self.packing))
        gain = -facts["difference_bpb"] + 0.0
        return {
            "group": name,
            "tensors": len(matrices),
            "weights": sum(self.model.quantized[matrix].symbols.size for matrix in matrices),
            "group_bytes": count,
            "bpb": score.bpb,
            "gain_bpb": gain,
            "low_bpb": _minus(facts["high_bpb"]),
            "high_bpb": _minus(facts["low_bpb"]),
            "clusters": facts["clusters"],
            "gain_per_100kb": gain / count * UNIT_BYTES if count else None,
            "no_op": no_op,
        }

    def _score(self, name: str, tensors: Mapping[str, Tensor]) -> Score:
        session = Session(quiet=True, partial=self.partial / SCORING, identity=f"{self.symbols} {name}")
        module = self.pool.load(self.model.config, tensors, name, session.ranks.device)
        if self.reference is not None:
            tokens, token_bytes = self.text
            spans = protocol_spans(self.protocol, num_targets(len(tokens), self.protocol.seq_len, self.protocol.tail))
            before = self.reference.to(session.ranks.device)
            return expected_score(before, module, tokens, token_bytes, spans, np.arange(len(spans)))
        return score_text(module, self.family, *self.text, self.protocol, session)[0]

    def _control(self) -> Score:
        """The score of the quantized model as it is, kept between runs."""
        path = self.partial / CONTROL
        if self._is_kept() and path.is_file():
            return Score.load(path)
        score = self._score("quantized", self.decoded)
        with atomic_file(path) as building:
            score.save(building)
        self._keep_rows({})
        return score

    def _is_kept(self) -> bool:
        """Whether what is kept is of this very model."""
        path = self.partial / ROWS
        return path.is_file() and read_json(path)["symbols_sha256"] == self.symbols

    def _kept_rows(self) -> dict[str, Row]:
        return dict(read_json(self.partial / ROWS)["rows"]) if self._is_kept() else {}

    def _keep_rows(self, rows: Mapping[str, Row]) -> None:
        with atomic_file(self.partial / ROWS) as building:
            write_json(building, {"symbols_sha256": self.symbols, "rows": dict(rows)})


def _minus(value: float | None) -> float | None:
    return None if value is None else -value + 0.0
