"""Describe a path: a checkpoint, a run, a derived folder, an artifact or a data folder, told from its files alone.

`KINDS` is a table: what a path of a kind looks like → what to say of it. The first row that fits is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgolf_post.base.storage import read_json
from pgolf_post.cache import CacheEntry, entry_at
from pgolf_post.checkpoint import Checkpoint, run_checkpoints
from pgolf_post.data.folder import MANIFEST_NAME, DataFolder
from pgolf_post.diagnose.report import text_of
from pgolf_post.diagnose.stage import open_diagnosis, stored_diagnoses
from pgolf_post.errors import NotFoundError, PgolfError
from pgolf_post.families import build_module
from pgolf_post.pack.artifact import is_artifact, read_facts

CHECKPOINT_HEADER = ("folder", "kind", "step", "bpb", "id")
RUN_KINDS = ("raw", "imported")  # of checkpoints that have a history
SHOWN_MARKS = 3


@dataclass(frozen=True)
class Description:
    """Description of a path: rows for people, commands that make sense next, facts for machines (plain JSON values)."""

    what: str  # the kind, in words
    rows: list[tuple[str, str]]
    next_commands: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def describe(path: Path) -> Description:
    """Return the description of what lies at `path`. Raises NotFoundError if it is of no known kind."""
    for fits, describe_kind in KINDS:
        if fits(path):
            return describe_kind(path)
    raise NotFoundError(
        f"{path} is not a checkpoint, run, derived folder, artifact or data folder", hint="pgolf-post checkpoint list"
    )


def describe_artifact(path: Path) -> Description:
    """Return an artifact's bytes, weights, lineage and model, from its header."""
    facts = read_facts(path)
    manifest, num_bytes = facts.manifest, path.stat().st_size
    num_weights = sum(unit.num_values for unit in facts.units if unit.kind == "symbols")
    rows = [
        ("bytes", f"{num_bytes:,}"),
        ("quantized weights", f"{num_weights:,}"),
        ("symbols sha256", str(manifest["symbols_sha256"])),
        ("lineage", str(manifest["lineage"])),
        ("family", str(manifest["config"]["family"])),
        ("runtime graph", str(manifest["config"]["graph"])),
    ]
    commands = [f"pgolf-post size {path} --code train_gpt.py", f"pgolf-post eval {path}"]
    return Description(
        "artifact", rows, commands, {"artifact_bytes": num_bytes, "symbols_sha256": manifest["symbols_sha256"]}
    )


def describe_derived(path: Path) -> Description:
    """Return the settings and facts that a derived folder records, and whether it is a result or a leftover."""
    config, meta = read_json(path / "config.json"), read_json(path / "meta.json")
    facts = {key: value for key, value in {**config, **meta}.items() if not isinstance(value, list | dict)}
    rows = [("state", entry_at(path).state), *((key, str(value)) for key, value in facts.items())]
    commands = [f"pgolf-post size {path}", f"pgolf-post eval {path}"] if config["stage"] == "artifact" else []
    return Description(f"derived {config['stage']}", rows, commands, facts)


def describe_checkpoint(path: Path) -> Description:
    """Return a checkpoint's place in its run, its views with their metrics, and what was derived from it."""
    checkpoint = Checkpoint.open(path)
    meta, config = checkpoint.meta, checkpoint.config
    num_parameters = sum(parameter.numel() for parameter in build_module(config).parameters())
    history = run_history(checkpoint)
    inside, diagnosis = inside_rows(checkpoint)
    rows = [
        ("kind", str(meta["kind"])),
        ("phase", str(meta["phase"])),
        ("step", f"{meta['step']:,}"),
        ("tokens seen", f"{meta.get('tokens_seen', 0):,}"),
        ("parameters", f"{num_parameters:,}"),
        ("family", str(config["family"])),
        ("runtime graph", str(config["graph"])),
        ("data", str(meta.get("data_dir"))),
        ("parents", ", ".join(_parent(parent) for parent in meta["parents"]) or "none"),
        *((f"{name} weights", _view(view)) for name, view in meta["views"].items()),
        *([("history", history_text(history))] if history else []),
        *inside,
        *_derived_rows([entry_at(folder) for folder in sorted(path.glob("derived/*/*"))]),
    ]
    verbs = ("diagnose", "calibrate", "requant --eval", "checkpoint verify", "eval")
    commands = [f"pgolf-post {verb} {path}" for verb in verbs]
    facts = {"checkpoint_id": meta["id"], "meta": meta, "parameters": num_parameters}
    facts |= {"history": history, "diagnosis": diagnosis}
    return Description("checkpoint", rows, commands, facts)


