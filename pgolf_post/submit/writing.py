"""submission.json and README.md of a record folder, from what is recorded of its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pgolf_post.base.markdown import markdown_table
from pgolf_post.errors import PgolfError
from pgolf_post.ledger import phases as clock
from pgolf_post.pack.report.size import SizeReport
from pgolf_post.score.audit.findings import Finding
from pgolf_post.score.compare.record import record_rule
from pgolf_post.submit.chain import chain
from pgolf_post.submit.explain import PartBytes
from pgolf_post.submit.prove import Proof
from pgolf_post.submit.refusals import Refusal
from pgolf_post.submit.seeds import Seed

TRACK = "track_10min_16mb"


@dataclass(frozen=True)
class SeedReport:
    """One seed of a submission, with what was measured for it."""

    seed: Seed
    size: SizeReport
    score: Mapping[str, Any]  # of the submission's protocol: bpb, nats, tokens, bytes, seconds by phase
    proof: Proof
    findings: Sequence[Finding] | None

    def facts(self) -> dict[str, Any]:
        """Return the seed's entry of submission.json."""
        seed, nats = self.seed, float(self.score["nats"])
        training, phases = seed.training_seconds(), chain(seed, self.score)
        return {
            "seed": seed.seed,
            "val_loss": nats / int(self.score["tokens"]),
            "val_bpb": float(self.score["bpb"]),
            "val_nats": nats,
            "val_tokens": int(self.score["tokens"]),
            "val_bytes": int(self.score["bytes"]),
            "stages_bpb": seed.stages(),
            "artifact_bytes": seed.num_bytes,
            "artifact_sha256": seed.sha256,
            "bytes_total": self.size.strict_total_bytes,
            "bytes_total_convention": self.size.convention_total_bytes,
            "training_data_seconds_by_step": training,
            "seconds": {**clock.sums(phases), "phases": [phase.facts() for phase in phases]},
            "checkpoint_id": seed.view_id,
            "audit": None if self.findings is None else [finding.facts() for finding in self.findings],
            "proof": self.proof.facts(),
        }


