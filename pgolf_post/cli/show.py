"""`pgolf-post show [PATH]`: what is this, where did it come from, what can be done next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option
from pgolf_post.errors import NotFoundError, PgolfError

Rows = list[tuple[str, str]]


@click.command("show")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@json_option
def command(path: Path | None, as_json: bool) -> None:
    """Explain PATH: a checkpoint, a run, a derived folder, an artifact or a data folder.

    With PATH left out: the newest final checkpoint.
    """
    if path is None:
        from pgolf_post.checkpoint import default_checkpoint

        path = default_checkpoint().path
    what, rows, next_commands, facts = describe(path.resolve() if path.is_symlink() else path)
    print_table(f"{what}  {path}", ("", "value"), rows)
    for line in next_commands:
        say(f"next: {line}")
    if as_json:
        print_json({"path": str(path), "what": what, **facts})


def describe(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    """(what it is, rows for people, next commands, facts for machines). Raises NotFoundError for anything else."""
    from pgolf_post.data.folder import MANIFEST_NAME
    from pgolf_post.pack.artifact import is_artifact

    if path.is_file() and is_artifact(path):
        return _artifact(path)
    if (path / "meta.json").is_file() and path.parent.parent.name == "derived":
        return _derived(path)
    if (path / "config.json").is_file():
        return _checkpoint(path)
    if (path / MANIFEST_NAME).is_file():
        return _data(path)
    if path.is_dir() and (any(path.glob("step_*")) or any(path.glob("*/*/meta.json"))):
        return _run(path)
    raise NotFoundError(
        f"{path} is not a checkpoint, run, derived folder, artifact or data folder", hint="pgolf-post checkpoint list"
    )


def _checkpoint(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.families import build_module

    checkpoint = Checkpoint.open(path)
    meta, config = checkpoint.meta, checkpoint.config
    weights = sum(parameter.numel() for parameter in build_module(config).parameters())
    rows: Rows = [("kind", meta["kind"]), ("phase", str(meta["phase"])), ("step", f"{meta['step']:,}")]
    rows += [("tokens seen", f"{meta.get('tokens_seen', 0):,}"), ("parameters", f"{weights:,}")]
    rows += [("family", config["family"]), ("runtime graph", str(config["graph"])), ("data", str(meta.get("data_dir")))]
    rows += [("parents", ", ".join(_parent(parent) for parent in meta["parents"]) or "none")]
    for name, view in meta["views"].items():
        metric = view.get("metric")
        measured = f", bpb {metric['bpb']:.5f} on {metric['tokens']:,} tokens" if metric else ""
        rows.append((f"{name} weights", f"id {view['id'][:12]}{measured}"))
    rows += [(f"derived {folder.parent.name}", folder.name) for folder in sorted(path.glob("derived/*/*"))]
    commands = [f"pgolf-post {verb} {path}" for verb in ("calibrate", "requant --eval", "checkpoint verify", "eval")]
    return "checkpoint", rows, commands, {"checkpoint_id": meta["id"], "meta": meta, "parameters": weights}


def _parent(parent: Any) -> str:
    """A parent is an id or a record of a folder's view, in a blend with its share."""
    if not isinstance(parent, dict):
        return str(parent)[:12]
    share = f"{parent['share']:.3f} × " if "share" in parent else ""
    return f"{share}{parent['folder']} ({parent['view']})"


def _run(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    from pgolf_post.checkpoint import Checkpoint

    found = [meta.parent for meta in [*path.glob("*/meta.json"), *path.glob("*/*/meta.json")]]
    folders = sorted(folder for folder in found if not folder.is_symlink() and not folder.name.startswith("."))
    rows: Rows = []
    for folder in folders:
        try:
            meta = Checkpoint.open(folder).meta
        except PgolfError as error:
            rows.append((str(folder), f"damaged: {error}"))
            continue
        metrics = {name: view["metric"]["bpb"] for name, view in meta["views"].items() if view.get("metric")}
        rows.append((str(folder), meta["kind"] + "".join(f"  {name} {bpb:.4f}" for name, bpb in metrics.items())))
    commands = [f"pgolf-post show {folders[-1]}", "pgolf-post swa-blend"] if folders else []
    return "run", rows, commands, {"checkpoints": [str(folder) for folder in folders]}


def _derived(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    from pgolf_post.base.storage import read_json

    config, meta = read_json(path / "config.json"), read_json(path / "meta.json")
    short = {key: value for key, value in {**config, **meta}.items() if not isinstance(value, list | dict)}
    commands = [f"pgolf-post size {path}", f"pgolf-post eval {path}"] if config["stage"] == "artifact" else []
    return f"derived {config['stage']}", [(key, str(value)) for key, value in short.items()], commands, short


def _artifact(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    from pgolf_post.pack.artifact import read_facts

    facts = read_facts(path)
    manifest, stored = facts.manifest, path.stat().st_size
    weights = sum(unit.num_values for unit in facts.units if unit.kind == "symbols")
    rows: Rows = [("bytes", f"{stored:,}"), ("quantized weights", f"{weights:,}")]
    rows += [("symbols sha256", manifest["symbols_sha256"]), ("lineage", str(manifest["lineage"]))]
    rows += [("family", manifest["config"]["family"]), ("runtime graph", str(manifest["config"]["graph"]))]
    commands = [f"pgolf-post size {path} --code train_gpt.py", f"pgolf-post eval {path}"]
    return "artifact", rows, commands, {"artifact_bytes": stored, "symbols_sha256": manifest["symbols_sha256"]}


def _data(path: Path) -> tuple[str, Rows, list[str], dict[str, Any]]:
    from pgolf_post.data.folder import DataFolder

    data = DataFolder.open(path)
    rows: Rows = [("name", data.name), ("vocabulary", f"{data.vocab_size:,}"), ("manifest", data.manifest_sha256[:12])]
    for name, split in data.manifest["splits"].items():
        documents, tokens, size = (f"{split[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes"))
        rows.append((name, f"{documents} documents, {tokens} tokens, {size} bytes of text"))
    facts = {"manifest_sha256": data.manifest_sha256, "splits": data.manifest["splits"]}
    return "data folder", rows, [f"pgolf-post data check {path}"], facts