def run_history(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return phase, step and bpb by view of each scored checkpoint of a run, in step order; of a blend none."""
    if checkpoint.meta["kind"] not in RUN_KINDS:
        return []
    metas = [member.meta for member in run_checkpoints(checkpoint)]
    found = []
    for meta in metas:
        bpb = {name: view["metric"]["bpb"] for name, view in meta["views"].items() if view.get("metric")}
        found += [{"phase": meta["phase"], "step": meta["step"], "bpb": bpb}] if bpb else []
    return found


def history_text(history: Iterable[Mapping[str, Any]]) -> str:
    """Return a run's history in one line: the bpb of each phase, of the last one in every view."""
    rows = list(history)
    parts = [f"{row['phase']} {next(iter(row['bpb'].values())):.4f}" for row in rows]
    others = ", ".join(f"{name} {bpb:.4f}" for name, bpb in list(rows[-1]["bpb"].items())[1:])
    return " → ".join(parts) + (f" ({others})" if others else "")


def inside_rows(checkpoint: Checkpoint) -> tuple[list[tuple[str, str]], dict[str, Any] | None]:
    """Return rows on what the newest diagnosis marked and on an early stop, and the diagnosis's facts for machines."""
    rows = []
    if stopped := checkpoint.meta.get("stopped_early"):
        rows.append(("stopped early", str(stopped["reason"])))
    folders = stored_diagnoses(checkpoint.path)
    if not folders:
        return rows, None
    try:
        diagnosis = open_diagnosis(folders[-1])
    except PgolfError as error:
        return [*rows, ("diagnosis", f"damaged: {error}")], None
    marks = diagnosis.marks
    wrong = f"{len(marks)} of {len(diagnosis.numbers):,} numbers marked" if marks else "nothing marked"
    rows.append(("diagnosis", f"{diagnosis.folder.name}: {wrong}"))
    for mark in marks[:SHOWN_MARKS]:
        number, side = mark.number, ">" if mark.rule.bad == "above" else "<"
        rows.append((mark.rule.name, f"{number.subject}: {text_of(number.value)} {side} {mark.rule.limit:g}"))
    return rows, {"folder": str(diagnosis.folder), "marks": [mark.facts() for mark in marks]}


def _parent(parent: object) -> str:
    """Return a parent in words: an id, or a record of a folder's view, in a blend with its share."""
    if not isinstance(parent, dict):
        return str(parent)[:12]
    share = f"{parent['share']:.3f} × " if "share" in parent else ""
    return f"{share}{parent['folder']} ({parent['view']})"


def _view(view: Mapping[str, Any]) -> str:
    metric = view.get("metric")
    measured = f", bpb {metric['bpb']:.5f} on {metric['tokens']:,} tokens" if metric else ""
    return f"id {view['id'][:12]}{measured}"


def _derived_rows(entries: Iterable[CacheEntry]) -> list[tuple[str, str]]:
    """Return one row for each result, and one that counts what interrupted or killed processes left."""
    rows, leftovers = [], Counter[str]()
    for entry in entries:
        if entry.state in ("complete", "orphan"):
            note = " (orphan: made from other weights)" if entry.state == "orphan" else ""
            rows.append((f"derived {entry.stage}", f"{entry.path.name}{note}"))
        else:
            leftovers[entry.state] += 1
    if leftovers:
        counts = ", ".join(f"{number} {state}" for state, number in sorted(leftovers.items()))
        rows.append(("no results", f"{counts} (pgolf-post cache list)"))
    return rows


def describe_run(path: Path) -> Description:
    """Return the checkpoints of a run, or of the runs below a folder, with their metrics."""
    metas = [*path.glob("*/meta.json"), *path.glob("*/*/meta.json")]
    folders = sorted(folder for folder in (meta.parent for meta in metas) if _is_own_folder(folder))
    rows, newest = [], None
    for folder in folders:
        try:
            newest = Checkpoint.open(folder)
            meta = newest.meta
            rows.append((str(folder), "  ".join(filter(None, [str(meta["kind"]), metrics_text(meta)]))))
        except PgolfError as error:
            rows.append((str(folder), f"damaged: {error}"))
    commands = [f"pgolf-post show {folders[-1]}", "pgolf-post swa-blend"] if folders else []
    facts: dict[str, Any] = {"checkpoints": [str(folder) for folder in folders]}
    if newest is not None and all(folder.parent == path for folder in folders):
        commands += [f"pgolf-post curves {path}", f"pgolf-post diagnose {path}"]
        if history := run_history(newest):
            rows.append(("history", history_text(history)))
        inside, diagnosis = inside_rows(newest)
        rows += inside
        facts |= {"history": history, "diagnosis": diagnosis}
    return Description("run", rows, commands, facts)


def _is_own_folder(folder: Path) -> bool:
    return not folder.is_symlink() and not folder.name.startswith(".")


def metrics_text(meta: Mapping[str, Any]) -> str:
    """Return the bpb that a checkpoint records of each of its views; empty if it records none."""
    metrics = {name: view["metric"]["bpb"] for name, view in meta["views"].items() if view.get("metric")}
    return "  ".join(f"{name} {bpb:.4f}" for name, bpb in metrics.items())


def checkpoint_row(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return a checkpoint's cells under CHECKPOINT_HEADER."""
    meta = checkpoint.meta
    return str(checkpoint.path), str(meta["kind"]), str(meta["step"]), metrics_text(meta), str(meta["id"])[:12]


def describe_data(path: Path) -> Description:
    """Return a data folder's vocabulary and the sizes of its splits."""
    data = DataFolder.open(path)
    rows = [("name", data.name), ("vocabulary", f"{data.vocab_size:,}"), ("manifest", data.manifest_sha256[:12])]
    for name, split in data.manifest["splits"].items():
        documents, tokens, num_bytes = (f"{split[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes"))
        rows.append((name, f"{documents} documents, {tokens} tokens, {num_bytes} bytes of text"))
    facts = {"manifest_sha256": data.manifest_sha256, "splits": data.manifest["splits"]}
    return Description("data folder", rows, [f"pgolf-post data check {path}"], facts)


# what a path of the kind looks like → its description, the first that fits
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Description]]] = [
    (lambda path: path.is_file() and is_artifact(path), describe_artifact),
    (lambda path: (path / "meta.json").is_file() and path.parent.parent.name == "derived", describe_derived),
    (lambda path: (path / "config.json").is_file(), describe_checkpoint),
    (lambda path: (path / MANIFEST_NAME).is_file(), describe_data),
    (lambda path: path.is_dir() and any([*path.glob("step_*"), *path.glob("*/*/meta.json")]), describe_run),
]
