"""The checkpoint folder: the only state there is. Load strictly, save atomically, name by content.

    checkpoints/<run>/step_004988-warmdown_start/
        weights.safetensors    raw weights          config.json  what rebuilds the model, runtime graph state included
        ema.safetensors        float32 EMA          meta.json    written last: where it came from, what it measured
        swa.safetensors        running mean         derived/     what later stages made of it
        training.safetensors   optimizer state

One folder can hold up to three *views*: raw, EMA and running mean. A view's id is sha256(its tensors ‖ config), so that
nothing derived from one view is ever mistaken for another's, and a flipped bit is found on loading. Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pgolf_post.base.file_kinds import UNKNOWN, file_kind
from pgolf_post.base.paths import absent, followed
from pgolf_post.base.storage import atomic_folder, atomic_symlink, disk_errors, read_json, tensors_sha256, write_json
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError
from pgolf_post.families import ModelFamily, build_module, check_finite, check_tensors, get_family
from pgolf_post.settings import canonical_json

FORMAT_VERSION = 1
CHECKPOINT_ROOT = Path("checkpoints")
SMOKE_FOLDER = "smoke"  # in a checkpoint root: the root of smoke runs, with a ledger of its own
MAKE_ONE = "pgolf-post demo   (or: python -m trainer trainer/recipes/tiny_cpu.toml)"

ViewName = Literal["raw", "ema", "swa"]
VIEW_FILES: dict[ViewName, str] = {"raw": "weights.safetensors", "ema": "ema.safetensors", "swa": "swa.safetensors"}
TRAINING_FILE = "training.safetensors"
REQUIRED_KEYS: dict[str, dict[str, type]] = {
    "config.json": {"family": str, "model": dict, "graph": dict},
    "meta.json": {"id": str, "kind": str, "phase": str, "step": int, "views": dict},
}


@dataclass(frozen=True)
class View:
    """One set of weights of a checkpoint, verified and on the CPU."""

    checkpoint: Checkpoint
    name: ViewName
    id: str
    tensors: Mapping[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @cached_property
    def family(self) -> ModelFamily:
        """The model's family."""
        return get_family(self.config["family"])

    @cached_property
    def module(self) -> nn.Module:
        """The model without its weights, on the meta device: to be looked at, never loaded or changed."""
        return build_module(self.config)

    @property
    def train_seq_len(self) -> int:
        """The sequence length that the model was trained on."""
        return self.family.train_seq_len(self.module)

    def __str__(self) -> str:
        return f"{self.checkpoint.path} ({self.name} weights, id {self.id[:12]})"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder, its JSON read, its tensors not yet."""

    path: Path
    config: dict[str, Any]  # {format_version, family, model, graph, tokenizer, data}
    meta: dict[str, Any]  # {format_version, id, kind, phase, step, views: {name: {id, metric?}}, parents, …}

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read a folder's JSON. Raises NotFoundError, or DamagedFileError if the folder is incomplete."""
        path = followed(Path(path))
        if not path.is_dir():
            raise NotFoundError(f"no checkpoint folder at {path}", hint=MAKE_ONE)
        if not (path / "meta.json").is_file():
            raise DamagedFileError(
                f"{path} is not a complete checkpoint: it has no meta.json, which is written last",
                hint="pgolf-post checkpoint list",
            )
        checkpoint = cls(path, read_json(path / "config.json"), read_json(path / "meta.json"))
        for name, tree in (("config.json", checkpoint.config), ("meta.json", checkpoint.meta)):
            version = tree.get("format_version")
            if version != FORMAT_VERSION:
                raise DamagedFileError(
                    f"{path / name}: format_version {version!r}, this program reads {FORMAT_VERSION}"
                )
            wrong = [key for key, kind in REQUIRED_KEYS[name].items() if not isinstance(tree.get(key), kind)]
            if wrong:
                raise DamagedFileError(f"{path / name}: missing or of the wrong kind: {', '.join(map(repr, wrong))}")
        return checkpoint

    def view_name(self, weights: ViewName | None) -> ViewName:
        """Return the asked-for view, or by default EMA where the folder has it, else raw. Raises NotFoundError."""
        views = list(self.meta["views"])
        if weights is None:
            return "ema" if "ema" in views else "raw"
        if weights not in views:
            raise NotFoundError(f"{self.path} has no {weights!r} weights; it has {', '.join(views)}")
        return weights

    def view_id(self, weights: ViewName | None = None) -> str:
        """Return the recorded id of a view, without reading its tensors."""
        return str(self.meta["views"][self.view_name(weights)]["id"])

    def load(self, weights: ViewName | None = None) -> View:
        """Read and verify one view. Raises DamagedFileError (bytes), MismatchError (config), NumericsError (NaN)."""
        name = self.view_name(weights)
        path = self.path / VIEW_FILES[name]
        tensors = read_tensors(path)
        view = View(self, name, self.view_id(name), tensors)
        check_tensors(view.module, tensors, str(path))
        self.require_id(name, view_id(tensors, self.config))
        for tensor_name, tensor in tensors.items():
            check_finite(tensor_name, tensor, str(path))
        return view

    def require_id(self, name: ViewName, actual: str) -> None:
        """Raise DamagedFileError if a view's tensors and config do not hash to the recorded id."""
        recorded = self.view_id(name)
        if recorded != actual:
            path = self.path / VIEW_FILES[name]
            raise DamagedFileError(
                f"{path} or its config.json changed after saving: recorded id {recorded[:12]}, found {actual[:12]}",
                hint="use another checkpoint of the run: pgolf-post checkpoint list",
            )

    def derived(self, stage: str, derived_id: str) -> Path:
        """Return where a stage's result with this id lies."""
        return self.path / "derived" / stage / derived_id[:12]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises NotFoundError, or DamagedFileError if the file is truncated or malformed."""
    if not path.is_file():
        raise NotFoundError(absent(path))
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        kind = file_kind(path.read_bytes())
        if kind.name in ("safetensors", "empty", UNKNOWN.name):
            raise DamagedFileError(f"{path} is damaged: {error}", hint="pgolf-post checkpoint list") from None
        words = f"{path} is {kind.words}, where a safetensors file belongs"
        raise DamagedFileError(words, hint=kind.hint.format(path=path)) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; I/O failures surface as OSError so that atomic_folder reports them."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with disk_errors():
        save_file(contiguous, path)


def view_id(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Return sha256(tensors ‖ config), the id that everything derived from a view starts from."""
    return view_id_of(tensors_sha256(tensors), config)


