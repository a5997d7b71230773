"""One quantized model, scored and packed with one group of tensors after another left in float.

Rows are kept one by one; an interrupted attribution goes on after the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_post.attribute.groups import corrected
from pgolf_post.base.progress import progress_bar, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.base.storage import atomic_file, read_json, write_json
from pgolf_post.checkpoint import View
from pgolf_post.data import DataFolder
from pgolf_post.families import get_family, load_module
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.documents import paired_documents
from pgolf_post.score.compare.expected import expected_score
from pgolf_post.score.compare.paired import t_interval
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import folder_text, protocol_spans, score_text
from pgolf_post.score.session import Session
from pgolf_post.score.spans import num_targets

CONTROL, ROWS, SCORING = "control.safetensors", "rows.json", "scoring.safetensors"  # of an unfinished attribution
UNIT_BYTES = 100_000  # gains are also given per this many bytes

Row = dict[str, Any]


class GroupMeasurer:
    """A quantized model that is built once, and the float tensors that replace its groups."""

    def __init__(
        self,
        model: QuantizedModel,
        floats: Mapping[str, Tensor],
        data: DataFolder,
        protocol: PlainProtocol,
        packing: PackSettings,
        partial: Path,  # folder that keeps what is done
        reference: View | None = None,  # whose expectations are wanted, instead of measured losses
    ) -> None:
        self.model, self.floats, self.packing, self.partial = model, floats, packing, partial
        self.decoded = {name: torch.from_numpy(array) for name, array in model.tensors().items()}
        self.family, self.protocol = get_family(model.config["family"]), protocol
        self.text, self.pool = folder_text(data, protocol), ModelPool()
        self.symbols = model.symbols_sha256()
        self.reference: torch.nn.Module | None = None
        if reference is not None:
            whole = load_module(reference.config, reference.tensors, str(reference))
            self.reference = whole.to(ALONE.device)

    def run(self, named: Mapping[str, list[str]]) -> tuple[dict[str, Any], list[Row]]:
        """Return the quantized model's sums, and a row per group."""
        rows = self._kept_rows()
        if rows:
            say(f"going on from {self.partial}: {len(rows)} of {len(named)} groups done")
        with progress_bar("attributing", len(named) + 1, "scores") as advance:
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
        """Return a group's row: scored with its tensors in float, packed without them."""
        # the loss: the group's matrices are exchanged; if that changes none of them, neither does it the score
        matrices = list(dict.fromkeys(corrected(member) for member in members))
        exchanged = {matrix: self.floats[matrix].float() for matrix in matrices}
        no_op = all(torch.equal(tensor, self.decoded[matrix]) for matrix, tensor in exchanged.items())
        score = control if no_op else self._score(name, {**self.decoded, **exchanged})
        facts = t_interval(paired_documents(score, control)).facts()

        # the bytes: packed again without the group, so that shared streams are charged to whom they are due
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
            reference = self.reference.to(session.ranks.device)
            return expected_score(reference, module, tokens, token_bytes, spans, np.arange(len(spans)))
        return score_text(module, self.family, *self.text, self.protocol, session)[0]

    def _control(self) -> Score:
        """Return the score of the quantized model as it is, kept between runs."""
        path = self.partial / CONTROL
        if self._is_kept() and path.is_file():
            return Score.load(path)
        score = self._score("quantized", self.decoded)
        with atomic_file(path) as building:
            score.save(building)
        self._keep_rows({})
        return score

    def _is_kept(self) -> bool:
        """Return whether what is kept is of this very model."""
        path = self.partial / ROWS
        return path.is_file() and read_json(path)["symbols_sha256"] == self.symbols

    def _kept_rows(self) -> dict[str, Row]:
        return dict(read_json(self.partial / ROWS)["rows"]) if self._is_kept() else {}

    def _keep_rows(self, rows: Mapping[str, Row]) -> None:
        with atomic_file(self.partial / ROWS) as building:
            write_json(building, {"symbols_sha256": self.symbols, "rows": dict(rows)})


def _minus(value: float | None) -> float | None:
    return None if value is None else -value + 0.0
