"""`pgolf-post eval`: bits per byte of a checkpoint or of what an artifact decodes to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgolf_post.cli.common import (
    checkpoint_argument,
    data_option,
    find_checkpoint,
    find_data,
    fresh_option,
    json_option,
    load_view,
    weights_option,
)
from pgolf_post.errors import NotFoundError
from pgolf_post.progress import print_json, print_table


@click.command("eval")
@checkpoint_argument
@weights_option
@data_option
@click.option("--protocol", type=click.Choice(["plain"]), default="plain", show_default=True, help="How to score.")
@click.option("--split", type=click.Choice(["val", "train"]), default="val", show_default=True)
@click.option("--seq-len", type=click.IntRange(min=1), help="Window length.  [default: the model's training length]")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Score only the first so many tokens.")
@click.option(
    "--tail", type=click.Choice(["drop", "score"]), default="drop", show_default=True, help="Last partial window."
)
@fresh_option
@json_option
def command(
    checkpoint: Path | None, weights: str | None, data_dir: Path | None, fresh: bool, as_json: bool, **options: Any
) -> None:
    """Score CHECKPOINT, which may also be an artifact file or the folder that holds one.

    Per-document sums are kept beside what was scored, so that two scores can be compared document by document.
    """
    started = time.perf_counter()
    is_artifact = checkpoint is not None and _is_artifact(checkpoint)
    subject, score, cached = (_score_artifact if is_artifact else _score_checkpoint)(
        checkpoint, weights, data_dir, fresh, options
    )
    rows = [("bits per byte", f"{score['bpb']:.6f}"), ("nats per token", f"{score['nats'] / score['tokens']:.6f}")]
    rows += [("tokens", f"{score['tokens']:,}"), ("bytes of text", f"{score['bytes']:,}")]
    rows += [("documents", f"{score['documents']:,}"), ("from cache", "yes" if cached else "no")]
    print_table(str(subject), ("", "value"), rows)
    if as_json:
        sums = {key: score[key] for key in ("bpb", "nats", "tokens", "bytes", "documents")}
        seconds = round(time.perf_counter() - started, 3)
        print_json({"path": str(checkpoint or subject), **sums, "cached": cached, "seconds": seconds})


def _is_artifact(path: Path) -> bool:
    from pgolf_post.pack.container import find_artifact, is_artifact

    try:
        return is_artifact(find_artifact(path))
    except NotFoundError:
        return False


def _protocol(options: dict[str, Any], config: Mapping[str, Any]) -> Any:
    from pgolf_post.families import train_seq_len
    from pgolf_post.score.plain import PlainProtocol
    from pgolf_post.settings import parse_settings

    return parse_settings(PlainProtocol, {**options, "seq_len": options["seq_len"] or train_seq_len(config)}, "eval")


def _score_checkpoint(
    path: Path | None, weights: str | None, data_dir: Path | None, fresh: bool, options: dict[str, Any]
) -> tuple[Any, dict[str, Any], bool]:
    from pgolf_post.score.cached import score_view

    found = find_checkpoint(path)
    view = load_view(found, weights)
    protocol = _protocol(options, view.config)
    return (view, *score_view(view, find_data(found, data_dir), protocol, fresh))


def _score_artifact(
    path: Path | None, weights: str | None, data_dir: Path | None, fresh: bool, options: dict[str, Any]
) -> tuple[Any, dict[str, Any], bool]:
    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.data import DataFolder
    from pgolf_post.pack.container import find_artifact, read_facts
    from pgolf_post.score.cached import score_artifact

    assert path is not None
    if weights:
        raise click.UsageError("--weights chooses a checkpoint's weights; an artifact has only one set")
    artifact = find_artifact(path)
    config = read_facts(artifact).manifest["config"]
    protocol = _protocol(options, config)
    folder = artifact.parent.parent.parent.parent  # <checkpoint>/derived/artifact/<id>/artifact.pgolf
    if data_dir is None and not (folder / "meta.json").is_file():
        raise NotFoundError(
            f"{artifact} does not lie in a checkpoint folder that names its data", hint="pass --data FOLDER"
        )
    data = DataFolder.open(data_dir) if data_dir else find_data(Checkpoint.open(folder), None)
    return (artifact, *score_artifact(artifact, data, protocol, fresh))
