"""The run's folder: made before the first step, never over another run's checkpoints."""

from __future__ import annotations

from pgolf_post.errors import PgolfError
from trainer.run.log import LOG_FILE, end_torn_line
from trainer.run.resuming import prepare_snapshots
from trainer.run.state import RunState


def make_run_dir(state: RunState) -> None:
    """Make the run's folder, with a log that can be appended to. Raises PgolfError if it is taken or impossible."""
    _refuse_taken_run(state)
    run_dir = state.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PgolfError(
            f"could not make the run's folder {run_dir}: {error}",
            hint="choose another place with --set run.checkpoint_root=FOLDER",
        ) from error
    end_torn_line(run_dir / LOG_FILE)
    prepare_snapshots(state)


def _refuse_taken_run(state: RunState) -> None:
    """Raise PgolfError if this run would come upon checkpoints that it did not write."""
    run_dir, step = state.run_dir, state.step
    saved = sorted(run_dir.glob("step_*"))
    if saved and not state.parent:
        raise PgolfError(
            f"{run_dir} already holds checkpoints; a run never overwrites another",
            hint=f"choose another name with --set run.name=NAME, or continue it with --resume {saved[-1]}",
        )
    later = [path for path in saved if int(path.name.removeprefix("step_").split("-")[0]) > step]
    if later:
        raise PgolfError(
            f"{run_dir} holds checkpoints later than step {step}, such as {later[-1].name}; "
            "a run never overwrites another",
            hint=f"--resume {later[-1]}, or branch off under another name with --set run.name=NAME",
        )
