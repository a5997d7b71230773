"""Anyone's record folder, read as a reviewer reads it: bytes, seconds, bpb, seeds, and what does not fit together.

Counted are the real files and the convention's count; logs are parsed; loss and bpb imply a number of bytes of text,
which must be the validation text's. A folder with an artifact of ours is run alone and must print what it claims.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.errors import NotFoundError, PgolfError, VerificationError
from pgolf_post.pack.artifact import is_artifact
from pgolf_post.pack.payload import layers, read_script
from pgolf_post.pack.report.size import BUDGET_BYTES, count
from pgolf_post.pack.script import pack_source
from pgolf_post.score.compare.record import RECORD_SEEDS
from pgolf_post.submit.logs import RunLog, read_run_log
from pgolf_post.submit.prove import SCRIPT, prove
from pgolf_post.submit.refusals import EVALUATION_SECONDS, TRAINING_SECONDS

LOG_SUFFIXES = (".log", ".txt", ".jsonl", ".out")
ARTIFACT_SUFFIXES = (".pgolf", ".ptz", ".pt", ".pth", ".xz", ".br", ".lzma", ".zst", ".safetensors")
PUBLISHED_TOKENS = {"SP1024": 62_021_632, "SP4096": 45_508_608, "SP8192": 40_540_160, "CaseOps": 47_851_520}
TEXT_BYTES = (151.0e6, 151.15e6)  # of the published validation text, with room for rounded losses
WRONG_BYTES = {176.33e6: "the space before a word is counted twice", 164.59e6: "case sentinels are counted as text"}
WRONG_ROOM = 0.06e6
SAME_BPB = 6e-5  # half a unit of the fourth decimal, and rounding of a mean
NETWORK = ("requests", "urllib.request", "http.client", "huggingface_hub", "socket", "aiohttp", "wandb")
FIELDS = ("name", "val_bpb", "bytes_total")


@dataclass(frozen=True)
class Objection:
    """One thing that a reviewer would object to."""

    name: str
    evidence: str


@dataclass
class Review:
    """Contents of a folder, and the objections to it."""

    folder: Path
    strict_bytes: int | None = None
    convention_bytes: int | None = None
    code_bytes: int | None = None
    artifact_bytes: int | None = None
    submission: Mapping[str, Any] = field(default_factory=dict)
    logs: list[RunLog] = field(default_factory=list)
    objections: list[Objection] = field(default_factory=list)
    ran: str = "not run: the folder holds no artifact of ours"

    def object(self, name: str, evidence: str) -> None:
        """Add an objection."""
        self.objections.append(Objection(name, evidence))

    def facts(self) -> dict[str, Any]:
        """Return the review as JSON."""
        logs = [{"file": log.path.name, "seed": log.seed, "train_seconds": log.train_seconds} for log in self.logs]
        for entry, log in zip(logs, self.logs, strict=True):
            final = log.final
            entry |= {"val_loss": final.loss, "val_bpb": final.bpb} if final else {}
        return {
            "folder": str(self.folder),
            "strict_total_bytes": self.strict_bytes,
            "convention_total_bytes": self.convention_bytes,
            "code_bytes": self.code_bytes,
            "artifact_bytes": self.artifact_bytes,
            "logs": logs,
            "ran": self.ran,
            "objections": [{"name": each.name, "evidence": each.evidence} for each in self.objections],
        }


def check_folder(folder: Path, data: Path | None = None, budget: int = BUDGET_BYTES) -> Review:
    """Review a record folder. Raises NotFoundError if there is none."""
    if not folder.is_dir():
        raise NotFoundError(f"no folder {folder}")
    review = Review(folder)
    _read_submission(review)
    logs = [read_run_log(path) for path in sorted(folder.iterdir()) if path.suffix in LOG_SUFFIXES and path.is_file()]
    review.logs = [log for log in logs if not log.is_empty]
    _check_bytes(review, budget)
    _check_script(review)
    _check_logs(review)
    _check_numbers(review)
    _run(review, data)
    return review


def _read_submission(review: Review) -> None:
    path = review.folder / "submission.json"
    try:
        read = json.loads(path.read_text("utf-8"))
        review.submission = read if isinstance(read, dict) else {}
    except (OSError, ValueError) as error:
        review.object("no-submission-json", f"{path.name} cannot be read: {error}")
        return
    missing = [name for name in FIELDS if name not in review.submission]
    if missing:
        review.object("fields-missing", f"submission.json has no {', '.join(missing)}")
    if not (review.folder / "README.md").is_file():
        review.object("no-readme", "there is no README.md")


# ---- bytes ---------------------------------------------------------------------------------------------------------


def find_artifact_file(folder: Path) -> Path | None:
    """Return the folder's artifact: the largest file with an artifact's suffix; None without one."""
    files = [path for path in folder.iterdir() if path.suffix in ARTIFACT_SUFFIXES and path.is_file()]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def _check_bytes(review: Review, budget: int) -> None:
    script = review.folder / SCRIPT
    if not script.is_file():
        review.object("no-script", f"there is no {SCRIPT}")
        return
    artifact = find_artifact_file(review.folder)
    if artifact is not None:
        try:
            report = count(artifact, [script], budget)
        except PgolfError as error:
            review.object("not-countable", str(error))
            return
        review.artifact_bytes, review.code_bytes = report.artifact_bytes, report.code_bytes
        review.strict_bytes, review.convention_bytes = report.strict_total_bytes, report.convention_total_bytes
    else:
        _count_by_log(review, script)
    _judge_bytes(review, budget)


def _count_by_log(review: Review, script: Path) -> None:
    """Take the model's bytes from what logs or submission.json state, and the code's from the file."""
    stated = [log.total_bytes - log.code_bytes for log in review.logs if log.total_bytes and log.code_bytes is not None]
    model = review.submission.get("bytes_model") or review.submission.get("artifact_bytes")
    sizes = [*stated, *([int(model)] if isinstance(model, int) else [])]
    review.code_bytes = script.stat().st_size
    if not sizes:
        review.object("bytes-unknown", "there is no artifact, and no log states the model's bytes")
        return
    review.artifact_bytes = max(sizes)
    review.strict_bytes = review.artifact_bytes + review.code_bytes
    packed = len(pack_source(read_script(script)).data)
    review.convention_bytes = review.artifact_bytes + min(packed, review.code_bytes)


def _judge_bytes(review: Review, budget: int) -> None:
    if review.strict_bytes is None or review.convention_bytes is None:
        return
    if review.convention_bytes > budget:
        over = review.convention_bytes - budget
        review.object(
            "over-budget", f"{review.convention_bytes:,} bytes with the code wrapped: {over:,} over {budget:,}"
        )
    elif review.strict_bytes > budget:
        over, wrapped = review.strict_bytes - budget, review.convention_bytes
        what = (
            f"{review.strict_bytes:,} bytes of real files: {over:,} over {budget:,}; {wrapped:,} with the code wrapped"
        )
        review.object("over-on-disk", what)
    for log in review.logs:
        if log.code_bytes == 0:
            review.object("code-counted-as-nothing", f"{log.path.name} counts 0 bytes of code")
    stated = review.submission.get("bytes_total")
    if isinstance(stated, int) and stated not in (review.strict_bytes, review.convention_bytes):
        logged = {log.total_bytes for log in review.logs}
        if stated not in logged:
            review.object("bytes-differ", f"bytes_total {stated:,}; counted {review.strict_bytes:,}")


# ---- the script ----------------------------------------------------------------------------------------------------


def _check_script(review: Review) -> None:
    script = review.folder / SCRIPT
    if not script.is_file():
        return
    try:
        read = layers(read_script(script), SCRIPT)
    except PgolfError as error:
        review.object("script-unreadable", str(error))
        return
    for layer in read:
        for reason in layer.opaque:
            review.object("script-unreadable", reason)
        used = sorted({name for name in _imports(layer.tree) for each in NETWORK if f"{name}.".startswith(f"{each}.")})
        if used:
            review.object("network", f"the script imports {', '.join(used)}")


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# ---- logs ----------------------------------------------------------------------------------------------------------


def _check_logs(review: Review) -> None:
    finals = [log for log in review.logs if log.final]
    if not finals:
        review.object("no-logs", "no log reports a loss and a bpb")
        return
    seeds = {log.seed for log in finals if log.seed is not None}
    number = len(seeds) or len(finals)
    if number < RECORD_SEEDS:
        review.object("few-seeds", f"logs of {number} seed(s), the challenge asks for {RECORD_SEEDS}")
    for log in review.logs:
        _check_seconds(review, log)
        _check_text(review, log)


def _check_seconds(review: Review, log: RunLog) -> None:
    if log.train_seconds is not None:
        room = log.step_seconds or 1.0  # the step under way when the cap is reached
        if log.train_seconds > TRAINING_SECONDS + room:
            review.object(
                "over-time", f"{log.path.name}: training took {log.train_seconds:.1f} s of {TRAINING_SECONDS:.0f}"
            )
        elif log.train_seconds + log.hessian_seconds > TRAINING_SECONDS + room:
            what = f"Hessians for {log.hessian_seconds:.1f} s after {log.train_seconds:.1f} s of training"
            review.object("training-data-after-cap", f"{log.path.name}: {what}")
    seconds = log.final.seconds if log.final else None
    if seconds is not None and seconds > EVALUATION_SECONDS:
        review.object("over-time", f"{log.path.name}: evaluation took {seconds:.1f} s of {EVALUATION_SECONDS:.0f}")


def _check_text(review: Review, log: RunLog) -> None:
    """Object to bytes of text that loss and bpb imply and that are not the validation text's."""
    final = log.final
    if final is None:
        return
    tokens = final.tokens or log.tokens
    known = [tokens] if tokens else list(PUBLISHED_TOKENS.values())
    if tokens is not None and tokens not in PUBLISHED_TOKENS.values():
        return  # another text: nothing is known of its bytes
    implied = [final.bytes_per_token * each for each in known]
    if any(TEXT_BYTES[0] <= each <= TEXT_BYTES[1] for each in implied):
        return
    nearest = min(implied, key=lambda each: abs(each - TEXT_BYTES[0]))
    why = [reason for wrong, reason in WRONG_BYTES.items() for each in implied if abs(each - wrong) <= WRONG_ROOM]
    what = f"loss {final.loss:.6f} and bpb {final.bpb:.6f} imply {nearest / 1e6:.2f} M bytes of text, not 151.08 M"
    review.object("wrong-bytes", f"{log.path.name}: {what}" + (f": {why[0]}" if why else ""))