@dataclass(frozen=True)
class Writing:
    """Everything that both files are made of."""

    name: str
    author: str
    github_id: str
    blurb: str
    protocol: Mapping[str, Any]
    reports: Sequence[SeedReport]
    code_bytes: int
    parts: Sequence[PartBytes]
    against: Sequence[float]  # bpb of the seeds of the record to beat; empty: none
    remarks: Sequence[Refusal]  # that a draft has

    def submission(self) -> dict[str, Any]:
        """Return submission.json: the fields of merged folders first, then what a reviewer asks for."""
        entries = [report.facts() for report in self.reports]
        bpb, loss = [e["val_bpb"] for e in entries], [e["val_loss"] for e in entries]
        first = self.reports[0].seed
        source = (first.run or first.checkpoint).meta
        return {
            "author": self.author,
            "github_id": self.github_id,
            "name": self.name,
            "blurb": self.blurb,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "track": TRACK,
            "val_loss": float(np.mean(loss)),
            "val_bpb": float(np.mean(bpb)),
            "val_bpb_std": sample_deviation(bpb),
            "seeds": [entry["seed"] for entry in entries],
            "seed_results": {str(e["seed"] if e["seed"] is not None else i): e for i, e in enumerate(entries)},
            "bytes_total": max(entry["bytes_total"] for entry in entries),
            "bytes_total_convention": max(entry["bytes_total_convention"] for entry in entries),
            "bytes_code": self.code_bytes,
            "bytes_model": max(entry["artifact_bytes"] for entry in entries),
            "protocol": dict(self.protocol),
            "hardware": source.get("device"),
            "versions": source.get("versions"),
            "commit": (source.get("git") or {}).get("commit"),
            "data_manifest_sha256": first.checkpoint.config["data"]["manifest_sha256"],
            "comparison": self.comparison(bpb),
            "draft": bool(self.remarks),
            "remarks": [str(remark) for remark in self.remarks],
        }

    def comparison(self, bpb: Sequence[float]) -> dict[str, Any] | None:
        """Return Welch's test against the record's seeds, by the challenge's rule; None without a record to beat."""
        if not self.against:
            return None
        score = self.reports[0].score
        try:
            verdict = record_rule(np.array(bpb), np.array(self.against), score["bytes"] / score["tokens"])
        except PgolfError as error:
            return {"against_bpb": list(self.against), "not_tested": str(error)}
        return {"against_bpb": list(self.against), **verdict.facts()}

    def readme(self) -> str:
        """Return README.md."""
        facts = self.submission()
        spread = "" if facts["val_bpb_std"] is None else f" ± {facts['val_bpb_std']:.5f} (sample standard deviation)"
        lines = [f"# {self.name}", "", self.blurb, ""] if self.blurb else [f"# {self.name}", ""]
        lines += [f"**{facts['val_bpb']:.6f} bits per byte**{spread}, {len(self.reports)} seed(s), {self._by()}.", ""]
        if self.remarks:
            lines += ["A draft:", "", *(f"* {remark}" for remark in self.remarks), ""]
        sections = [
            self._results(),
            self._bytes(facts),
            self._seconds(),
            self._rules(),
            self._versus(facts),
            self._made(facts),
        ]
        return "\n".join([*lines, *(line for section in sections for line in section)]).rstrip() + "\n"

    def _by(self) -> str:
        kind = self.protocol["protocol"]
        return f"test-time training ({self.protocol['method']})" if kind == "ttt" else f"{kind} windows"

    def _results(self) -> list[str]:
        stages = list(dict.fromkeys(stage for report in self.reports for stage in report.seed.stages()))
        header = ["seed", *stages, "submitted bpb", "nats per token"]
        rows = []
        for report in self.reports:
            own = report.seed.stages()
            shown = [f"{own[stage]:.6f}" if stage in own else "" for stage in stages]
            loss = report.score["nats"] / report.score["tokens"]
            rows.append([report.seed.label, *shown, f"{report.score['bpb']:.8f}", f"{loss:.8f}"])
        return ["## Results", "", *markdown_table(header, rows), ""]

    def _bytes(self, facts: Mapping[str, Any]) -> list[str]:
        header = ["seed", "artifact", "code", "total (files)", "total (convention)", "budget"]
        rows = [
            [
                report.seed.label,
                f"{report.seed.num_bytes:,}",
                f"{self.code_bytes:,}",
                f"{report.size.strict_total_bytes:,}",
                f"{report.size.convention_total_bytes:,}",
                f"{report.size.budget_bytes:,}",
            ]
            for report in self.reports
        ]
        parts = [[part.name, f"{part.source_bytes:,}", f"{part.packed_bytes:,}"] for part in self.parts]
        code = markdown_table(["part of train_gpt.py", "source bytes", "bytes when packed"], parts)
        readable = "`train_gpt_readable.py` is the same program before it was minified; it is not needed to run."
        return ["## Bytes", "", *markdown_table(header, rows), "", *code, "", readable, ""]

    def _seconds(self) -> list[str]:
        lines = []
        for report in self.reports:
            rows = clock.phase_rows(chain(report.seed, report.score))
            lines += [f"Seed {report.seed.label}:", "", *markdown_table(clock.HEADER, rows), ""]
            if report.seed.training_seconds() is None:
                lines += ["The seconds of its training run are not known.", ""]
        note = "Strictly every phase counts towards its limit; by convention those that are marked."
        return ["## Seconds", "", *lines, note, ""]

    def _rules(self) -> list[str]:
        rows = [
            [
                report.seed.label,
                finding.test,
                {True: "passed", False: "FAILED", None: "does not apply"}[finding.passed],
            ]
            for report in self.reports
            for finding in report.findings or ()
        ]
        proofs = [
            f"* seed {report.seed.label}: run alone (no package of ours, network: {report.proof.network}, "
            f"{report.proof.threads} threads), `train_gpt.py` printed {report.proof.sums['nats']!r} nats over "
            f"{report.proof.sums['tokens']:,} tokens, to the last bit what the toolkit's scorer gives."
            for report in self.reports
        ]
        return ["## Rules", "", *(markdown_table(["seed", "test", "verdict"], rows) if rows else []), "", *proofs, ""]

    def _versus(self, facts: Mapping[str, Any]) -> list[str]:
        tested = facts["comparison"]
        if not tested:
            return []
        if "not_tested" in tested:
            return ["## Against the record", "", f"Not tested: {tested['not_tested']}.", ""]
        text = (
            f"Difference {tested['difference_bpb']:+.6f} bpb ({tested['difference_nats']:+.6f} nats per token), Welch "
            f"t = {tested['t']:.2f}, {tested['degrees']:.2f} degrees of freedom, one-sided p = {tested['p']:.4g}; "
            f"by at least 0.005 nats per token: p = {tested['p_margin']:.4g}."
        )
        return ["## Against the record", "", text, ""]

    def _made(self, facts: Mapping[str, Any]) -> list[str]:
        rows = [
            [key, str(facts[key])] for key in ("hardware", "versions", "commit", "data_manifest_sha256") if facts[key]
        ]
        run = "python train_gpt.py DATA    # DATA holds fineweb_val_*.bin and the tokenizer's .model"
        return ["## Made with", "", *markdown_table(["what", "value"], rows), "", "```", run, "```", ""]


def sample_deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
