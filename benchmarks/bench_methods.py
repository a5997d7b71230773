"""What each quantizer is worth on a trained checkpoint, as the tables of docs/results/quantize.md.

    python -m benchmarks.bench_methods CHECKPOINT [TABLE …] --data FOLDER [--max-tokens N] [--calibration-tokens N]

Tables: presets, lambda, k, embedding, lqer, awq, prune, text, same-bytes; without one, all. Each row is quantized,
packed by the real packer, decoded by the decoder that ships and scored; Δ is against the table's first row, paired,
with a 95 % t interval over pieces of at most 4 KB of the documents. Seconds are this process's CPU seconds to quantize
and pack, Hessians known. In `text` and `same-bytes` all scales of a method are multiplied by one number, found by
Newton steps with the slope dB/d log2 m = -N/8, until the artifact is within 0.03 % of sdclip-1394's.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pgolf_post.artifacts import quantize_by_plan
from pgolf_post.base.markdown import markdown_table
from pgolf_post.base.progress import say
from pgolf_post.calibrate import CalibrationSettings, calibrate
from pgolf_post.calibrate.stage import calibration_text
from pgolf_post.checkpoint import Checkpoint
from pgolf_post.data import DataFolder
from pgolf_post.families import get_family, train_seq_len
from pgolf_post.pack.artifact import unpack
from pgolf_post.pack.container import PackSettings, pack
from pgolf_post.plan import Plan, read_plan
from pgolf_post.quantize import rows
from pgolf_post.quantize.clip import grid_steps, to_stored
from pgolf_post.quantize.gptq.stats_factors import StatsFactors
from pgolf_post.quantize.tensor import QuantizedModel
from pgolf_post.rules import GridRule
from pgolf_post.score.bpb import Score
from pgolf_post.score.compare.paired import pair, t_interval
from pgolf_post.score.compare.pieces import cut_documents
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.pool import ModelPool
from pgolf_post.score.protocols import folder_text, score_text
from pgolf_post.score.session import Session

CLOSE = 0.0003  # of the target bytes
MAX_PACKS = 8
SDCLIP, RECORD = "sdclip-1394", "record-1855"


@dataclass(frozen=True)
class Trial:
    """A plan with changes, and what multiplies all its scales."""

    name: str
    plan: str = SDCLIP
    changes: tuple[str, ...] = ()
    multiplier: float = 1.0
    roles: tuple[str, ...] = ()  # whose tensors get a rule of their own, first, with `awq_alpha`
    awq_alpha: float = 0.0

    def read(self) -> Plan:
        """The plan itself."""
        plan = read_plan(self.plan, self.changes)
        if not self.roles:
            return plan
        usual = next(rule for rule in plan.rules if set(self.roles) <= set(rule.roles))
        changed = {"name": "chosen", "roles": self.roles, "awq_alpha": self.awq_alpha}
        others = [rule.model_copy(update={"optional": True}) for rule in plan.rules]
        return plan.model_copy(update={"rules": (usual.model_copy(update=changed), *others)})


@dataclass(frozen=True)
class Result:
    """What became of a trial."""

    trial: Trial
    model: QuantizedModel
    data: bytes
    score: Score
    seconds: float  # CPU, to quantize and pack


class Bench:
    """One checkpoint, one text, one model built once."""

    def __init__(self, path: Path, data: DataFolder, max_tokens: int, calibration_tokens: int) -> None:
        self.view = Checkpoint.open(path).load()
        calibration = CalibrationSettings(tokens=calibration_tokens)
        self.stats = calibrate(self.view, data, calibration)
        self.calibration_text = calibration_text(self.view, data, calibration, train_seq_len(self.view.config))
        self.factors, self.pool = StatsFactors(self.stats), ModelPool()
        self.protocol = PlainProtocol(seq_len=train_seq_len(self.view.config), max_tokens=max_tokens)
        self.text = folder_text(data, self.protocol)
        self.pieces = cut_documents(data, *self.text)
        self.float_score = self.score(self.view.tensors)
        self.num_weights = 0
        say(f"not quantized: {self.float_score.bpb:.5f} bpb of {self.float_score.tokens:,} tokens")

    def score(self, tensors: Mapping[str, Tensor]) -> Score:
        """The score of one set of weights."""
        session = Session(quiet=True)
        module = self.pool.load(self.view.config, tensors, "trial", session.ranks.device)
        family = get_family(self.view.config["family"])
        return score_text(module, family, *self.text, self.protocol, session, self.pieces)[0]

    def quantize(self, trial: Trial) -> tuple[QuantizedModel, bytes, float]:
        """(model, artifact, CPU seconds)."""
        started = time.process_time()
        with mock.patch.object(rows, "grid_steps", multiplied(trial.multiplier)):
            model, *_ = quantize_by_plan(self.view, self.stats, trial.read(), self.factors, self.calibration_text)
        data = pack(model, PackSettings())
        self.num_weights = sum(tensor.symbols.size for tensor in model.quantized.values())
        return model, data, time.process_time() - started

    def result(self, trial: Trial) -> Result:
        """Quantize, pack, decode, score."""
        return self.scored(trial, *self.quantize(trial))

    def scored(self, trial: Trial, model: QuantizedModel, data: bytes, seconds: float) -> Result:
        """The result of a trial that is packed already."""
        score = self.score({name: torch.from_numpy(array) for name, array in unpack(data).tensors.items()})
        return Result(trial, model, data, score, seconds)

    def at_bytes(self, trial: Trial, target: int) -> Result:
        """The trial with the multiplier that makes its artifact `target` bytes long, or the closest that was found."""
        tried: list[tuple[int, Trial, tuple[QuantizedModel, bytes, float]]] = []
        exponent = 0.0
        for _ in range(MAX_PACKS):
            candidate = replace(trial, multiplier=2**exponent)
            made = self.quantize(candidate)
            excess = len(made[1]) - target
            tried.append((abs(excess), candidate, made))
            if abs(excess) <= CLOSE * target:
                break
            exponent += excess / (self.num_weights / 8)
        _, best, made = min(tried, key=lambda item: item[0])
        return self.scored(best, *made)


def multiplied(multiplier: float) -> Callable[..., Tensor]:
    """`grid_steps` with every step multiplied, rounded to fp16 again."""

    def steps(name: str, weight: Tensor, rule: GridRule, *more: Any) -> Tensor:
        plain = grid_steps(name, weight, rule, *more)
        return plain if multiplier == 1 else to_stored(name, plain.double() * multiplier, "unit")

    return steps


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout as the documentation has it."""
    print(*markdown_table(header, rows), "", sep="\n", flush=True)


