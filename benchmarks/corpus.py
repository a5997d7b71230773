"""The texts that the pages of results name, from what a reader has: `python -m benchmarks.corpus [CLONE …]`.

With clones of repositories it makes the prose corpus: one document for each .md, .rst or .txt file of them. Without, it
takes the running Python's own standard library, which needs no download and is another text. Either way it writes the
two data folders of the commands in docs/results/: corpus_sp1024 holds both splits with a byte sidecar, and shared_val
the validation split alone, as a token shard that was adopted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from pgolf_post.base.command_line import run_command
from pgolf_post.base.progress import print_table, say
from pgolf_post.data.adopt import adopt
from pgolf_post.data.build import BuildSettings, build
from pgolf_post.data.documents import Document, text_key
from pgolf_post.data.folder import TOKENIZER_NAME, DataFolder
from pgolf_post.data.report import SPLIT_HEADER, split_rows
from pgolf_post.data.shard_names import find_shards
from pgolf_post.data.stdlib_corpus import stdlib_documents, stdlib_source
from pgolf_post.errors import NotFoundError, PgolfError

ENDINGS = {".md", ".rst", ".txt"}
LEAST_BYTES = 600  # shorter files hold templates and pointers, not prose
NAME = "corpus_sp1024"


def prose_documents(clones: Sequence[Path]) -> Iterator[Document]:
    """Yield the prose of some folders, each text once. Raises NotFoundError for a folder without any."""
    seen = set()
    for clone in clones:
        paths = prose_files(clone)
        if not paths:
            raise NotFoundError(f"{clone} has no {', '.join(sorted(ENDINGS))} file", hint="name the folder of a clone")
        for path in paths:
            text = read_text(path)
            key = text_key(text)
            if len(text.encode("utf-8")) >= LEAST_BYTES and key not in seen:
                seen.add(key)
                yield Document(f"{clone.resolve().name}/{path.relative_to(clone).as_posix()}", text)


def prose_files(clone: Path) -> list[Path]:
    """Return a clone's files of prose in the order of their paths, without those of git itself."""
    files = (path for path in clone.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in files if ".git" not in path.relative_to(clone).parts)


def read_text(path: Path) -> str:
    """Return a file's text; none, said aloud, if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        say(f"left out, not UTF-8: {path}")
        return ""


def make_corpus(clones: Sequence[Path], root: Path, vocab_size: int = 1024) -> tuple[DataFolder, DataFolder]:
    """Write both data folders below `root`. Raises PgolfError if one of them exists, NotFoundError as above."""
    val_fraction = 0.04 if clones else 0.08  # the standard library is a seventh of the prose
    settings = BuildSettings(name=NAME, vocab_size=vocab_size, val_fraction=val_fraction, byte_sidecar=True)
    corpus, shared_val = root / NAME, root / "shared_val"
    if there := [str(folder) for folder in (corpus, shared_val) if folder.exists()]:
        raise PgolfError(f"already there: {', '.join(there)}", hint="remove it, or write elsewhere with --root FOLDER")
    documents = prose_documents(clones) if clones else stdlib_documents()
    source = {"clones": [clone.resolve().name for clone in clones]} if clones else stdlib_source()
    whole = build(documents, corpus, settings, source=source)
    return whole, adopt_validation(whole, shared_val)


def adopt_validation(whole: DataFolder, out: Path) -> DataFolder:
    """Make a data folder of another's validation split alone, hard-linked where the disk allows."""
    shards = find_shards(whole.path)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        for name in (*shards.val, *shards.val_bytes):
            (Path(temporary) / name).symlink_to((whole.path / name).resolve())  # adopt links what it means
        return adopt(Path(temporary), whole.path / TOKENIZER_NAME, out, out.name)


@click.command()
@click.argument("clones", metavar="[CLONE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--root", default=Path("data"), show_default=True, type=click.Path(path_type=Path), help="Folder to write into."
)
@click.option("--vocab-size", default=1024, show_default=True, help="Pieces of the tokenizer to train.")
def command(clones: tuple[Path, ...], root: Path, vocab_size: int) -> None:
    """Write corpus_sp1024 and shared_val from clones of repositories, or from Python's standard library."""
    for folder in make_corpus(clones, root, vocab_size):
        print_table(str(folder.path), SPLIT_HEADER, split_rows(folder))
    say(f"next: python -m trainer trainer/recipes/small_cpu.toml --set data.dir={root / NAME}")


if __name__ == "__main__":
    run_command(command)
