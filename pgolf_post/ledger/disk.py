"""Ledger rows made from disk: runs, checkpoints, statistics, artifacts and scores, from their meta.json files.

Commands and `ledger scan` make rows by these functions alone, so that a result recorded when it was made and one found
later are the same row. Ids are those that the folders are named by: a view's id, and the derived ids of later stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pgolf_post.base.storage import read_json
from pgolf_post.cache import CacheEntry, entry_at, list_entries
from pgolf_post.checkpoint import CHECKPOINT_ROOT, SMOKE_FOLDER, Checkpoint, list_checkpoints, run_checkpoints
from pgolf_post.derived import NAMING, id_from_config
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError
from pgolf_post.ledger import phases
from pgolf_post.ledger.schema import Kind, Row, iso_utc

KNOBS = {"bits": "bits", "clip": "clip", "hessian_lambda": "λ"}
RUN_KINDS = ("raw", "imported")  # of checkpoints that a run saved
SUMS = ("bpb", "nats", "tokens", "bytes")
LINEAGE_FACTS = ("kind", "phase", "step", "ema_share", "ema", "prune", "source", "allowed_differences")


def scan(
    root: Path, checkpoints: Sequence[Checkpoint] | None = None, entries: Sequence[CacheEntry] | None = None
) -> list[Row]:
    """Rows of everything complete under a checkpoint root, oldest first. Raises NotFoundError if there is no root.

    Smoke runs are left out, whose root is one of their own. `checkpoints` and `entries` are what lies there, where the
    caller has listed it.
    """
    listed = list_entries(root) if entries is None else entries
    entries = [entry for entry in listed if entry.stage in STAGES and not _is_of_smoke(entry, root)]
    checkpoints = list_checkpoints(root) if checkpoints is None else checkpoints
    own = [checkpoint for checkpoint in checkpoints if checkpoint.meta["kind"] in RUN_KINDS]
    newest = {c.path.parent: c for c in sorted(own, key=lambda checkpoint: int(checkpoint.meta["step"]))}
    rows = [run_row(checkpoint) for checkpoint in newest.values()]
    rows += [row for checkpoint in checkpoints for row in view_rows(checkpoint)]
    rows += [row for entry in entries for row in entry_rows(entry)]
    return sorted(rows, key=lambda row: row.created)


def _is_of_smoke(entry: CacheEntry, root: Path) -> bool:
    place = entry.checkpoint.relative_to(root).parts
    return len(place) > 2 and place[0] == SMOKE_FOLDER


def rows_at(folder: Path) -> list[Row]:
    """Rows of one checkpoint folder (its own, not what was made of it), or of one derived folder and its checkpoint."""
    if folder.parent.parent.name != "derived":
        return checkpoint_rows(Checkpoint.open(folder))
    is_at_home = (folder.parents[2] / "meta.json").is_file()  # not so below an artifact that was taken elsewhere
    own = checkpoint_rows(Checkpoint.open(folder.parents[2])) if is_at_home else []
    made = entry_rows(entry_at(folder))
    if not made:
        raise DamagedFileError(f"{folder} is not a complete result", hint="pgolf-post cache verify")
    return [*own, *made]


def root_of(folder: Path | None) -> Path:
    """The checkpoint root that a checkpoint folder, or one derived from it, lies under; else `checkpoints` here.

    Raises NotFoundError if there is neither.
    """
    if folder is not None:
        checkpoint = folder.parents[2] if folder.parent.parent.name == "derived" else folder
        if (checkpoint / "meta.json").is_file():
            return checkpoint.parent.parent
    if not CHECKPOINT_ROOT.is_dir():
        raise NotFoundError(f"no folder {CHECKPOINT_ROOT}/ here, which would hold the ledger")
    return CHECKPOINT_ROOT


def checkpoint_rows(checkpoint: Checkpoint) -> list[Row]:
    """The run that a checkpoint is of, if it is a training run's or an imported one's, and a row for each view."""
    is_of_run = checkpoint.meta["kind"] in RUN_KINDS
    return [*([run_row(run_checkpoints(checkpoint)[-1])] if is_of_run else []), *view_rows(checkpoint)]


def view_rows(checkpoint: Checkpoint) -> list[Row]:
    """A row for each view; its parents are those of the checkpoint, else its run."""
    meta, run = checkpoint.meta, checkpoint.path.parent.name
    parents = tuple(_parent_id(parent) for parent in meta.get("parents") or ())
    parents = parents or ((run_row_id(run),) if meta["kind"] in RUN_KINDS else ())
    settings = {key: meta[key] for key in LINEAGE_FACTS if meta.get(key) is not None}
    common: dict[str, Any] = {"run": run, "commit": _commit(meta), "device": meta.get("device")}
    common["created"] = _created(meta)
    rows: dict[str, Row] = {}
    for name, view in meta["views"].items():
        label = f"{run}/{checkpoint.path.name}" + (f":{name}" if len(meta["views"]) > 1 else "")
        row_id, verdict = str(view["id"]), None
        if row_id in parents:  # a blend that equals one of its parts
            row_id, verdict = f"{row_id[:12]}-{checkpoint.path.name}", "no-op"
        named: dict[str, Any] = {"verdict": verdict, "settings": {**settings, "view": name}}
        named["result"] = {**_metric(view), "checkpoint_id": str(view["id"])}
        rows.setdefault(row_id, Row("checkpoint", row_id, parents, label, **named, **common))
    return list(rows.values())


def run_row(checkpoint: Checkpoint) -> Row:
    """A training run as its newest checkpoint tells it."""
    meta, run = checkpoint.meta, checkpoint.path.parent.name
    default = meta["views"][checkpoint.view_name(None)]
    facts: dict[str, Any] = {
        key: meta[key] for key in ("step", "tokens_seen", "train_seconds", "wall_seconds") if key in meta
    }
    if stopped := meta.get("stopped_early"):
        facts["stopped_early"] = stopped["reason"]
    settings = meta.get("recipe") or {"source": meta.get("source")}
    told: dict[str, Any] = {"settings": settings, "result": {**facts, **_metric(default)}}
    told["seconds"] = meta.get("wall_seconds", meta.get("train_seconds"))
    told["phases"] = [phase.facts() for phase in phases.of_run(meta)]
    where: dict[str, Any] = {"commit": _commit(meta), "device": meta.get("device"), "created": _created(meta)}
    base = (meta.get("recipe") or {}).get("run", {}).get("base")
    return Row("run", run_row_id(run), (run_row_id(base),) if base else (), run, run, **told, **where)


def run_row_id(run: str) -> str:
    """Return the id of a training run's row, by the run's name."""
    return f"run:{run}"


def entry_rows(entry: CacheEntry) -> list[Row]:
    """The row of one derived result; none where it is incomplete or damaged JSON."""
    if entry.state not in ("complete", "orphan"):
        return []
    try:
        meta = read_json(entry.path / "meta.json")
        parents, name, result = STAGES[entry.stage].describe(entry, meta)
    except (PgolfError, KeyError, TypeError, AttributeError):
        return []
    settings = {key: value for key, value in entry.config.items() if key not in NAMING and key != "spans"}
    told: dict[str, Any] = {"settings": settings, "result": result}
    told |= {"seconds": meta.get("seconds"), "device": meta.get("device")}
    told["phases"] = [phase.facts() for phase in STAGES[entry.stage].phases(meta, entry.config)]
    created = iso_utc((entry.path / "meta.json").stat().st_mtime)
    return [
        Row(
            STAGES[entry.stage].kind,
            entry_id(entry, meta),
            parents,
            name,
            entry.checkpoint.parent.name,
            **told,
            created=created,
        )
    ]


def entry_id(entry: CacheEntry, meta: Mapping[str, Any]) -> str:
    """The derived id whose first 12 digits name the folder, made again from config.json; else those digits."""
    parents = [str(entry.config[key]) for key in ("view_id", "stats_id") if key in entry.config]
    parents = [str(meta["subject_id"])] if "subject_id" in meta else parents
    made_again = str(meta.get("stats_id") or id_from_config({"stage": entry.stage, **entry.config}, parents))
    return made_again if made_again.startswith(entry.path.name) else entry.path.name


Description = tuple[tuple[str, ...], str, dict[str, Any]]  # parents, name, result


def _stats(entry: CacheEntry, meta: Mapping[str, Any]) -> Description:
    config = entry.config
    name = f"{config.get('source', 'train')} text, {meta['num_tokens']:,} tokens, {config['view']}"
    result = {"tokens": meta["num_tokens"], "checkpoint_id": config["view_id"], "fisher": bool(meta.get("fisher"))}
    return (str(config["view_id"]),), name, result


def _diagnosis(entry: CacheEntry, meta: Mapping[str, Any]) -> Description:
    """A diagnosis by its headline: the worst numbers, and the rules that marked any when it was made."""
    config = entry.config
    name = f"diagnosis, {config['view']}" + (f", {config['tokens']:,} tokens" if config.get("tokens") else "")
    return (str(config["view_id"]),), name, {**meta["headline"], "checkpoint_id": str(config["view_id"])}


def _artifact(entry: CacheEntry, meta: Mapping[str, Any]) -> Description:
    config = entry.config
    num_bytes = next(path.stat().st_size for path in entry.path.glob("artifact.*"))
    result = {"artifact_bytes": num_bytes, "symbols_sha256": meta["symbols_sha256"], "checkpoint_id": meta["view_id"]}
    name = ", ".join([str(config.get("plan", "plan")), *_knobs(config), str(config["codec"]), str(config["view"])])
    return (str(config["view_id"]), str(config["stats_id"])), name, result


def _knobs(config: Mapping[str, Any]) -> list[str]:
    """The knobs that artifacts of one plan mostly differ in: each with its values over the rules, in their order."""
    rules = config.get("rules") or [config]
    found = {label: [r[key] for r in rules if isinstance(r.get(key), int | float)] for key, label in KNOBS.items()}
    return [f"{label} {'/'.join(f'{v:g}' for v in dict.fromkeys(values))}" for label, values in found.items() if values]


def _score(entry: CacheEntry, meta: Mapping[str, Any]) -> Description:
    """A score's parent is a view, or the artifact whose file has the sha256 that was scored."""
    subject, config = str(meta["subject_id"]), entry.config
    result = {key: meta[key] for key in (*SUMS, "documents")} | dict(meta.get("breakdown", {}))
    name = str(config["protocol"]) + (f", stride {config['stride']}" if config.get("stride") else "")
    name += ", bf16" if config.get("precision") == "bf16" else ""
    for artifact, artifact_meta in _siblings(entry, "artifact"):
        if artifact_meta.get("payload_sha256") == subject:
            packed = _artifact(artifact, artifact_meta)[2]
            return (entry_id(artifact, artifact_meta),), f"{name} of an artifact", {**result, **packed}
    return (subject,), f"{name} of a checkpoint", {**result, "checkpoint_id": subject}


