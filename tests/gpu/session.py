"""The first hours on a rented GPU, as one command: `python -m tests.gpu.session --part N --out FOLDER`.

Four parts of at most ten minutes each, so that a short session is of use: 1 the environment and the kernels, 2 the
trainer, 3 the trainer's variants one by one, 4 the chain after training. Every step is a process of its own with a
limit of its own, and with the part's: what a part has no time for is left to the next call. As soon as a step ends, one
JSON line goes to FOLDER/session.jsonl {part, name, rc, seconds, peak_mib, last_lines, …} and its whole output to
FOLDER/NAME.log. A step that ended well is not run again by the same command, and a step that failed does not keep the
others from running. Nothing is read from the network.

Without a GPU every step runs dry: small, on the CPU, so that it is known to start and to end. `docs/results/gpu.md`
says how to read what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RECORDS = "session.jsonl"
PART_SECONDS = 600
LEAST_SECONDS = 20  # that a step is started with
LAST_LINES = 12


@dataclass(frozen=True)
class Step:
    """One process of the session."""

    part: int
    name: str
    arguments: tuple[str, ...]  # of the Python interpreter
    seconds: int  # limit


def steps(out: Path, dry: bool) -> list[Step]:
    """Return every step in order, the most telling ones of a part first."""

    def step(part: int, name: str, seconds: int, what: str, *rest: object) -> Step:
        own = ["-m", "tests.gpu.steps", what, "--out", out, "--peak", peak_file(out, name), *(["--dry"] if dry else [])]
        return Step(part, name, tuple(map(str, [*own, *rest])), seconds)

    root = out / "small" / "checkpoints"

    def pgolf(name: str, seconds: int, command: str, *rest: object) -> Step:
        return step(4, name, seconds, "command", "--", "pgolf_post", command, root / "latest", *rest)

    few, budget, tuned = (512, 300_000, 1024) if dry else (262_144, 4_000_000, 1_310_720)
    short, learned = (400, 200) if dry else (1_000_000, 200_000)
    statistics, ttt = ("--calibration-tokens", few), ("--max-tokens", learned, "--protocol", "ttt", "--ttt")
    chunks = ("--set", "chunk_tokens=64", "--set", "stride=16") if dry else ()
    audited = ("--tokens", 200, "--samples", 1, "--power", 0.5) if dry else ("--tokens", 2000)
    compiled = () if dry else ("--compile",)
    solved = ("fit", *statistics, "--budget", budget, "--kappa-tokens", 256)
    scored = ("eval", "--max-tokens", short, "--json")
    return [
        step(1, "environment", 60, "environment"),
        step(1, "attention", 120, "attention"),
        step(1, "copies", 60, "copies"),
        step(1, "kernels", 300, "kernels"),
        step(1, "newton-schulz", 60, "newton_schulz"),
        step(2, "kill-and-resume", 180, "kill_and_resume"),
        step(2, "record-model", 300, "train", "--trace"),
        step(2, "one-rank-of-nccl", 120, "one_rank"),
        *(
            step(3, f"variant-{label}", 150, "train", "--label", label, "--without-loops", "--set", change)
            for label, change in VARIANTS.items()
        ),
        step(4, "small-run", 200, "small_run"),
        pgolf("calibrate", 60, "calibrate", "--tokens", few, "--fisher"),
        pgolf("requant", 60, "requant", *statistics, "--eval", "--eval-tokens", short, "--json"),
        pgolf("fit", 90, *solved, "--json"),
        pgolf("eval-plain", 60, *scored),
        pgolf("eval-plain-bf16", 60, *scored, "--precision", "bf16", *compiled),
        pgolf("eval-sliding", 60, "eval", "--max-tokens", learned, "--protocol", "sliding", "--json"),
        pgolf("eval-ttt-sgd", 60, "eval", *ttt, "sgd", *chunks, "--json"),
        pgolf("eval-ttt-lora", 60, "eval", *ttt, "lora", "--json"),
        pgolf("blend", 60, "swa-blend", "--json"),
        step(4, "sweep", 120, "sweep", "--trained", root),
        pgolf("blend-search", 60, "swa-blend", "--search", "--search-tokens", short, "--json"),
        pgolf("audit", 90, "audit", *audited, "--json"),
        pgolf("fit-tune", 120, *solved, "--tune-tokens", tuned, "--tune-precision", "bf16", "--json"),
    ]


def peak_file(out: Path, name: str) -> Path:
    """Return where a step leaves its peak memory."""
    return out / f"{name}.peak.json"


VARIANTS: dict[str, str] = {  # label → the one thing that is not as in the default
    "varlen": "run.attention=varlen",
    "sdpa": "run.attention=sdpa",
    "triton-loss-too": "run.kernels=triton",
    "plain-mlp": "run.kernels=eager",
    "float32-newton-schulz": "optim.newton_schulz_dtype=fp32",
    "clip-each-rank": "optim.clip_norm_of=each",
    "float32-stream": "run.stream=fp32",
    "three-micro-batches": "data.micro_batch_tokens=32768",
    "eager": "run.compile=false",
}


def done_before(records: Path) -> set[tuple[int, str]]:
    """Return part and name of the steps that have ended well."""
    return {(one["part"], one["name"]) for one in read_records(records) if one["rc"] == 0}


def read_records(records: Path) -> Iterator[dict[str, Any]]:
    """Yield what earlier commands recorded; a line cut short by the session's end is none."""
    if not records.is_file():
        return
    for line in records.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def run_step(one: Step, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Run one step to its end or its limit, and return its record."""
    log, peak = out / f"{one.name}.log", peak_file(out, one.name)
    peak.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = time.monotonic()
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, *one.arguments], cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
            stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(one.seconds)
        except subprocess.TimeoutExpired:
            code = "limit"
        finally:
            end_group(process)
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "part": one.part,
        "name": one.name,
        "rc": code,
        "seconds": round(time.monotonic() - started, 2),
        "peak_mib": json.loads(peak.read_text())["peak_mib"] if peak.is_file() else None,
        "last_lines": [line[-400:] for line in said if line.strip()][-LAST_LINES:],
        "command": " ".join(one.arguments),
        **facts,
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a step's own process group, which it leads: a step that is over leaves nothing behind."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def append(records: Path, record: dict[str, Any]) -> None:
    """Append one line and have it on disk before the next step begins."""
    with records.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def install(wheels: Path) -> None:
    """Install from a folder what the interpreter lacks; nothing is asked of a network."""
    words = ["-m", "pip", "install", "--no-index", "--no-deps", "--find-links", str(wheels)]
    names = sorted({path.name.split("-")[0] for path in wheels.glob("*.whl")})
    subprocess.run([sys.executable, *words, *names], check=True)


def facts_of_session(dry: bool) -> dict[str, Any]:
    """Return what every record says of where it was made."""
    asked = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    query = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    device = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True, check=False).stdout.strip()
    return {"device": device or "unknown", "commit": commit or "unknown", "dry": dry}


def main(words: list[str] | None = None) -> int:
    """Run one part. Return 0 if all its steps ended well, now or before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--part", type=int, choices=(1, 2, 3, 4), required=True, help="Part to run.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for records, logs and runs.")
    parser.add_argument("--dry", action="store_true", help="Run small on the CPU even if there is a GPU.")
    parser.add_argument("--wheels", type=Path, help="Folder of wheels to install first, without a network.")
    parser.add_argument("--only", help="Run this one step of the part.")
    given = parser.parse_args(words)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.wheels:
        install(given.wheels)
    facts = facts_of_session(given.dry)
    dry = facts["dry"] = given.dry or facts["device"] == "cpu"
    records, failed, started = out / RECORDS, 0, time.monotonic()
    before = done_before(records)
    for one in steps(out, dry):
        if one.part != given.part or given.only not in (None, one.name):
            continue
        if (one.part, one.name) in before:
            print(f"{one.name}: ended well before", flush=True)
            continue
        left = PART_SECONDS - (time.monotonic() - started)
        if left < LEAST_SECONDS:
            print(f"{one.name}: no time left in this part; run it again to go on", flush=True)
            failed += 1
            continue
        record = run_step(replace(one, seconds=min(one.seconds, int(left))), out, facts)
        append(records, record)
        failed += record["rc"] != 0
        peak = f", {record['peak_mib']:,} MiB" if record["peak_mib"] is not None else ""
        print(f"{one.name}: {record['rc']}, {record['seconds']:.1f} s{peak}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
