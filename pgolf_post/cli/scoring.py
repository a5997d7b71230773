"""Code shared by `eval`, `audit` and `compare`: opening the model to score, and the options of every protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgolf_post.cli.common import derived_folder, find_checkpoint, find_data, load_view
from pgolf_post.errors import NotFoundError
from pgolf_post.score.breakdown import KIND_NAMES
from pgolf_post.score.ttt.methods import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from pgolf_post.checkpoint import View
    from pgolf_post.data import DataFolder
    from pgolf_post.pack.artifact import DecodedArtifact
    from pgolf_post.score.breakdown.sums import Breakdown
    from pgolf_post.score.phase_times import PhaseTimes
    from pgolf_post.score.pool import ModelPool
    from pgolf_post.score.protocols import Protocol
    from pgolf_post.score.session import Session
    from pgolf_post.score.stage import StoredScore

F = TypeVar("F", bound=Callable[..., Any])

PROTOCOL_NAMES = ("plain", "sliding", "ttt")  # score/protocols.py lists them, which loads torch


def protocol_options(function: F) -> F:
    """Add --protocol and everything that a protocol can be told."""
    options = (
        click.option(
            "--protocol",
            type=click.Choice(PROTOCOL_NAMES),
            default="plain",
            show_default=True,
            help="Score in separate windows, in overlapping ones, or with test-time training.",
        ),
        click.option(
            "--split",
            type=click.Choice(["val", "train"]),
            default="val",
            show_default=True,
            help="Split of the data that is scored.",
        ),
        click.option(
            "--seq-len",
            type=click.IntRange(min=1),
            help="Window length in tokens.  [default: the preset's, else the model's training length]",
        ),
        click.option(
            "--stride",
            type=click.IntRange(min=1),
            help="Tokens by which a window moves on; for sliding, and for ttt by sgd or scales.  [default: 64]",
        ),
        click.option(
            "--max-tokens", type=click.IntRange(min=2), help="Score only this many tokens, from the start of the split."
        ),
        click.option(
            "--tail",
            type=click.Choice(["drop", "score"]),
            default="drop",
            show_default=True,
            help="Drop or score the targets that do not fill a last window.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            help="Type of forward passes' products; bf16 is faster on a GPU and gives another number, kept as another "
            "score.  [default: fp32]",
        ),
        click.option(
            "--ttt",
            type=click.Choice(list(PRESETS)),
            help="Published settings, or a method, of test-time training; for --protocol ttt.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one setting of test-time training; may be repeated. An unknown key lists the valid ones.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _parse_kinds(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Read a comma-separated list of kinds of bins. Raises BadParameter naming those there are."""
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if "all" in names:
        return KIND_NAMES
    unknown = [name for name in names if name not in KIND_NAMES]
    if unknown or (text is not None and not names):
        raise click.BadParameter(f"no kind of bins {text!r}; there are: {', '.join(KIND_NAMES)}, all")
    return names


breakdown_option = click.option(
    "--breakdown",
    "kinds",
    metavar="KIND,…",
    callback=_parse_kinds,
    help=f"Sum nats, tokens and bytes by bins, too: {', '.join(KIND_NAMES)}, or all.",
)


