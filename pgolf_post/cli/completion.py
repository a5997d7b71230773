"""`pgolf-post completion`: the script that lets a shell complete commands, options, choices and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "pgolf-post"
SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script of SHELL, to be loaded when the shell starts.

    \b
    bash:  echo 'eval "$(pgolf-post completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(pgolf-post completion zsh)"' >> ~/.zshrc
    fish:  pgolf-post completion fish > ~/.config/fish/completions/pgolf-post.fish
    """
    from pgolf_post.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None
    variable = f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()
    click.echo(completion(cli, {}, PROGRAM, variable).source())
