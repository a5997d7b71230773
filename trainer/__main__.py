"""`python -m trainer RECIPE.toml [--set key=value …] [--resume CHECKPOINT]`: train one run."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pgolf_post.errors import SettingsError
from pgolf_post.progress import print_json, say


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe_path", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="override a recipe key; repeatable")
@click.option("--resume", type=click.Path(path_type=Path), help="continue from this checkpoint folder")
@click.option("--json", "as_json", is_flag=True, help="last stdout line is one JSON object")
def command(recipe_path: Path, overrides: tuple[str, ...], resume: Path | None, as_json: bool) -> None:
    """Train the run that RECIPE.toml describes; checkpoints appear under its run.checkpoint_root."""
    from pgolf_post.settings import read_settings
    from trainer.config import Recipe
    from trainer.loop import Trainer

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("this trainer runs as one process; start it without torchrun")
    trainer = Trainer(read_settings(recipe_path, Recipe, overrides))
    if resume:
        trainer.resume(resume)
    say(f"{trainer.num_parameters():,} parameters on {trainer.device}, {trainer.data.name}, {trainer.dtype or 'fp32'}")
    checkpoint = trainer.run()
    if as_json:
        views = {name: view["metric"] for name, view in checkpoint.meta["views"].items()}
        print_json({"checkpoint": str(checkpoint.path), "checkpoint_id": checkpoint.meta["id"], "views": views})


def main() -> None:
    """Run the command; a foreseen failure is one clear line and its exit code."""
    from pgolf_post.cli import run_command

    run_command(command)


if __name__ == "__main__":
    main()