def view_id_of(tensors_digest: str, config: Mapping[str, Any]) -> str:
    """Return the id of a view from its tensors' hex sha256."""
    return hashlib.sha256(tensors_digest.encode() + canonical_json(config)).hexdigest()


def save_checkpoint(
    path: Path,
    config: Mapping[str, Any],
    views: Mapping[ViewName, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    training: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Write a complete folder in one atomic step; `meta` needs at least kind, phase, step, parents.

        >>> pg.save_checkpoint(path, config, {"raw": model.state_dict()}, meta)

    Raises PgolfError if the folder exists or cannot be written, MismatchError if tensors and config disagree.
    """
    config = {"format_version": FORMAT_VERSION, **config}
    module = build_module(config)
    for name, tensors in views.items():
        check_tensors(module, tensors, f"{path.name}: {name}")
    view_meta: dict[str, dict[str, Any]] = {}
    with atomic_folder(path) as building:
        for name, tensors in views.items():
            write_tensors(building / VIEW_FILES[name], tensors)
            view_meta[name] = {"id": view_id(tensors, config), "metric": (metrics or {}).get(name)}
        if training is not None:
            write_tensors(building / TRAINING_FILE, training)
        write_json(building / "config.json", config)
        first_id = next(iter(view_meta.values()))["id"]
        identity = {"format_version": FORMAT_VERSION, "id": first_id, "created_unix": round(time.time(), 3)}
        write_json(building / "meta.json", {**identity, **meta, "views": view_meta})
    return Checkpoint.open(path)


def point_latest(root: Path, checkpoint: Checkpoint) -> None:
    """Make `<root>/latest` a link to this checkpoint."""
    atomic_symlink(root / "latest", checkpoint.path)


def list_checkpoints(root: Path = CHECKPOINT_ROOT) -> list[Checkpoint]:
    """Return every complete checkpoint folder under `root`, oldest first; incomplete and foreign ones are skipped.

    A run's folder can be a link. A folder that is reached in two ways is listed once, under its real name in `root`.
    Smoke runs are left out; the link to their latest checkpoint lies where a run's checkpoints would.
    """
    checkpoints: dict[Path, Checkpoint] = {}
    folders = [meta_path.parent for meta_path in root.glob("*/*/meta.json") if meta_path.parent.name[0] != "."]
    for folder in sorted(folders, key=lambda folder: (folder.parent.is_symlink(), folder)):
        if folder.parent.name == SMOKE_FOLDER and folder.is_symlink():
            continue
        try:
            checkpoints.setdefault(folder.resolve(), Checkpoint.open(folder))
        except PgolfError:
            continue
    return sorted(checkpoints.values(), key=lambda checkpoint: float(checkpoint.meta.get("created_unix", 0)))


def default_checkpoint(root: Path = CHECKPOINT_ROOT) -> Checkpoint:
    """Return the newest final checkpoint of a training run under `root`.

    Raises NotFoundError if there is none, DamagedFileError if a newer one cannot be read: an older run is taken only by
    its name.
    """
    finals = [c for c in list_checkpoints(root) if c.meta.get("kind") == "raw" and c.meta.get("phase") == "final"]
    if not finals:
        _refuse_newer_damage(root, 0.0, "copy that folder again, or name another one: pgolf-post checkpoint list")
        raise NotFoundError(f"no final checkpoint of a training run under {root}/", hint=MAKE_ONE)
    newest = finals[-1]
    _refuse_newer_damage(root, float(newest.meta.get("created_unix", 0)), f"an older one by its name: {newest.path}")
    return newest


def _refuse_newer_damage(root: Path, created_unix: float, hint: str) -> None:
    """Raise DamagedFileError if a final checkpoint that cannot be read was written after this moment."""
    for folder in root.glob("*/step_*-final"):
        try:
            Checkpoint.open(folder)
        except PgolfError as error:
            written = [path.stat().st_mtime for path in (folder / "meta.json", folder) if path.exists()]
            if written and written[0] >= created_unix:
                raise DamagedFileError(f"the newest final checkpoint cannot be read: {error}", hint=hint) from error


def run_checkpoints(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Return all checkpoints of a checkpoint's training run (or import), itself included, in step order."""
    named = {meta_path.parent for meta_path in checkpoint.path.parent.glob("step_*/meta.json")}
    others = [path for path in named if path.resolve() != checkpoint.path.resolve()]
    saved = [checkpoint, *map(Checkpoint.open, others)]  # itself whatever its folder is called
    siblings = [sibling for sibling in saved if sibling.meta.get("kind") in ("raw", "imported")]
    return sorted(siblings, key=lambda sibling: int(sibling.meta["step"]))


def config_differences(checkpoints: Sequence[Checkpoint]) -> dict[str, dict[str, Any]]:
    """Return the dotted config keys in which checkpoints differ, each with every folder's value."""
    flats = {str(c.path): flat_config(c.config) for c in checkpoints}
    keys = sorted({key for flat in flats.values() for key in flat})
    values = {key: {path: flat.get(key) for path, flat in flats.items()} for key in keys}
    return {key: named for key, named in values.items() if any(v != next(iter(named.values())) for v in named.values())}


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a complete config by dotted key."""
    return _flatten(complete_config(config))


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the family's defaults filled in: one written before a setting existed compares equal."""
    return {**config, "model": get_family(config["family"]).complete(config["model"])}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
