"""What `eval`, `audit` and `compare` share: opening what is to be scored, and the options of every protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgolf_post.cli.common import find_checkpoint, find_data, load_view
from pgolf_post.errors import NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

    from pgolf_post.data import DataFolder
    from pgolf_post.score.cached import CachedScore
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.protocols import Protocol
    from pgolf_post.score.session import Session

F = TypeVar("F", bound=Callable[..., Any])


def protocol_options(function: F) -> F:
    """--protocol and everything that a protocol can be told."""
    options = (
        click.option(
            "--protocol",
            type=click.Choice(["plain", "sliding", "ttt"]),
            default="plain",
            show_default=True,
            help="How to score.",
        ),
        click.option(
            "--split",
            type=click.Choice(["val", "train"]),
            default="val",
            show_default=True,
            help="Which text to score.",
        ),
        click.option(
            "--seq-len", type=click.IntRange(min=1), help="Window length.  [default: the model's training length]"
        ),
        click.option("--stride", type=click.IntRange(min=1), help="sliding, ttt sgd: targets per window [default: 64]"),
        click.option("--max-tokens", type=click.IntRange(min=2), help="Score only the first so many tokens."),
        click.option(
            "--tail",
            type=click.Choice(["drop", "score"]),
            default="drop",
            show_default=True,
            help="The targets that do not fill a last window.",
        ),
        click.option("--ttt", "ttt", help="ttt: record-1855, sgd-1493, or a method: sgd, scales, lora, phased."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="ttt: one setting; repeatable."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def parse_protocol(options: dict[str, Any], config: Mapping[str, Any], command: str) -> Protocol:
    """The protocol that the options name. Raises UsageError for an option that the protocol does not read."""
    from pgolf_post.families import train_seq_len
    from pgolf_post.score.plain import PlainProtocol
    from pgolf_post.score.sliding import SlidingProtocol
    from pgolf_post.score.ttt.settings import ttt_protocol
    from pgolf_post.settings import parse_settings

    kind = options["protocol"]
    common = {key: options[key] for key in ("split", "seq_len", "max_tokens", "tail")}
    if kind != "ttt" and (options["ttt"] or options["overrides"]):
        raise click.UsageError("--ttt and --set belong to --protocol ttt")
    if kind == "ttt":
        if not options["ttt"]:
            raise click.UsageError("--protocol ttt needs --ttt PRESET or METHOD, for example --ttt record-1855")
        extra = {"stride": options["stride"]}
        return ttt_protocol(options["ttt"], options["overrides"], {**common, **extra}, train_seq_len(config))
    common["seq_len"] = common["seq_len"] or train_seq_len(config)
    if kind == "sliding":
        stride = {} if options["stride"] is None else {"stride": options["stride"]}
        return parse_settings(SlidingProtocol, {**common, **stride}, command)
    if options["stride"]:
        raise click.UsageError("--stride belongs to --protocol sliding or ttt")
    return parse_settings(PlainProtocol, common, command)


@dataclass(frozen=True)
class Opened:
    """A checkpoint's view or an artifact, with the text it is scored on."""

    name: str
    config: Mapping[str, Any]
    data: DataFolder
    tensors: Callable[[], Mapping[str, Tensor]]
    score: Callable[[Protocol, bool, Session, ModelPool], CachedScore]


def open_subject(path: Path | None, weights: str | None, data_dir: Path | None) -> Opened:
    """What is at a path, checkpoint or artifact. Raises NotFoundError, MismatchError."""
    is_packed = path is not None and _is_artifact(path)
    return (_open_artifact if is_packed else _open_checkpoint)(path, weights, data_dir)


def _is_artifact(path: Path) -> bool:
    from pgolf_post.pack.artifact import find_artifact, is_artifact

    try:
        return is_artifact(find_artifact(path))
    except NotFoundError:
        return False


def _open_checkpoint(path: Path | None, weights: str | None, data_dir: Path | None) -> Opened:
    from pgolf_post.score.cached import score_view

    found = find_checkpoint(path)
    view = load_view(found, weights)
    data = find_data(found, data_dir)

    def score(protocol: Protocol, fresh: bool, session: Session, pool: ModelPool) -> CachedScore:
        return score_view(view, data, protocol, fresh, session, pool)

    return Opened(str(view), view.config, data, lambda: view.tensors, score)


def _open_artifact(path: Path | None, weights: str | None, data_dir: Path | None) -> Opened:
    import torch

    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.data import DataFolder
    from pgolf_post.pack.artifact import find_artifact, read_artifact, read_facts
    from pgolf_post.score.cached import require_tokenizer, score_artifact

    assert path is not None
    if weights:
        raise click.UsageError("--weights chooses a checkpoint's weights; an artifact has only one set")
    artifact = find_artifact(path)
    config = read_facts(artifact).manifest["config"]
    folder = artifact.parent.parent.parent.parent  # <checkpoint>/derived/artifact/<id>/artifact.pgolf
    if data_dir is None and not (folder / "meta.json").is_file():
        raise NotFoundError(
            f"{artifact} does not lie in a checkpoint folder that names its data", hint="pass --data FOLDER"
        )
    data = DataFolder.open(data_dir) if data_dir else find_data(Checkpoint.open(folder), None)
    require_tokenizer(config, data, str(artifact))

    def tensors() -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in read_artifact(artifact).tensors.items()}

    def score(protocol: Protocol, fresh: bool, session: Session, pool: ModelPool) -> CachedScore:
        return score_artifact(artifact, data, protocol, fresh, session, pool)

    return Opened(str(artifact), config, data, tensors, score)
