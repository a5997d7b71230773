"""The whole pipeline on this machine, from text to a table: the quickest way to see what every stage does.

Text is the running Python's own standard library, the model has about a million parameters, and every stage is the
real one: what takes 90 seconds of training here takes ten minutes on 8 H100s, and nothing else changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pgolf_post.artifacts import requant
from pgolf_post.average.linear import swa_blend
from pgolf_post.base.progress import print_table, say
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.checkpoint import Checkpoint, View
from pgolf_post.data import DataFolder
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.errors import PgolfError, SettingsError
from pgolf_post.pack.report.size import count
from pgolf_post.plan import read_plan
from pgolf_post.presets import DEFAULT_PRESET
from pgolf_post.score.byte_ngram import byte_ngram_bpb
from pgolf_post.score.cached import score_artifact, score_view
from pgolf_post.score.plain import PlainProtocol

LAMBDAS = (0.0, 0.1, 0.4)
BLEND_EMA_SHARE = 0.75
VAL_FRACTION = 0.08
DEMO_BUDGET_BYTES = 400_000  # about what 16,000,000 is to a 36M-parameter model
CALIBRATION = CalibrationSettings(tokens=65536)

T = TypeVar("T")


@dataclass
class Demo:
    """One run of the demo and its results."""

    root: Path  # the folder that holds data/ and checkpoints/
    train_overrides: tuple[str, ...] = ()
    calibration: CalibrationSettings = CALIBRATION
    score_tokens: int | None = None  # validation tokens per score; None = all
    rows: list[dict[str, Any]] = field(default_factory=list)
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
        before, _ = self.timed("score", lambda: score_view(view, data, protocol))
        for hessian_lambda in LAMBDAS:
            self.requantize(f"λ = {hessian_lambda:g}", view, data, protocol, hessian_lambda)
        blended, _ = self.timed("blend", lambda: swa_blend(final, BLEND_EMA_SHARE, data))
        name = f"SWA blend, {BLEND_EMA_SHARE:.0%} EMA, λ = 0"
        self.requantize(name, blended.load("raw"), data, protocol, 0.0)
        return {
            "checkpoint": str(final.path),
            "checkpoint_id": view.id,
            "pre_quant_bpb": before["bpb"],
            "byte_ngram_bpb": ngram_bpb,
            "rows": self.rows,
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

    def requantize(
        self, name: str, view: View, data: DataFolder, protocol: PlainProtocol, hessian_lambda: float
    ) -> None:
        """Make one row of the table: calibrate (cached after the first), quantize, pack, decode, count, score."""
        stats = self.timed("calibrate", lambda: calibrate(view, data, self.calibration))
        plan = read_plan(DEFAULT_PRESET, [f"*.hessian_lambda={hessian_lambda}"])
        artifact = self.timed("quantize + pack", lambda: requant(view, stats, plan))
        score, _ = self.timed("score", lambda: score_artifact(artifact.path, data, protocol, decoded=artifact.verified))
        report = count(artifact.path, (), DEMO_BUDGET_BYTES)
        facts = {"bpb": score["bpb"], **report.facts()}
        if any(row["symbols_sha256"] == artifact.symbols_sha256 for row in self.rows):
            name += " (NO-OP: same symbols as a row above)"
        self.rows.append(
            {"name": name, **facts, "artifact": str(artifact.path), "symbols_sha256": artifact.symbols_sha256}
        )


def show(answer: dict[str, Any], seconds: float) -> None:
    """Print the closing table."""
    before = answer["pre_quant_bpb"]
    rows = [("before quantization", f"{before:.5f}", "", "", "")]
    for row in answer["rows"]:
        gap = f"{row['bpb'] - before:+.5f}"
        rows.append((row["name"], f"{row['bpb']:.5f}", gap, f"{row['artifact_bytes']:,}", f"{row['headroom_bytes']:,}"))
    headroom = f"headroom to {DEMO_BUDGET_BYTES:,}"
    print_table("pgolf-post demo", ("", "bpb", "against before", "artifact bytes", headroom), rows)
    say(f"order-3 byte model fitted on the same training text: {answer['byte_ngram_bpb']:.5f} bpb")
    say("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in answer["stage_seconds"].items()))
    say(f"total {seconds:.1f} s")
    say("next: pgolf-post requant --lambda 0.1 --eval   |   pgolf-post show   |   pgolf-post checkpoint verify")