def _check_numbers(review: Review) -> None:
    """Object to a bpb that is not the mean of the logs'."""
    stated = review.submission.get("val_bpb", review.submission.get("mean_val_bpb"))
    finals = [log.final.bpb for log in review.logs if log.final]
    if not isinstance(stated, (int, float)) or not finals:
        return
    mean = math.fsum(finals) / len(finals)
    if abs(stated - mean) > SAME_BPB and not any(abs(stated - each) <= SAME_BPB for each in finals):
        review.object("bpb-differs", f"submission.json states {stated:.6f}, the logs' mean is {mean:.6f}")


# ---- running -------------------------------------------------------------------------------------------------------


def _run(review: Review, data: Path | None) -> None:
    """Run a script of ours on its artifact, and compare the sums with those that the folder claims for it."""
    artifact, script = find_artifact_file(review.folder), review.folder / SCRIPT
    results: Any = review.submission.get("seed_results")
    entries = list(results.values()) if isinstance(results, Mapping) else []
    if artifact is None or not is_artifact(artifact) or not script.is_file() or not entries:
        return
    if data is None:
        review.ran = "not run: --data names the validation text"
        return
    claimed = entries[0].get("proof") if isinstance(entries[0], Mapping) else None
    if not isinstance(claimed, Mapping) or any(key not in claimed for key in ("nats", "tokens", "bytes", "bpb")):
        review.ran = "not run: submission.json claims no sums of its artifact"
        return
    limit = claimed["tokens"] + 1 if claimed["tokens"] != entries[0].get("val_tokens") else None
    try:
        prove(script.read_bytes(), artifact, data, claimed, limit)
        review.ran = f"run alone: the same nats over {claimed['tokens']:,} tokens"
    except VerificationError as error:
        review.ran = "run alone: not reproduced"
        review.object("not-reproduced", str(error))


def objection_rows(objections: Sequence[Objection]) -> list[tuple[str, str]]:
    """Return objections as rows of a table."""
    return [(each.name, each.evidence) for each in objections]
