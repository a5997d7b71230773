"""`pgolf-post data`: build, download, adopt or check a data folder."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import given_settings, json_option, quiet_option, settings_options
from pgolf_post.data.settings import BuildSettings, DownloadSettings
from pgolf_post.errors import VerificationError

if TYPE_CHECKING:
    from pgolf_post.data.folder import DataFolder

DATA_ROOT = Path("data")
BUILD_FLAGS = {
    "vocab_size": "--vocab-size",
    "val_fraction": "--val-fraction",
    "byte_sidecar": "--byte-sidecar",
    "tokens_per_shard": "--shard-tokens",
    "tokenizer_sample_bytes": "--sample-bytes",
    "num_threads": "--threads",
}
DOWNLOAD_FLAGS = {
    "variant": "--variant",
    "train_shards": "--train-shards",
    "repository": "--repository",
    "revision": "--revision",
    "subfolder": "--subfolder",
    "endpoint": "--endpoint",
}


@click.group("data")
def command() -> None:
    """Data folders: one tokenizer, the token shards made with it, and a manifest that names every file's sha256."""


@command.command("build")
@click.argument("inputs", metavar="INPUT...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--stdlib", is_flag=True, help="Use the running Python's standard library as the corpus (about 10 MB).")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Use this sentencepiece .model instead of training one."
)
@click.option(
    "--val",
    "val_inputs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Take validation documents from this file (repeatable) instead of splitting INPUT.",
)
@settings_options(BuildSettings, BUILD_FLAGS)
@click.option("--name", help="Name in the manifest.  [default: stdlib, or the first INPUT's name]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: data/NAME]")
@click.option("--force", is_flag=True, help="Replace the data folder at --out.")
@quiet_option
@json_option
def build_command(
    inputs: tuple[Path, ...],
    stdlib: bool,
    tokenizer: Path | None,
    val_inputs: tuple[Path, ...],
    name: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn documents into a data folder: train a tokenizer, tokenize, write shards and manifest.

    INPUT is text files (one document each), JSON lines (one {"text": ...} a line, optionally with "source" and "path")
    or JSON arrays of such objects, plain or compressed (gzip, xz, bzip2, zstd). A document goes to the validation
    split by the hash of its source and path, or of its text. Tokenizers trained here lose nothing: any UTF-8 text
    decodes to itself.

    \b
    pgolf-post data build --stdlib
    pgolf-post data build docs.jsonl.zst --vocab-size 8192 --name docs
    pgolf-post data build train.jsonl --val val.jsonl --tokenizer fineweb_1024_bpe.model --byte-sidecar
    """
    from pgolf_post.base.paths import require_folder_name
    from pgolf_post.data.build import build, refuse_destination

    _refuse_usage(inputs, stdlib, tokenizer, val_inputs, options)
    name = name or ("stdlib" if stdlib else inputs[0].name.split(".")[0] or "data")
    settings = given_settings(BuildSettings, {"name": name, **options}, "data build")
    out = out or DATA_ROOT / require_folder_name(name)
    refuse_destination(out, force)  # before the inputs are read
    started = time.monotonic()
    corpus = _corpus(inputs, stdlib, val_inputs)
    folder = build(**corpus, out=out, settings=settings, tokenizer_path=tokenizer, force=force)
    _report(folder, time.monotonic() - started, as_json)


def _refuse_usage(
    inputs: tuple[Path, ...],
    stdlib: bool,
    tokenizer: Path | None,
    val_inputs: tuple[Path, ...],
    options: dict[str, Any],
) -> None:
    """Raise UsageError for options that contradict each other."""
    if stdlib == bool(inputs):
        raise click.UsageError("name INPUT files or --stdlib, one of the two")
    if tokenizer is not None and options["vocab_size"] is not None:
        raise click.UsageError("--tokenizer brings its own vocabulary; leave out --vocab-size")
    if val_inputs and options["val_fraction"] is not None:
        raise click.UsageError("--val names the validation documents; leave out --val-fraction")


def _corpus(inputs: tuple[Path, ...], stdlib: bool, val_inputs: tuple[Path, ...]) -> dict[str, Any]:
    """Return the arguments of build() that say which documents: documents, val_documents, source."""
    from pgolf_post.data.build import describe_inputs
    from pgolf_post.data.documents import read_documents
    from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source

    documents = stdlib_documents() if stdlib else read_documents(inputs)
    source: dict[str, Any] = {**stdlib_source()} if stdlib else {"inputs": describe_inputs(inputs)}
    if not val_inputs:
        return {"documents": documents, "source": source}
    source["val_inputs"] = describe_inputs(val_inputs)
    return {"documents": documents, "val_documents": read_documents(val_inputs), "source": source}


def _report(folder: DataFolder, seconds: float, as_json: bool) -> None:
    """Print what was made: a table for people, one object for machines."""
    from pgolf_post.data.report import SPLIT_HEADER, build_answer, split_rows

    print_table(f"{folder.path}: {folder.vocab_size} pieces, {seconds:.1f} s", SPLIT_HEADER, split_rows(folder))
    say(f"next: pgolf-post data check {shlex.quote(str(folder.path))}")
    if as_json:
        print_json(build_answer(folder, seconds))


@command.command("download")
@settings_options(DownloadSettings, DOWNLOAD_FLAGS)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: data/VARIANT]")
@click.option("--force", is_flag=True, help="Replace the files of another data folder at --out.")
@quiet_option
@json_option
def download_command(out: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Fetch the challenge's published tokens and tokenizer from the Hugging Face hub.

    The validation split is fetched whole (80 to 125 MB), of the training split the first --train-shards. Every file is
    checked against the checksum that the hub states. An interrupted download goes on where it stopped when the command
    is run again, and a larger --train-shards adds to what is there. sp1024 is in the challenge's own repository; the
    others are in participants' repositories.

    \b
    pgolf-post data download
    pgolf-post data download --variant sp8192 --train-shards 10
    """
    from pgolf_post.data.download import download

    settings = given_settings(DownloadSettings, options, "data download")
    started = time.monotonic()
    folder = download(out or DATA_ROOT / settings.variant, settings, force=force)
    _report(folder, time.monotonic() - started, as_json)


@command.command("adopt")
@click.argument("shard_folder", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="The sentencepiece .model that the shards were made with.",
)
@click.option("--name", help="Name in the manifest.  [default: SHARD_FOLDER's name]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: data/NAME]")
@quiet_option
@json_option
def adopt_command(shard_folder: Path, tokenizer: Path, name: str | None, out: Path | None, as_json: bool) -> None:
    """Make a data folder over the fineweb_*.bin files that another program left in SHARD_FOLDER.

    \b
    pgolf-post data adopt data/datasets/fineweb10B_sp1024 --tokenizer data/tokenizers/fineweb_1024_bpe.model
    """
    from pgolf_post.base.paths import require_folder_name
    from pgolf_post.data.adopt import adopt

    name = name or shard_folder.resolve().name
    started = time.monotonic()
    folder = adopt(shard_folder, tokenizer, out or DATA_ROOT / require_folder_name(name), name)
    _report(folder, time.monotonic() - started, as_json)


@command.command("check")
@click.argument("path", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--sample-documents",
    default=64,
    show_default=True,
    help="Number of documents to decode and compare with the byte table.",
)
@quiet_option
@json_option
def check_command(path: Path, sample_documents: int, as_json: bool) -> None:
    """Recompute everything that FOLDER's manifest states: checksums, lengths, ids, documents, bytes.

    Validation splits of the challenge are recognised, and their bytes compared with the known 151.08 MB.
    Exit code 4 if anything does not hold.
    """
    from pgolf_post.data.check import check
    from pgolf_post.data.folder import DataFolder
    from pgolf_post.data.report import CHECK_HEADER, check_answer, check_rows

    folder = DataFolder.open(path)
    checks = check(folder, sample_documents)
    print_table(str(path), CHECK_HEADER, check_rows(checks))
    if as_json:
        print_json(check_answer(folder, checks))
    failed = [f"{row.name}: {row.evidence}" for row in checks if not row.passed]
    if failed:
        raise VerificationError(
            f"{path}: {len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}",
            hint="fetch or build the folder again; scores made on it cannot be trusted",
        )