def table(bench: Bench, title: str, trials: Sequence[Trial], target: int | None = None) -> None:
    """Run trials and print a row each; the first is what the others are compared with."""
    print(f"{title}\n", flush=True)
    rows: list[list[str]] = []
    control: Result | None = None
    for trial in trials:
        found = bench.result(trial) if target is None else bench.at_bytes(trial, target)
        control = control or found
        rows.append(row(bench, found, control, target is not None))
        say(" | ".join(rows[-1]))
    markdown(("", *(["× scales"] if target else []), "bpb", "gap", "Δ", "bytes", "Δ bytes", "CPU s", ""), rows)


def row(bench: Bench, found: Result, control: Result, with_multiplier: bool) -> list[str]:
    """One line of a table."""
    difference = t_interval(pair(found.score, control.score, by="piece"))
    half = (difference.high - difference.low) / 2
    compared = "" if found is control else f"{difference.bpb:+.5f} ± {half:.5f}"
    bytes_more = "" if found is control else f"{len(found.data) - len(control.data):+,}"
    multiplier = [f"{found.trial.multiplier:.4f}"] if with_multiplier else []
    numbers = [f"{found.score.bpb:.5f}", f"{found.score.bpb - bench.float_score.bpb:+.5f}", compared]
    counted = [f"{len(found.data):,}", bytes_more, f"{found.seconds:.1f}"]
    no_op = found is not control and same_model(found, control)
    return [found.trial.name, *multiplier, *numbers, *counted, "NO-OP" if no_op else ""]


def same_model(found: Result, control: Result) -> bool:
    """Whether a trial's symbols and decoded tensors are its control's."""
    first, second = (unpack(result.data).tensors for result in (found, control))
    return found.model.symbols_sha256() == control.model.symbols_sha256() and all(
        (first[name] == second[name]).all() for name in first
    )


def presets(bench: Bench) -> None:
    names = (RECORD, SDCLIP, "rtn", "baseline-int8")
    table(bench, "At their presets", [Trial(name, name) for name in names])


def same_bytes(bench: Bench) -> None:
    trials = [
        Trial("GPTQ, SDClip (the preset itself)"),
        Trial("GPTQ, natural order", changes=("*.act_order=false",)),
        Trial("GPTQ, unbounded symbols", changes=("matrices.bits=0",)),
        Trial("GPTQ, int5 for matrices", changes=("matrices.bits=5",)),
        Trial("GPTQ, absmax", changes=("*.scale=absmax",)),
        Trial("GPTQ, percentile by error", changes=("*.scale=percentile",)),
        Trial("GPTQ, percentile by Hessian", changes=("*.scale=percentile-hessian",)),
        Trial("GPTQ, λ = 0.1", changes=("*.hessian_lambda=0.1",)),
        Trial("GPTQ, λ = 0.4", changes=("*.hessian_lambda=0.4",)),
        Trial("GPTQ, AWQ α = 0.5", changes=("*.awq_alpha=0.5",)),
        Trial("GPTQ, groups of 64", changes=("matrices.per=group", "matrices.group_size=64")),
        Trial("GPTQ, one scale a tensor", changes=("matrices.per=tensor",)),
        Trial("GPTQ, looped blocks finer: k × 0.9", changes=("matrices.depth_clip={loop = 0.9}",)),
        Trial("GPTQ, Wanda 2 %", changes=("matrices.prune=wanda", "matrices.prune_share=0.02")),
        Trial("GPTQ, LQER rank 4 of 3 tensors", changes=("lqer={rank = 4, top_k = 3}",)),
        Trial("record-1855", RECORD),
        Trial("RTN, SDClip (rtn preset)", "rtn"),
        Trial("RTN, absmax (baseline-int8's rule)", "baseline-int8"),
    ]
    target = len(bench.quantize(trials[0])[1])
    table(bench, f"At {target:,} bytes", trials, target)


