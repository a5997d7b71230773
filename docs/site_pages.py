"""What the documentation site makes from the code: a page of API for each package, and help texts as Markdown.

MkDocs calls the `on_…` functions (mkdocs.yml, hooks). The pages exist only during a build, so a module that is moved or
added needs no edit here. `cli` and `trainer` are the command lines as mkdocs-click reads them (docs/commands.md).
"""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
PACKAGES = ("pgolf_post", "trainer")
PIPELINE = ["base", "data", "importers", "ledger", "calibrate", "average", "quantize", "pack", "score", "fit", "sweep"]


def module_name(path: Path) -> str:
    """Return the dotted name of a module's file; a package's is its folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def pipeline_order(package: Path) -> tuple[int, str]:
    """Return a package's place in the pipeline; packages that the list does not name come last, by name."""
    return (PIPELINE.index(package.name) if package.name in PIPELINE else len(PIPELINE), package.name)


def has_docstring(path: Path) -> bool:
    """Whether a module says what it is."""
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) is not None


def api_pages() -> dict[str, list[str]]:
    """Return each page's name → the modules on it: one page a package, one for the modules beside the packages."""
    pages: dict[str, list[str]] = {}
    for package in PACKAGES:
        folder = ROOT / package
        paths = {package: sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))}
        for inner in sorted((path.parent for path in folder.glob("*/__init__.py")), key=pipeline_order):
            paths[module_name(inner)] = sorted(inner.rglob("*.py"), key=module_name)  # a package before its modules
        documented = {
            name: [module_name(path) for path in files if has_docstring(path)] for name, files in paths.items()
        }
        pages |= {name: modules for name, modules in documented.items() if modules}
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API's pages into the navigation, below its index."""
    entries: list[Any] = [{name: f"api/{name}.md"} for name in api_pages()]
    assert config.nav is not None
    for section in config.nav:
        for title, items in section.items():
            if title == "Reference":
                items[:] = [{"API": [item["API"], *entries]} if "API" in item else item for item in items]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the API's pages to the build."""
    from mkdocs.structure.files import File

    for name, modules in api_pages().items():
        blocks = [f"# {name}", *(f"::: {module}" for module in modules)]
        files.append(File.generated(config, f"api/{name}.md", content="\n\n".join(blocks) + "\n"))
    return files


def examples_fenced(help_text: str) -> str:
    """Return a help text with its unwrapped paragraphs (click's \\b) as code blocks."""
    paragraphs = []
    for paragraph in inspect.cleandoc(help_text).split("\n\n"):
        first, _, rest = paragraph.lstrip("\n").partition("\n")
        paragraphs.append(f"```text\n{rest}\n```" if first.strip() == "\b" else paragraph)
    return "\n\n".join(paragraphs)


def for_the_site(command: click.Command) -> click.Command:
    """Return a copy of a command, and of those below it, whose help is Markdown."""
    shown = copy.copy(command)
    shown.help = examples_fenced(command.help) if command.help else None
    if isinstance(command, click.Group):
        context = click.Context(command)
        below = {name: command.get_command(context, name) for name in command.list_commands(context)}
        commands = {name: for_the_site(inner) for name, inner in below.items() if inner is not None}
        group = click.Group(command.name, commands, params=command.params, help=shown.help)
        group.context_settings = command.context_settings
        return group
    return shown


def __getattr__(name: str) -> click.Command:
    """Make `cli` and `trainer` when mkdocs-click asks for them."""
    if name == "cli":
        from pgolf_post.cli import cli

        return for_the_site(cli)
    if name == "trainer":
        from trainer.__main__ import command

        return for_the_site(command)
    raise AttributeError(name)
