"""The whole pipeline on this machine, from text to tables: the quickest way to see what every stage does.

Text is the running Python's own standard library, the model has about a million parameters, and every stage is the
real one: what takes a minute of training here takes ten minutes on 8 H100s, and nothing else changes. Training has a
fixed number of steps, so that a busy machine takes longer and ends in the same numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pgolf_post.artifacts import PackedArtifact, quantize_by_plan, requant
from pgolf_post.average.linear import swa_blend
from pgolf_post.base.progress import hushed, say
from pgolf_post.base.ranks import ALONE
from pgolf_post.calibrate import CalibrationSettings, Stats, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.demo.equal_bytes import plan_within
from pgolf_post.demo.expected_gap import expected_gaps
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.families import load_module
from pgolf_post.fit.artifact import fit
from pgolf_post.fit.settings import FitSettings
from pgolf_post.pack.container import pack
from pgolf_post.plan import Plan, read_plan
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.score.byte_ngram import byte_ngram_bpb
from pgolf_post.score.compare.comparison import compare
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import folder_text, protocol_spans
from pgolf_post.score.spans import num_targets
from pgolf_post.score.stage import StoredScore, open_weights, score

LAMBDAS = (0.0, 0.1, 0.4)
BLEND_EMA_SHARE = 0.75
VAL_FRACTION = 0.04
RECORD = "record-1855"
WEAKER = (("round to nearest", "rtn"), ("GPTQ with SDClip", DEFAULT_PRESET))
CALIBRATION = CalibrationSettings(tokens=32768, fisher=True)  # fit reads the backward half
FIT = FitSettings(kappa_tokens=4096)

T = TypeVar("T")


@dataclass
class Demo:
    """One run of the demo and its results."""

    root: Path  # the folder that holds data/ and checkpoints/
    train_overrides: tuple[str, ...] = ()
    calibration: CalibrationSettings = CALIBRATION
    fit_settings: FitSettings = FIT
    score_tokens: int | None = None  # validation tokens per score; None = all
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Run one stage; its seconds are added to the stage's total."""
        started = time.perf_counter()
        result = work()
        self.stage_seconds[stage] = self.stage_seconds.get(stage, 0.0) + time.perf_counter() - started
        return result

    def run(self) -> dict[str, Any]:
        """Run every stage in pipeline order. Returns the JSON answer."""
        data = self.timed("data", self.build_data)
        final = self.timed("train", lambda: self.train(data))
        ngram_bpb = self.timed("byte model", lambda: byte_ngram_bpb(data, max_tokens=self.score_tokens))
        view = final.load(None)
        protocol = PlainProtocol(seq_len=view.train_seq_len, max_tokens=self.score_tokens)
        before = self.timed("score", lambda: score(view, data, protocol))
        stats = self.timed("statistics", lambda: calibrate(view, data, self.calibration))
        table = Table(self, view, stats, data, before, protocol)
        limit = self.at_one_byte_count(table)
        num_rows = len(table.rows)
        self.as_published(table, final)
        self.timed("score", table.expect)
        return {
            "checkpoint": str(final.path),
            "checkpoint_id": view.id,
            "pre_quant_bpb": before.bpb,
            "tokens": before.tokens,
            "byte_ngram_bpb": ngram_bpb,
            "equal_bytes": limit,
            "blend_ema_share": BLEND_EMA_SHARE,
            "rows": table.rows[:num_rows],
            "more_rows": table.rows[num_rows:],
            "stage_seconds": {stage: round(seconds, 2) for stage, seconds in self.stage_seconds.items()},
        }

    def build_data(self) -> DataFolder:
        """Build the standard library as a data folder; the same Python version finds it built already."""
        out = self.root / "data" / "stdlib_sp1024"
        if (out / "manifest.json").is_file():
            data = DataFolder.open(out)
            source = data.manifest["source"]
            if stdlib_source().items() <= source.items() and source["settings"]["val_fraction"] == VAL_FRACTION:
                say(f"{out}: already built from this Python")
                return data
        settings = BuildSettings(name="stdlib_sp1024", vocab_size=1024, val_fraction=VAL_FRACTION)
        return build(stdlib_documents(), out, settings, source=stdlib_source(), force=True)

    def train(self, data: DataFolder) -> Checkpoint:
        """Train the tiny recipe in a process of its own, under a run name that is not taken yet."""
        root = self.root / "checkpoints"
        number = next(n for n in range(1, 10_000) if not (root / f"demo_{n:03d}").exists())
        overrides = [f"run.name=demo_{number:03d}", f"run.checkpoint_root={root}", f"data.dir={data.path}"]
        recipe = Path(str(files("trainer"))) / "recipes" / "tiny_cpu.toml"
        command = [sys.executable, "-m", "trainer", str(recipe), "--json"]
        for override in (*overrides, *self.train_overrides):
            command += ["--set", override]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # it reports on our stderr
        if done.returncode:
            kind = SettingsError if done.returncode == SettingsError.exit_code else PgolfError
            raise kind(f"training failed (exit {done.returncode}); its message stands above")
        return Checkpoint.open(Path(json.loads(done.stdout.splitlines()[-1])["checkpoint"]))

    def at_one_byte_count(self, table: Table) -> int:
        """Add four quantizers to the table, each within the bytes of the record recipe as published; return these."""
        view, stats = table.view, table.stats
        recipe = partial(requant, view, stats, read_plan(RECORD))
        record = table.add("record recipe", f"requant --plan {RECORD}", "quantize", recipe)
        limit = record.num_bytes
        for place, (name, preset) in enumerate(WEAKER):  # shown above the record recipe
            plan, options = self.timed("equal bytes", partial(self.within, record, preset, table))
            clipped = partial(requant, view, stats, plan)
            table.add(name, f"requant {options}", "quantize", clipped, place)
        settled = partial(fit, view, table.data, limit, calibration=self.calibration, settings=self.fit_settings)
        table.add("fit", f"fit --budget {limit}", "fit", settled)
        return limit

    def within(self, record: PackedArtifact, preset: str, table: Table) -> tuple[Plan, str]:
        """Return a preset with its clips multiplied such that it takes the record's bytes, and its options."""
        view, factors = table.view, StatsFactors(table.stats)
        matrices = {tensor["name"] for tensor in record.meta["tensors"]} & view.tensors.keys()
        num_weights = sum(view.tensors[name].numel() for name in matrices)

        def num_bytes(plan: Plan) -> int:
            with hushed():
                return len(pack(quantize_by_plan(view, table.stats, plan, factors)[0]))

        return plan_within(preset, record.num_bytes, num_weights, num_bytes)

    def as_published(self, table: Table, final: Checkpoint) -> None:
        """Add the default plan with three λ to the table, and an average of the warm-down's checkpoints."""
        for value in LAMBDAS:
            table.add(f"λ = {value:g}", f"requant --lambda {value:g}", "quantize", partial(table.requantize, value))
        blended, _ = self.timed("blend", lambda: swa_blend(final, BLEND_EMA_SHARE, table.data))
        view = blended.load("raw")
        without_fisher = self.calibration.model_copy(update={"fisher": False})
        stats = self.timed("statistics", lambda: calibrate(view, table.data, without_fisher))
        blend = replace(table, view=view, stats=stats)  # the same rows, but of another unquantized model
        blend.add("SWA blend, λ = 0", f"requant {blended.path} --lambda 0", "quantize", partial(blend.requantize, 0.0))


