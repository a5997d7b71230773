"""`pgolf-post doctor`: is this machine fit for a run?"""

from __future__ import annotations

import time
from pathlib import Path

import click

from pgolf_post.base.progress import print_json, print_table
from pgolf_post.cli.common import json_option, quiet_option, threads_option
from pgolf_post.errors import VerificationError


@click.command("doctor")
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--gpus", type=click.IntRange(min=1), help="Number of GPUs that the run will use.")
@click.option("--fast", is_flag=True, help="Leave out matrix products, kernels, compiling and processes.")
@threads_option
@quiet_option
@json_option
def command(recipe: Path | None, gpus: int | None, fast: bool, as_json: bool) -> None:
    """Look at this machine, and at what RECIPE needs of it, before a run is paid for.

    \b
    pgolf-post doctor
    pgolf-post doctor trainer/recipes/record_8xh100.toml --gpus 8

    Looked at are versions, GPUs and their speed against their rating, threads, memory, disk, data, attention kernels,
    torch.compile and a sum over two processes. Each is ok, a warning or failed, with its mend; a failure exits with 4.
    """
    from pgolf_post.doctor.findings import counts
    from pgolf_post.doctor.stage import examine

    started = time.perf_counter()
    findings = examine(recipe, gpus, fast)
    rows = [(each.name, each.state, each.value, each.mend) for each in findings]
    print_table("doctor", ("what", "state", "found", "mend"), rows)
    number = counts(findings)
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        print_json({"findings": [each.facts() for each in findings], **number, "seconds": seconds})
    if number["failed"]:
        names = ", ".join(each.name for each in findings if each.state == "failed")
        raise VerificationError(f"{number['failed']} of {len(findings)} looks failed: {names}")