class StageRows(NamedTuple):
    """Row of STAGES: the kind of row that a result becomes, and the functions that describe and time it."""

    kind: Kind
    describe: Callable[[CacheEntry, Mapping[str, Any]], Description]
    phases: Callable[[Mapping[str, Any], Mapping[str, Any]], list[phases.ChainPhase]]  # of its meta and config


# Stages by name: their `Stage` objects (STATS, DIAGNOSIS, ARTIFACT, SCORE) stand beside the code that makes results,
# which the ledger must not import. The version and settings of a result are read from its config.json.
STAGES = {
    "stats": StageRows("stats", _stats, phases.of_stats),
    "diagnosis": StageRows("diagnosis", _diagnosis, lambda *_: []),
    "artifact": StageRows("artifact", _artifact, phases.of_artifact),
    "score": StageRows("score", _score, lambda meta, _: phases.of_score(meta)),
}


def _siblings(entry: CacheEntry, stage: str) -> Iterator[tuple[CacheEntry, dict[str, Any]]]:
    for meta_path in sorted((entry.path.parent.parent / stage).glob("*/meta.json")):
        if not meta_path.parent.name.startswith("."):
            yield entry_at(meta_path.parent), read_json(meta_path)


def _metric(view: Mapping[str, Any]) -> dict[str, Any]:
    """The metric recorded at save time; nothing where it was not measured (yet)."""
    metric = view.get("metric") or {}
    return {key: metric[key] for key in (*SUMS, "protocol", "max_tokens") if key in metric}


def _parent_id(parent: object) -> str:
    return str(parent["id"] if isinstance(parent, Mapping) else parent)


def _commit(meta: Mapping[str, Any]) -> str | None:
    commit = (meta.get("git") or {}).get("commit")
    return None if commit is None else str(commit)


def _created(meta: Mapping[str, Any]) -> str:
    return iso_utc(float(meta["created_unix"]) if "created_unix" in meta else None)