@dataclass
class Table:
    """Artifacts with their bytes, scores and seconds, each beside one unquantized model."""

    demo: Demo
    view: View  # the checkpoint that is quantized
    stats: Stats
    data: DataFolder
    before: StoredScore  # of the unquantized model
    protocol: PlainProtocol
    rows: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, PackedArtifact] = field(default_factory=dict)  # by the row's command

    def requantize(self, hessian_lambda: float) -> PackedArtifact:
        """Return the artifact of the default plan with a λ."""
        plan = read_plan(DEFAULT_PRESET, [f"*.hessian_lambda={hessian_lambda}"])
        return requant(self.view, self.stats, plan)

    def add(
        self,
        name: str,
        command: str,
        stage: str,
        make: Callable[[], PackedArtifact],
        place: int | None = None,  # index of the new row; None: the last
    ) -> PackedArtifact:
        """Make an artifact, score what it decodes to, add its row and return it."""
        started = time.perf_counter()
        artifact = self.demo.timed(stage, make)
        seconds = time.perf_counter() - started
        scored = self.demo.timed("score", lambda: score(artifact, self.data, self.protocol))
        gap = compare(scored, self.before).by_t.facts()
        if any(row["symbols_sha256"] == artifact.symbols_sha256 for row in self.rows):
            name += " (NO-OP: same symbols as a row above)"
        row = {
            "name": name,
            "command": f"pgolf-post {command}",
            "artifact": str(artifact.path),
            "symbols_sha256": artifact.symbols_sha256,
            "artifact_bytes": artifact.num_bytes,
            "bpb": scored.bpb,
            "measured_gap_bpb": gap["difference_bpb"],
            **{f"measured_gap_{bound}": gap[bound] for bound in ("low_bpb", "high_bpb")},
            "checkpoint_id": self.view.id,
            "seconds": round(seconds, 3),
        }
        self.rows.insert(len(self.rows) if place is None else place, row)
        self.artifacts[row["command"]] = artifact
        return artifact

    def expect(self) -> None:
        """Add to each row of this checkpoint's artifacts the gap that the checkpoint expects of it."""
        own = [row for row in self.rows if row["checkpoint_id"] == self.view.id]
        tokens, token_bytes = folder_text(self.data, self.protocol)
        targets = num_targets(len(tokens), self.protocol.seq_len, self.protocol.tail)
        models = [_module(self.artifacts[row["command"]]) for row in own]
        spans = protocol_spans(self.protocol, targets)
        for row, gap in zip(own, expected_gaps(_module(self.view), models, tokens, token_bytes, spans), strict=True):
            row |= {"gap_bpb": gap.bpb, "gap_half_bpb": gap.half}


def _module(scored: View | PackedArtifact) -> Any:  # a LanguageModel
    name, config, tensors = open_weights(scored)
    return load_module(config, tensors, name).to(ALONE.device)
