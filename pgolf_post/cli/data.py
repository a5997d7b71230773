"""`pgolf-post data`: build, download or check a data folder."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgolf_post.cli.common import json_option

if TYPE_CHECKING:
    from pgolf_post.data.folder import DataFolder

DATA_ROOT = Path("data")


@click.group(name="data")
def command() -> None:
    """Data folders: one tokenizer, the token shards made with it, and a manifest that names every file's sha256."""


@command.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--stdlib", is_flag=True, help="Use the running Python's standard library as the corpus (about 10 MB).")
@click.option("--vocab-size", type=int, help="Pieces of the tokenizer to train.  [default: 1024; at most 65536]")
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
@click.option(
    "--val-fraction", type=float, help="Fraction of documents that the hash split sends to val.  [default: 0.04]"
)
@click.option("--byte-sidecar", is_flag=True, help="Write the original bytes behind each validation token.")
@click.option("--shard-tokens", type=int, help="Tokens per shard.  [default: 100000000]")
@click.option("--sample-bytes", type=int, help="Text that the tokenizer is trained on.  [default: 8000000]")
@click.option("--threads", type=int, help="Threads to tokenize with; no effect on the result.  [default: 2]")
@click.option("--name", help="Name in the manifest.  [default: stdlib, or the first INPUT's name]")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.  [default: data/NAME]")
@click.option("--force", is_flag=True, help="Replace the data folder at --out.")
@json_option
def build(
    inputs: tuple[Path, ...],
    stdlib: bool,
    vocab_size: int | None,
    tokenizer: Path | None,
    val_inputs: tuple[Path, ...],
    val_fraction: float | None,
    byte_sidecar: bool,
    shard_tokens: int | None,
    sample_bytes: int | None,
    threads: int | None,
    name: str | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn documents into a data folder: train a tokenizer, tokenize, write shards and manifest.

    INPUT is text files (one document each), .jsonl or .jsonl.zst (one {"text": ...} a line, optionally with "source"
    and "path"). A document goes to val by the hash of its source and path, or of its text. Tokenizers trained here
    lose nothing: any UTF-8 text decodes to itself.

    \b
    pgolf-post data build --stdlib
    pgolf-post data build docs.jsonl.zst --vocab-size 8192 --name docs
    pgolf-post data build train.jsonl --val val.jsonl --tokenizer fineweb_1024_bpe.model --byte-sidecar
    """
    from pgolf_post.data import build as builder
    from pgolf_post.settings import parse_settings

    _refuse_usage(inputs, stdlib, vocab_size, tokenizer, val_inputs, val_fraction)
    name = name or ("stdlib" if stdlib else inputs[0].name.split(".")[0] or "data")
    options = {
        "name": name,
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
        "byte_sidecar": byte_sidecar,
        "tokens_per_shard": shard_tokens,
        "tokenizer_sample_bytes": sample_bytes,
        "num_threads": threads,
    }
    given = {key: value for key, value in options.items() if value is not None}
    settings = parse_settings(builder.BuildSettings, given, "data build")
    out = out or DATA_ROOT / name
    builder.refuse_destination(out, force)  # before the inputs are read
    started = time.monotonic()
    folder = builder.build(
        **_corpus(inputs, stdlib, val_inputs), out=out, settings=settings, tokenizer_path=tokenizer, force=force
    )
    _report(folder, time.monotonic() - started, as_json)


def _refuse_usage(
    inputs: tuple[Path, ...],
    stdlib: bool,
    vocab_size: int | None,
    tokenizer: Path | None,
    val_inputs: tuple[Path, ...],
    val_fraction: float | None,
) -> None:
    """Options that contradict each other."""
    if stdlib == bool(inputs):
        raise click.UsageError("name INPUT files or --stdlib, one of the two")
    if tokenizer is not None and vocab_size is not None:
        raise click.UsageError("--tokenizer brings its own vocabulary; leave out --vocab-size")
    if val_inputs and val_fraction is not None:
        raise click.UsageError("--val names the validation documents; leave out --val-fraction")


def _corpus(inputs: tuple[Path, ...], stdlib: bool, val_inputs: tuple[Path, ...]) -> dict[str, Any]:
    """The arguments of build() that say which documents: documents, val_documents, source."""
    from pgolf_post.data.build import describe_inputs
    from pgolf_post.data.documents import read_documents
    from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source

    documents = stdlib_documents() if stdlib else read_documents(inputs)
    source: dict[str, Any] = {**stdlib_source()} if stdlib else {"inputs": describe_inputs(inputs)}
    if not val_inputs:
        return {"documents": documents, "source": source}
    source["val_inputs"] = describe_inputs(val_inputs)
    return {"documents": documents, "val_documents": read_documents(val_inputs), "source": source}


@command.command()
@click.option(
    "--variant",
    default="sp1024",
    show_default=True,
    help="sp1024, sp4096, sp8192, sp8192_lossless_caps_caseops_v1_reserved, or what --repository publishes.",
)
@click.option(
    "--train-shards",
    type=int,
    default=1,
    show_default=True,
    help="Shards of 100M tokens, about 200 MB each; 0 for none.",
)
@click.option("--repository", help="Dataset repository, OWNER/NAME.  [default: the variant's known publisher]")
@click.option("--revision", default="main", show_default=True, help="Branch, tag or commit of the repository.")
@click.option("--subfolder", default="datasets", show_default=True, help="Where in the repository manifest.json lies.")
@click.option("--endpoint", default="https://huggingface.co", show_default=True, help="The hub's address.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.  [default: data/VARIANT]")
@click.option("--force", is_flag=True, help="Replace the files of another data folder at --out.")
@json_option
def download(out: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Fetch the challenge's published tokens and tokenizer from the Hugging Face hub.

    Validation comes whole (80 to 125 MB), of train the first --train-shards. Every file is checked against the
    checksum that the hub states. An interrupted download goes on where it stopped when the command is run again, and
    a larger --train-shards adds to what is there. sp1024 is in the challenge's own repository; for the others a
    participant's is used.

    \b
    pgolf-post data download
    pgolf-post data download --variant sp8192 --train-shards 10
    """
    from pgolf_post.data import download as downloader
    from pgolf_post.settings import parse_settings

    settings = parse_settings(downloader.DownloadSettings, options, "data download")
    started = time.monotonic()
    folder = downloader.download(out or DATA_ROOT / settings.variant, settings, force=force)
    _report(folder, time.monotonic() - started, as_json)


def _report(folder: DataFolder, seconds: float, as_json: bool) -> None:
    """What came out: for people a table, for machines one object."""
    from pgolf_post.base.progress import print_json, print_table, say

    splits = folder.manifest["splits"]
    counts = {split: {key: entry[key] for key in _COUNTS} for split, entry in splits.items()}
    rows = [_count_row(split, entry) for split, entry in counts.items()]
    title = f"{folder.path}: {folder.vocab_size} pieces, {seconds:.1f} s"
    print_table(title, ["split", "documents", "bytes", "tokens", "bytes/token"], rows)
    say(f"next: pgolf-post data check {shlex.quote(str(folder.path))}")
    if as_json:
        answer = {"path": str(folder.path), "name": folder.name, "manifest_sha256": folder.manifest_sha256}
        print_json({**answer, "vocab_size": folder.vocab_size, "splits": counts, "seconds": round(seconds, 3)})


@command.command()
@click.argument("shard_folder", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="The sentencepiece .model they use.")
@click.option("--name", help="Name in the manifest.  [default: SHARD_FOLDER's name]")
@click.option("--out", type=click.Path(path_type=Path), help="The folder to write.  [default: data/NAME]")
@json_option
def adopt(shard_folder: Path, tokenizer: Path, name: str | None, out: Path | None, as_json: bool) -> None:
    """Make a data folder over the fineweb_*.bin files that another program left in SHARD_FOLDER.

    \b
    pgolf-post data adopt data/datasets/fineweb10B_sp1024 --tokenizer data/tokenizers/fineweb_1024_bpe.model
    """
    from pgolf_post.data.adopt import adopt as adopt_shards

    name = name or shard_folder.resolve().name
    started = time.monotonic()
    _report(adopt_shards(shard_folder, tokenizer, out or DATA_ROOT / name, name), time.monotonic() - started, as_json)


_COUNTS = ("num_documents", "num_bytes", "num_tokens")


def _count_row(split: str, entry: dict[str, int]) -> list[str]:
    ratio = f"{entry['num_bytes'] / entry['num_tokens']:.3f}" if entry["num_tokens"] else "-"
    return [split, *(f"{entry[key]:,}" for key in _COUNTS), ratio]


@command.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sample-documents", default=64, show_default=True, help="Documents to decode against the byte table.")
@json_option
def check(folder: Path, sample_documents: int, as_json: bool) -> None:
    """Recompute everything that FOLDER's manifest states: checksums, lengths, ids, documents, bytes.

    Validation splits of the challenge are recognised, and their bytes compared with the known 151.08 MB.
    Exit code 4 if anything does not hold.
    """
    from pgolf_post.base.progress import print_json, print_table
    from pgolf_post.data.check import check as check_folder
    from pgolf_post.data.folder import DataFolder
    from pgolf_post.errors import VerificationError

    rows = check_folder(DataFolder.open(folder), sample_documents)
    table = [[row.name, "ok" if row.passed else "FAILED", row.evidence] for row in rows]
    print_table(str(folder), ["check", "result", "evidence"], table)
    failed = [row for row in rows if not row.passed]
    if as_json:
        checks = [{"name": row.name, "passed": row.passed, "evidence": row.evidence} for row in rows]
        print_json({"path": str(folder), "passed": not failed, "checks": checks})
    if failed:
        listed = "; ".join(f"{row.name}: {row.evidence}" for row in failed)
        raise VerificationError(
            f"{folder}: {len(failed)} of {len(rows)} checks failed: {listed}",
            hint="fetch or build the folder again; scores made on it cannot be trusted",
        )
