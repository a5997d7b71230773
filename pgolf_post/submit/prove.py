"""The proof of a record folder: its script, run alone, prints the sums that our scorer has, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.errors import VerificationError
from pgolf_post.submit.evaluate import ARTIFACT
from pgolf_post.submit.isolated import run_isolated

SCRIPT = "train_gpt.py"
COMPARED = ("nats", "tokens", "bytes", "bpb")


@dataclass(frozen=True)
class Proof:
    """Sums that the script printed, which are our scorer's, and the circumstances of its run."""

    sums: Mapping[str, Any]  # bpb, nats, tokens, bytes
    seconds: Mapping[str, float]  # by phase
    network: str
    threads: int

    def facts(self) -> dict[str, Any]:
        """Return the proof as JSON."""
        circumstances = {"network": self.network, "threads": self.threads}
        return {**self.sums, "seconds": dict(self.seconds), **circumstances}


def prove(
    script: bytes,
    artifact: Path,
    data: Path,
    expected: Mapping[str, Any],  # bpb, nats, tokens, bytes of our scorer
    max_tokens: int | None = None,  # the proof is of so many tokens, from the start; None: of all that are scored
) -> Proof:
    """Run a script alone beside its artifact. Raises VerificationError naming each sum that is not the expected one."""
    files: dict[str, Path | bytes] = {SCRIPT: script, ARTIFACT: artifact}
    more = ["all" if max_tokens is None else str(max_tokens), "eval"]  # a script that trains is told only to score
    run = run_isolated(files, [str(data.resolve()), *more])
    answer = run.answer
    wrong = [
        f"{key} {answer.get(key)!r}, expected {expected[key]!r}" for key in COMPARED if answer.get(key) != expected[key]
    ]
    if wrong:
        raise VerificationError(
            f"{SCRIPT} does not reproduce the score: {'; '.join(wrong)} ({run.threads} threads)",
            hint="score again on this machine with the same --threads: pgolf-post eval --fresh",
        )
    phases = {key: value for key, value in answer.items() if key not in COMPARED}
    return Proof({key: answer[key] for key in COMPARED}, phases, run.network, run.threads)


def prove_training(script: bytes, data: Path, symbols_sha256: str) -> None:
    """Let a script train, alone, and compare the symbols that it makes. Raises VerificationError if they are others."""
    run = run_isolated({SCRIPT: script}, [str(data.resolve())])
    made = [line.partition(":")[2] for line in run.stdout.splitlines() if line.startswith("symbols_sha256:")]
    if made != [symbols_sha256]:
        raise VerificationError(
            f"{SCRIPT} trains to symbols {', '.join(each[:12] for each in made) or 'none'}, the artifact has "
            f"{symbols_sha256[:12]} ({run.threads} threads)",
            hint="only a schedule in steps, on the machine and with the threads of the run, trains to the same weights",
        )
