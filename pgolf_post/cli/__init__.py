"""The command line: one module per command, in pipeline order, each a thin wrapper around one stage.

`pgolf-post --help` must answer at once, so nothing here imports torch, numpy or a stage: the table below holds every
command's name, module and one-line help, and a command's module is imported only when that command is named. Those
modules import no torch either: a command's own `--help` does not wait for it, its body does.
"""

from __future__ import annotations

import importlib
from difflib import get_close_matches

import click

from pgolf_post.base.command_line import run_command

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    # stage: name: (module in pgolf_post.cli, one-line help), in pipeline order
    "Start": {
        "demo": ("demo", "Run the whole pipeline on this machine, ending in four quantizers at one byte count."),
        "data": ("data", "Build, download, adopt or check a data folder (tokenizer + token shards)."),
        "doctor": ("doctor", "Check a machine before a run: software, GPUs, disk, data, speed; exit 4 on a failure."),
        "show": ("show", "Explain a path: what it is, where it came from, what can be done next."),
        "completion": ("completion", "Print the script that completes commands and options in bash, zsh or fish."),
    },
    "Checkpoints": {
        "import": ("importer", "Convert a foreign checkpoint file (flat, banked, int8, int6) to a native folder."),
        "export": ("exporter", "Convert a checkpoint to a public script's state dict."),
        "checkpoint": ("checkpoint", "Verify or list checkpoints."),
    },
    "Look inside": {
        "diagnose": (
            "diagnose",
            "Measure weights, activations and learned scalars; mark what is known as bad.",
        ),
        "curves": ("curves", "Lay training curves of any log over each other, with the noise of their difference."),
    },
    "Average": {
        "swa-blend": ("swa_blend", "Average a run's warm-down checkpoints into a new checkpoint."),
        "ema-blend": ("ema_blend", "Synthesise moving averages of any length from a run's snapshots."),
    },
    "Calibrate and quantize": {
        "calibrate": ("calibrate", "Collect the Hessians of every quantizable matrix; cached."),
        "prune": ("prune", "Zero the weights that matter least; bytes and bpb before and after."),
        "requant": ("requant", "Quantize, pack, size and (with --eval) score a checkpoint."),
        "fit": ("fit", "Find the lowest loss at a given number of bytes by solving for every step size."),
        "attribute": ("attribute", "Show which tensors lose the most by being quantized: bpb and bytes of each group."),
        "repack": ("repack", "Convert a public script's compressed artifact to ours: the same weights in fewer bytes."),
    },
    "Bytes": {
        "compress": ("compress", "Compress the symbols of an artifact by every codec, side by side."),
        "pack-code": ("pack_code", "Compress a script to the self-extracting file that the convention counts."),
        "export-decoder": ("export_decoder", "Write the decoder as a snippet for your own single-file script."),
        "size": ("size", "Count artifact + code bytes against the budget; exit 3 when over."),
    },
    "Score": {
        "eval": ("evaluate", "Score a checkpoint or an artifact in bits per byte: plain, sliding, test-time training."),
        "compare": ("compare", "Subtract two scores, with an interval; apply the challenge's record rule."),
        "audit": (
            "audit",
            "Test the challenge's rules: causality, normalisation, score-once, bytes; exit 4.",
        ),
    },
    "Hand in": {
        "submit": ("submit", "Make and prove a record folder whose script runs by itself; check anyone's."),
    },
    "Experiments and results": {
        "plan-size": (
            "plan_size",
            "Predict the size of a recipe with the lowest bpb in given bytes after given seconds.",
        ),
        "sweep": ("sweep", "Plan, run, rank and watch the trials of a question in one file; resume after anything."),
        "ledger": ("ledger", "Show what was done here: trials, lineage, the best, notes; take over older logs."),
        "report": ("report", "Show runs, artifacts and sweeps as one HTML page that needs no network, or live."),
        "cache": ("cache", "List, verify or prune derived results: sizes, ages, what made them."),
    },
}
COMMANDS = {name: row for section in SECTIONS.values() for name, row in section.items()}


class LazyGroup(click.Group):
    """A click group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pgolf_post.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the named command. Raises UsageError with the names that come nearest to one that does not exist."""
        if not args[0].startswith("-") and args[0] not in COMMANDS and not ctx.resilient_parsing:
            near = get_close_matches(args[0], COMMANDS)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"See {ctx.command_path} --help."
            raise click.UsageError(f"No such command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for stage, commands in SECTIONS.items():
            with formatter.section(stage):
                formatter.write_dl([(name, help_line) for name, (_, help_line) in commands.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="pgolf-post")
@click.option(
    "--family",
    "families",
    multiple=True,
    metavar="FILE.py:CLASS",
    help="Run this Python file and use its model family, for checkpoints of a model that is not ours; repeatable.",
)
def cli(families: tuple[str, ...]) -> None:
    """Post-training for Parameter Golf: everything after the training run, from its checkpoints, in seconds.

    Exit codes: 0 fine, 1 failed, 2 usage, 3 over budget, 4 verification, audit or gate failed, 5 (the trainer) stopped
    early.
    """
    if families:
        from pgolf_post.families import load_family

        for source in families:
            load_family(source)


def main() -> None:
    """Entry point of `pgolf-post`."""
    run_command(cli)