def sweep_lambda(bench: Bench) -> None:
    values = (0, 0.05, 0.1, 0.2, 0.4, 0.6)
    table(bench, "λ", [Trial(f"{x:g}", changes=(f"*.hessian_lambda={x}",)) for x in values])


def sweep_k(bench: Bench) -> None:
    """k of all matrices, and what dB/dk = -N/(8·k·ln 2) says of each half step."""
    steps = [12.85 + 0.5 * step for step in (0, -2, -1, 1, 2)]
    table(bench, "k", [Trial(f"{k:g}", changes=(f"matrices.clip={k}",)) for k in steps])
    model = bench.quantize(Trial("12.85"))[0]
    count = sum(tensor.symbols.size for tensor in model.quantized.values() if tensor.facts["rule"] == "matrices")
    first = steps[0]
    rows = [(f"{k:g}", f"{-count / (8 * math.log(2)) * math.log(k / first):+,.0f}") for k in sorted(steps)]
    markdown(("k", f"predicted Δ bytes, N = {count:,}"), rows)


def embedding(bench: Bench) -> None:
    """Bits of the embedding at the record's k = 14: fewer bits, wider steps."""
    steps = [Trial(f"{bits} bits, k = 14", RECORD, (f"embedding.bits={bits}",)) for bits in (7, 8, 6, 5)]
    table(bench, "Embedding", steps)


def lqer(bench: Bench) -> None:
    changes = {
        "off": ("lqer.top_k=0",),
        "rank 4 on 3 tensors (the preset)": (),
        "rank 4 on 1": ("lqer.top_k=1",),
        "rank 4 on 6": ("lqer.top_k=6",),
        "rank 8 on 3": ("lqer.rank=8",),
        "symmetric, 4 bits, rank 4 on 3": ("lqer.asymmetric=false",),
    }
    table(bench, "LQER", [Trial(name, RECORD, change) for name, change in changes.items()])


def awq(bench: Bench) -> None:
    """α per role; q, k and v read one input. mlp_proj is undone in mlp_fc, elsewhere 1/s is stored."""
    trials = [Trial("off", RECORD)]
    for roles in (("q", "k", "v"), ("attn_proj",), ("mlp_fc",), ("mlp_proj",), ("embedding",)):
        for alpha in (0.25, 0.5, 0.75):
            trials.append(Trial(f"{' '.join(roles)}, α = {alpha}", RECORD, roles=roles, awq_alpha=alpha))
    table(bench, "AWQ", trials)


def prune(bench: Bench) -> None:
    trials = [Trial("none")]
    for method, shares in (("magnitude", (0.01, 0.02, 0.05)), ("wanda", (0.01, 0.02, 0.05)), ("ones", (0.02, 0.1))):
        for share in shares:
            changes = (f"matrices.prune={method}", f"matrices.prune_share={share}")
            trials.append(Trial(f"{method}, {share:.0%}", changes=changes))
    table(bench, "Pruning", trials)


def with_text(bench: Bench) -> None:
    """What reads the calibration text again: sequential GPTQ, distillation of the floats that are kept, and both."""
    trials = [
        Trial("GPTQ, SDClip (sdclip-1394)"),
        Trial("sequential", changes=("sequential=true",)),
        Trial("distilled", changes=("distill={}",)),
        Trial("sequential, then distilled", changes=("sequential=true", "distill={}")),
    ]
    target = len(bench.quantize(trials[0])[1])
    table(bench, f"With the calibration text, at {target:,} bytes", trials, target)


TABLES: dict[str, Callable[[Bench], None]] = {
    "presets": presets, "lambda": sweep_lambda, "k": sweep_k, "embedding": embedding, "lqer": lqer, "awq": awq,
    "prune": prune, "text": with_text, "same-bytes": same_bytes,
}  # fmt: skip


def main(arguments: Sequence[str] = ()) -> None:
    if not arguments:
        say("bench_methods needs a trained checkpoint: bench_methods CHECKPOINT [TABLE …] --data FOLDER")
        return
    parser = argparse.ArgumentParser(prog="bench_methods", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tables", nargs="*", help=", ".join(TABLES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=32769)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    given = parser.parse_args(list(arguments))
    if unknown := set(given.tables) - set(TABLES):
        parser.error(f"unknown tables: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    bench = Bench(given.checkpoint, DataFolder.open(given.data), given.max_tokens, given.calibration_tokens)
    for name in given.tables or TABLES:
        TABLES[name](bench)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