def breakdown_facts(breakdown: Breakdown, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return a breakdown as JSON facts: accuracies, and the sums of every bin of some kinds."""
    summary = breakdown.summary()
    bins = {kind: [one.facts() for one in breakdown.kinds[kind].of_bins()] for kind in kinds}
    return {**{key: summary[key] for key in ("top1_accuracy", "top5_accuracy", "calibration_error")}, "bins": bins}


def parse_protocol(options: dict[str, Any], config: Mapping[str, Any], command: str) -> Protocol:
    """Return the protocol that the options name. Raises UsageError for an option that the protocol does not read."""
    from pgolf_post.families import train_seq_len
    from pgolf_post.score.protocols import make_protocol

    kind = options["protocol"]
    given = {key: options[key] for key in ("split", "seq_len", "max_tokens", "tail", "precision")}
    if kind == "ttt" and not options["ttt"]:
        raise click.UsageError("--protocol ttt needs --ttt PRESET or METHOD, for example --ttt record-1855")
    if kind != "ttt" and (options["ttt"] or options["overrides"]):
        raise click.UsageError("--ttt and --set belong to --protocol ttt")
    if kind == "plain" and options["stride"]:
        raise click.UsageError("--stride belongs to --protocol sliding or ttt")
    if kind != "plain":
        given["stride"] = options["stride"]
    return make_protocol(kind, given, train_seq_len(config), command, options["ttt"], options["overrides"])


@dataclass(frozen=True)
class Opened:
    """A checkpoint's view or an artifact, with the text it is scored on."""

    name: str
    config: Mapping[str, Any]
    data: DataFolder
    tensors: Mapping[str, Tensor]
    scored: View | Path  # what pgolf_post.score is called with
    decoded: DecodedArtifact | None = None

    def score(
        self,
        protocol: Protocol,
        fresh: bool = False,
        session: Session | None = None,
        pool: ModelPool | None = None,
        breakdown: bool = False,
    ) -> StoredScore:
        """Score it under a protocol, or find its score."""
        from pgolf_post.score.stage import score

        how: dict[str, Any] = {"fresh": fresh, "session": session, "pool": pool, "breakdown": breakdown}
        return score(self.scored, self.data, protocol, decoded=self.decoded, **how)


def open_scored(path: Path | None, weights: str | None, data_dir: Path | None, clock: PhaseTimes) -> Opened:
    """Open what is at a path, checkpoint or artifact, and count the seconds. Raises NotFoundError, MismatchError."""
    is_packed = path is not None and _is_artifact(path)
    return (_open_artifact if is_packed else _open_checkpoint)(path, weights, data_dir, clock)


def _is_artifact(path: Path) -> bool:
    """Return whether a path is an artifact or its folder. Raises MismatchError for a file that is something else."""
    from pgolf_post.cli.foreign_files import require_ours
    from pgolf_post.pack.artifact import find_artifact

    try:
        require_ours(find_artifact(path))
    except NotFoundError:
        return False
    return True


def _open_checkpoint(path: Path | None, weights: str | None, data_dir: Path | None, clock: PhaseTimes) -> Opened:
    with clock.phase("load"):
        checkpoint = find_checkpoint(path)
        view = load_view(checkpoint, weights)
        data = find_data(checkpoint, data_dir)
    return Opened(str(view), view.config, data, view.tensors, view)


def _open_artifact(path: Path | None, weights: str | None, data_dir: Path | None, clock: PhaseTimes) -> Opened:
    import torch

    from pgolf_post.checkpoint import Checkpoint
    from pgolf_post.data import DataFolder
    from pgolf_post.pack.artifact import find_artifact, read_artifact
    from pgolf_post.score.cached import require_tokenizer

    assert path is not None
    if weights:
        raise click.UsageError("--weights chooses a checkpoint's weights; an artifact has only one set")
    artifact = find_artifact(path)
    folder = artifact.parent.parent.parent.parent  # <checkpoint>/derived/artifact/<id>/artifact.pgolf
    is_at_home = (folder / "meta.json").is_file()
    if derived_folder() is not None:
        if not is_at_home:
            raise click.UsageError("--derived keeps the results of a checkpoint, and this artifact lies in none")
        home = find_checkpoint(folder)
        artifact, folder = home.path / artifact.relative_to(folder), home.path
    if data_dir is None and not is_at_home:
        raise NotFoundError(
            f"{artifact} does not lie in a checkpoint folder that names its data", hint="pass --data FOLDER"
        )
    with clock.phase("load"):
        data = DataFolder.open(data_dir) if data_dir else find_data(Checkpoint.open(folder), None)
    with clock.phase("decompress"):
        decoded = read_artifact(artifact)
    config = decoded.manifest["config"]
    require_tokenizer(config, data, str(artifact))
    tensors = {name: torch.from_numpy(array) for name, array in decoded.tensors.items()}
    return Opened(str(artifact), config, data, tensors, artifact, decoded)
