"""Shared by commands: finding the checkpoint, the data and the statistics, and options made from settings classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click

from pgolf_post.base.numbers import FiniteFloat
from pgolf_post.base.progress import say, tables_alone
from pgolf_post.base.threads import MOST_THREADS, use_threads
from pgolf_post.errors import MismatchError, NotFoundError
from pgolf_post.settings import Settings, parse_settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pgolf_post.calibrate import Stats
    from pgolf_post.checkpoint import Checkpoint, View
    from pgolf_post.data import DataFolder

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Settings)

DERIVED = "pgolf_post.derived"  # key of the command's context
VIEWS = ("ema", "raw", "swa")

checkpoint_argument = click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
weights_option = click.option(
    "--weights",
    type=click.Choice(VIEWS),
    help="Weights to use.  [default: ema where the folder has it, else raw]",
)
derived_option = click.option(
    "--derived",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    expose_value=False,
    callback=lambda context, _option, folder: context.meta.update({DERIVED: folder}),
    help="Keep and find results under this folder instead of in the checkpoint's, which may then be read-only.",
)
data_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path),
    help="Data folder.  [default: that of the training run]",
)
fresh_option = click.option("--fresh", is_flag=True, help="Recompute even if the result is cached.")
allow_stale_option = click.option(
    "--allow-stale",
    metavar="HESSIANS",
    help="Use these statistics (a folder or an id) of other weights, after a probe of how far off they are; recorded.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1, max=MOST_THREADS),
    expose_value=False,
    is_eager=True,
    callback=lambda _context, _option, count: use_threads(count) if count else None,
    help="Threads to compute with.  [default: the CPUs that this process may use]",
)
quiet_option = click.option(
    "--quiet",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=lambda context, _option, quiet: context.with_resource(tables_alone()) if quiet else None,
    help="Print tables and errors alone: no progress, no remarks.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")

dollars_option = click.option(
    "--dollars-per-hour", type=FiniteFloat(min=0), help="Cost of this machine in dollars per hour, for the ledger."
)


class SettingsOption(click.Option):
    """An option that stands for a field of a settings class."""

    def __init__(self, *names: Any, settings_field: FieldInfo, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.settings_field = settings_field


class SettingsChoice(click.Choice):
    """A choice among a field's literals. Other text is passed on, for the settings class to refuse with its reason."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


def settings_options(cls: type[Settings], flags: dict[str, str]) -> Callable[[F], F]:
    """Return a decorator that adds an option for each given field of a settings class.

    `flags` maps a field's name to its flag, or to several with spaces between them. Help and default are the class's.
    """

    def decorate(function: F) -> F:
        for field_name, flag in reversed(flags.items()):
            function = _option_of(field_name, cls.model_fields[field_name], flag)(function)
        return function

    return decorate


def _option_of(name: str, field: FieldInfo, flag: str) -> Callable[[F], F]:
    """Return the decorator that adds one field's option; a bool is a pair of flags, and what is not given is None."""
    is_switch = field.annotation is bool
    names = [f"{flag}/--no-{flag.removeprefix('--')}"] if is_switch else flag.split()
    kind = None if is_switch else _click_type(field.annotation)
    return click.option(
        *names, name, cls=SettingsOption, settings_field=field, type=kind, default=None, help=_help_of(field)
    )


def _help_of(field: FieldInfo) -> str:
    """Return a field's description as a sentence, with its default unless that is None."""
    text = (field.description or "").strip().rstrip(".")
    text = text[:1].upper() + text[1:] + "."
    if field.default_factory:
        return text
    shown = {True: "on", False: "off"}[field.default] if field.annotation is bool else field.default
    return text if shown is None else f"{text}  [default: {shown}]"


def _click_type(annotation: object) -> click.ParamType | type:
    """Return what reads a flag: a choice for a Literal, else int, float or str (ranges are the class's to check)."""
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    if literals:
        return SettingsChoice([str(value) for value in get_args(literals[0])])
    return next(kind for kind in (int, float, str) if annotation in (kind, kind | None))


def given_settings(cls: type[S], values: dict[str, Any], command: str) -> S:
    """Return settings from the options that were given. Raises SettingsError naming the option and its range."""
    return parse_settings(cls, {key: value for key, value in values.items() if value is not None}, command)


def find_checkpoint(path: Path | None) -> Checkpoint:
    """Return the named checkpoint, or the newest final one of a training run, and print which.

    With --derived it is the folder that keeps its results (see `pgolf_post.elsewhere`).
    """
    from pgolf_post.checkpoint import Checkpoint, default_checkpoint
    from pgolf_post.elsewhere import results_in

    checkpoint = default_checkpoint() if path is None else Checkpoint.open(path)
    if path is None:
        say(f"checkpoint: {checkpoint.path} (the newest final one)")
    root = derived_folder()
    return checkpoint if root is None else results_in(checkpoint, root)


def derived_folder() -> Path | None:
    """Return the folder that --derived names."""
    context = click.get_current_context(silent=True)
    return context.meta.get(DERIVED) if context else None


def find_data(checkpoint: Checkpoint, override: Path | None) -> DataFolder:
    """Return the data a checkpoint was trained on, or a named folder with the same tokenizer.

    Raises NotFoundError if the recorded folder is gone, MismatchError if it changed or has another tokenizer.
    """
    from pgolf_post.data import DataFolder
    from pgolf_post.score.cached import require_tokenizer

    recorded = checkpoint.meta.get("data_dir")
    if override is None and (recorded is None or not Path(recorded).is_dir()):
        raise NotFoundError(f"the data folder of {checkpoint.path} ({recorded}) is not here", hint="pass --data FOLDER")
    data = DataFolder.open(override or Path(str(recorded)))
    require_tokenizer(checkpoint.config, data, str(checkpoint.path))
    if override is None and data.manifest_sha256 != checkpoint.config["data"]["manifest_sha256"]:
        raise MismatchError(
            f"{data.path} was rebuilt since {checkpoint.path} was trained on it (its manifest differs)",
            hint=f"if that is the text you mean, say so: --data {data.path}",
        )
    return data


def stats_folder(view: View, stats: Stats) -> Path:
    """Return the folder of the statistics that a view is quantized with."""
    return Path(stats.stale["stats"]) if stats.stale else view.checkpoint.derived("stats", stats.id)


def split_view(text: str) -> tuple[Path, Any]:
    """Split `PATH[:VIEW]`; the view is None where the text ends in none of ema, raw, swa."""
    head, colon, view = text.rpartition(":")
    return (Path(head), view) if colon and view in VIEWS else (Path(text), None)


def load_view(checkpoint: Checkpoint, weights: Any) -> View:
    """Load and verify the wanted weights, and print which."""
    view = checkpoint.load(weights)
    say(f"weights: {view}")
    return view
