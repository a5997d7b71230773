"""A record folder: made in a hidden place, proved by running it, and only then given its name.

    README.md  submission.json  train_gpt.py  train_gpt_readable.py  artifact.pgolf  train_seed42.log  eval_seed42.log …

`train_gpt.py` is counted as it lies there. A folder whose script does not reproduce the score never appears.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.base.progress import say
from pgolf_post.base.storage import atomic_folder, require_new, write_json
from pgolf_post.data import DataFolder
from pgolf_post.errors import MismatchError, VerificationError
from pgolf_post.pack.report.size import BUDGET_BYTES, count
from pgolf_post.pack.script import MINIFIER_MISSING, PackedScript
from pgolf_post.score.protocols import Protocol
from pgolf_post.score.stage import score
from pgolf_post.submit import refusals
from pgolf_post.submit.amalgamate import Amalgam
from pgolf_post.submit.audits import audited
from pgolf_post.submit.evaluate import ARTIFACT
from pgolf_post.submit.explain import PartBytes, explain
from pgolf_post.submit.forms import eval_form, read_recipe, whole_form
from pgolf_post.submit.packed import packed
from pgolf_post.submit.prove import SCRIPT, Proof, prove, prove_training
from pgolf_post.submit.refusals import Refusal
from pgolf_post.submit.seeds import Seed
from pgolf_post.submit.writing import SeedReport, Writing

READABLE = "train_gpt_readable.py"
TRAIN_LOG = "train.jsonl"


@dataclass(frozen=True)
class Order:
    """An order to hand something in, and how strictly."""

    name: str
    protocol: Protocol
    out: Path
    author: str = ""
    github_id: str = ""
    blurb: str = ""
    draft: bool = False
    by_convention: bool = False
    budget: int = BUDGET_BYTES
    proof_tokens: int | None = None  # the proof is of so many tokens; None: of all that are scored
    audit_tokens: int | None = None  # length of the audit's excerpt; None: as the protocol needs
    skip_audit: bool = False
    against: tuple[float, ...] = field(default=())
    recipe: Path | None = None  # for the whole form, which trains; None: the eval form
    prove_training: bool = False


@dataclass(frozen=True)
class Submission:
    """A record folder that was made and proved."""

    folder: Path
    facts: Mapping[str, Any]  # submission.json
    parts: Sequence[PartBytes]  # of its script
    remarks: tuple[Refusal, ...]


def submit(artifacts: Sequence[Path], data: DataFolder, order: Order) -> Submission:
    """Make and prove a record folder from one artifact of each seed; the first one's artifact is in it.

    Raises PgolfError naming every reason for which it is refused, VerificationError if the script, run alone, does not
    print our scorer's sums.
    """
    require_new(order.out)
    seeds = [Seed.open(path) for path in artifacts]
    found = [*refusals.about_seeds(seeds), *refusals.about_text(order.protocol.model_dump(mode="json"))]
    for seed in seeds:
        found += refusals.about_training_time(seed)
    refusals.require_none([each for each in found if each.stops_a_draft], draft=True)

    # the program, which all seeds share
    amalgam = form_of(seeds[0], order)
    script = packed(amalgam.source)
    if not script.minified:
        say(MINIFIER_MISSING)
    with atomic_folder(order.out) as building:
        (building / SCRIPT).write_bytes(script.data)
        (building / READABLE).write_text(amalgam.source, "utf-8")
        sizes = [count(seed.artifact, [building / SCRIPT], order.budget, order.by_convention) for seed in seeds]
        for seed, size in zip(seeds, sizes, strict=True):
            found += refusals.about_bytes(seed, size)
        refusals.require_none([each for each in found if each.stops_a_draft], draft=True)

        # rules, scores and the proof, seed by seed
        reports = []
        for seed, size in zip(seeds, sizes, strict=True):
            findings = audited(seed, data, order.protocol, order.audit_tokens, make=not order.skip_audit)
            found += refusals.about_audit(seed, findings)
            refusals.require_none([each for each in found if each.stops_a_draft], draft=True)
            proof = proved(script, seed, data, order)
            stored = score(seed.artifact, data, order.protocol)  # after it, for it may have made the score again
            found += refusals.about_evaluation_time(seed, float(stored.facts.get("strict_seconds", 0.0)))
            reports.append(SeedReport(seed, size, stored.facts, proof, findings))
        remarks = refusals.require_none(found, order.draft)
        if order.prove_training:
            say(f"{seeds[0].name}: training by {SCRIPT} in an empty folder")
            prove_training(script.data, data.path, str(seeds[0].manifest["symbols_sha256"]))

        # the files
        protocol = order.protocol.model_dump(mode="json")
        about = (order.name, order.author, order.github_id, order.blurb, protocol, reports)
        parts = explain(amalgam)
        writing = Writing(*about, len(script.data), parts, order.against, remarks)
        facts = writing.submission()
        shutil.copyfile(seeds[0].artifact, building / ARTIFACT)
        write_json(building / "submission.json", facts)
        (building / "README.md").write_text(writing.readme(), "utf-8")
        for report in reports:
            _write_logs(building, report)
    return Submission(order.out, facts, parts, tuple(remarks))


def form_of(seed: Seed, order: Order) -> Amalgam:
    """Return the program that the order asks for: the whole form with a recipe, else the eval form."""
    config = seed.manifest["config"]
    if order.recipe is None:
        return eval_form(config, order.protocol)
    return whole_form(seed, read_recipe(config, order.recipe), order.protocol)


def proved(script: PackedScript, seed: Seed, data: DataFolder, order: Order) -> Proof:
    """Run the script on a seed's artifact, alone, against our scorer here: one machine, as many threads."""
    tokens = order.proof_tokens
    protocol = order.protocol if tokens is None else order.protocol.model_copy(update={"max_tokens": tokens})
    expected = score(seed.artifact, data, protocol)
    say(f"{seed.name}: running {SCRIPT} in an empty folder")
    try:
        return prove(script.data, seed.artifact, data.path, expected.facts, tokens)
    except VerificationError as error:
        if not expected.cached:
            raise
        say(f"{error}; the score was kept from before, and is made again here")
    expected = score(seed.artifact, data, protocol, fresh=True)
    return prove(script.data, seed.artifact, data.path, expected.facts, tokens)


def _write_logs(building: Path, report: SeedReport) -> None:
    """Write the seed's logs: its training's as the trainer wrote it, and what the script printed."""
    (building / f"eval_seed{report.seed.label}.log").write_text(json.dumps(report.proof.facts()) + "\n", "utf-8")
    source = report.seed.run and report.seed.run.path.parent / TRAIN_LOG
    if source and source.is_file():
        shutil.copyfile(source, building / f"train_seed{report.seed.label}.log")


def record_to_beat(text: str) -> tuple[float, ...]:  # "R1,R2,R3" or a submission.json
    """Return the bpb of a record's seeds. Raises MismatchError for what is neither numbers nor such a file."""
    path = Path(text)
    if path.is_file():
        results = json.loads(path.read_text("utf-8")).get("seed_results") or {}
        rows = results.values() if isinstance(results, Mapping) else results
        values = [float(row["val_bpb"]) for row in rows if "val_bpb" in row]
        if values:
            return tuple(values)
        raise MismatchError(f"{path} has no seed_results with val_bpb", hint="--against R1,R2,R3")
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise MismatchError(f"--against {text!r} is neither numbers nor a submission.json") from None
