"""`pgolf-post import`: a contestant's checkpoint file → a native folder."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click

from pgolf_post.base.progress import print_json, print_table, say
from pgolf_post.cli.common import json_option, quiet_option, threads_option
from pgolf_post.settings import apply_override, read_toml


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="The data folder with the model's tokenizer.",
)
@click.option("--name", help="Name of the folder under checkpoints/.  [default: FILE's name]")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="A TOML file of hyperparameters.")
@click.option(
    "--log", "log_path", type=click.Path(path_type=Path), help='The run\'s log, with its "Hyperparameters:" lines.'
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One hyperparameter; repeatable.")
@click.option(
    "--active-loops", type=click.IntRange(min=0), help="Number of loops active when the file was saved.  [default: all]"
)
@click.option(
    "--phase",
    default="imported",
    show_default=True,
    help="The moment of the run at which it was saved: warmdown_start, final, …",
)
@click.option(
    "--metric-tokens",
    type=click.IntRange(min=2),
    default=65536,
    show_default=True,
    help="Measure the recorded bpb on this many validation tokens.",
)
@click.option(
    "--trim-vocab",
    is_flag=True,
    help="Cut off rows of the vocabulary beyond the tokenizer's, which only pad it; the tokens' logits stay the same.",
)
@click.option(
    "--log-block",
    type=click.IntRange(min=1),
    help="Which Hyperparameters block of a log with several that disagree, counted from 1.",
)
@threads_option
@quiet_option
@json_option
def command(
    file: Path,
    data_dir: Path,
    name: str | None,
    config_path: Path | None,
    log_path: Path | None,
    overrides: tuple[str, ...],
    active_loops: int | None,
    phase: str,
    metric_tokens: int,
    trim_vocab: bool,
    log_block: int | None,
    as_json: bool,
) -> None:
    """Import FILE: a flat or banked state dict (.pt, .safetensors; bare or with model and EMA), or a .ptz.

    Shapes are believed; what they do not say comes from --config, --log and --set (later ones win), in our names or the
    public scripts'; a key of neither is refused. What is still missing is asked for by name.

    \b
    pgolf-post import final_model.pt --log train.log --data data/sp1024 --name pr1855
    pgolf-post import ckpt_step652.pt --config run.toml --data data/sp1024 --name mine --phase warmdown_start

    Several checkpoints of one run imported under one --name can be averaged: pgolf-post swa-blend.
    """
    from pgolf_post.base.paths import require_folder_name
    from pgolf_post.data import DataFolder
    from pgolf_post.errors import SettingsError
    from pgolf_post.importers.importing import import_file
    from pgolf_post.importers.log_file import read_log
    from pgolf_post.importers.script_words import require_known, split_log
    from pgolf_post.ledger.recording import record

    started = time.perf_counter()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+]*", phase):
        raise SettingsError(f"--phase {phase!r}: letters, digits, '.', '_' and '+' only")
    if log_block and not log_path:
        raise SettingsError("--log-block has no effect without --log")
    folder = require_folder_name(name or file.name.split(".")[0])
    given: dict[str, Any] = {}
    if log_path:
        given, other = split_log(read_log(log_path, log_block))
        passed_over = f"; {len(other)} others passed over: {', '.join(other)}" if other else ""
        say(f"{log_path}: {len(given)} settings of the model{passed_over}")
    given |= read_toml(config_path) if config_path else {}
    for override in overrides:
        apply_override(given, override)
    require_known(given)
    data = DataFolder.open(data_dir)
    imported = import_file(file, given, data, folder, active_loops, metric_tokens, phase=phase, trim_vocab=trim_vocab)
    checkpoint = imported.checkpoint
    views = checkpoint.meta["views"]
    rows = [(view, fields["id"][:12], f"{fields['metric']['bpb']:.6f}") for view, fields in views.items()]
    print_table(f"{checkpoint.path}  ({imported.format} format)", ("weights", "id", "bpb"), rows)
    assumed = ", ".join(f"{key} = {value}" for key, value in imported.assumed.items())
    say(f"assumed, because nothing said otherwise: {assumed or 'nothing'}")
    if imported.unused:
        say(f"without a meaning here, because the model has no such part: {', '.join(imported.unused)}")
    say(f"next: pgolf-post requant {checkpoint.path} --eval")
    seconds = round(time.perf_counter() - started, 3)
    record(checkpoint.path, seconds=seconds)
    if as_json:
        metrics = {view: fields["metric"] for view, fields in views.items()}
        answer = {"checkpoint": str(checkpoint.path), "checkpoint_id": checkpoint.meta["id"], "views": metrics}
        print_json(
            {
                **answer,
                "format": imported.format,
                "assumed": dict(imported.assumed),
                "notes": list(imported.notes),
                "seconds": seconds,
            }
        )
