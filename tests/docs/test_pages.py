"""What the pages name exists: commands, options, modules, files. A page of results opens with its answer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
import pytest

import pgolf_post
from pgolf_post.cli import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"python -m ((?:benchmarks|trainer|pgolf_post)[\w.]*)")
FILE = re.compile(r"`((?:pgolf_post|trainer|tests|benchmarks|examples|sweeps|docs)/[\w./]+\.(?:py|toml|md))`")


def load_site_pages() -> object:
    """Import docs/site_pages.py as MkDocs does: by its path."""
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_lines(page: str) -> list[str]:
    """Return every `pgolf-post …` of a page, in blocks and in lines, without comments and what follows a pipe."""
    code = "\n".join(FENCED.findall(page)).replace("\\\n", " ").splitlines()
    code += INLINE.findall(FENCED.sub("", page))
    lines = [line.partition("post ")[2] for line in code if re.match(r"(torchrun .*-m pgolf_|pgolf-)post ", line)]
    return [re.split(r"\s#|\s\||\s;", line)[0].strip() for line in lines]


def unknown_words(line: str) -> list[str]:
    """Return what a command line has that the command does not: its name, or options."""
    command: click.Command = cli
    words = line.split()
    while isinstance(command, click.Group) and words:
        if words[0].startswith("-"):  # an option of the group, with its value
            words = words[2:]
            continue
        below = command.get_command(click.Context(command), words[0])
        if below is None:
            return [] if "|" in words[0] or "…" in words[0] else [words[0]]
        command, words = below, words[1:]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    words = words[: words.index("--")] if "--" in words else words  # after a bare -- come another program's arguments
    asked = [word.strip("[]").split("=")[0] for word in words if word.strip("[]").startswith("--")]
    return [word for word in asked if word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_and_option_on_a_page_exists(page: Path) -> None:
    wrong = {line: words for line in command_lines(page.read_text("utf-8")) if (words := unknown_words(line))}
    assert wrong == {}


def test_a_wrong_command_and_a_wrong_option_are_found() -> None:
    assert unknown_words("requnt --eval") == ["requnt"]
    assert unknown_words("sweep run SPEC --plotz") == ["--plotz"]
    assert unknown_words("--family FILE.py:NAME fit CKPT --budget 3") == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_file_on_a_page_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    modules = {name.rstrip(".") for name in MODULE.findall(text)}
    assert [name for name in modules if not list(ROOT.glob(f"{name.replace('.', '/')}*"))] == []
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", sorted((DOCS / "results").glob("*.md")), ids=lambda path: path.stem)
def test_a_page_of_results_opens_with_a_sentence_a_table_and_its_command(page: Path) -> None:
    if page.stem == "index":
        return
    opening = page.read_text("utf-8").split("\n## ")[0]
    title, sentence, table = opening.split("\n\n")[:3]
    assert title.startswith("# ")
    assert sentence.endswith(".")
    assert table.startswith("|")
    assert FENCED.search(opening)
    assert "Model:" in opening or "Text:" in opening


def test_every_documented_module_is_on_one_page_of_the_api() -> None:
    site = load_site_pages()
    listed = [name for modules in site.api_pages().values() for name in modules]  # type: ignore[attr-defined]
    assert len(listed) == len(set(listed))
    assert {"pgolf_post.checkpoint", "pgolf_post.pack.coder.rans", "trainer.optim.muon"} <= set(listed)


def test_the_index_of_the_api_has_a_row_for_every_page_and_every_function() -> None:
    index, pages = (DOCS / "api" / "index.md").read_text("utf-8"), load_site_pages().api_pages()  # type: ignore[attr-defined]
    assert [page for page in pages if f"]({page}.md)" not in index] == []
    functions = [name for name in pgolf_post.__all__ if name.islower()]
    assert len(functions) > 15
    assert [name for name in functions if f"| `pg.{name}(" not in index and f", `pg.{name}(" not in index] == []


def test_help_texts_keep_their_examples_as_code() -> None:
    site = load_site_pages()
    fenced = site.examples_fenced("Do it.\n\n    \b\n    pgolf-post a\n    pgolf-post b\n\n    Then rest.")  # type: ignore[attr-defined]
    assert fenced == "Do it.\n\n```text\npgolf-post a\npgolf-post b\n```\n\nThen rest."
