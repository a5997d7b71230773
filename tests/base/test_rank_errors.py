"""Two real processes, one of which fails: both end with its error, not with what the network says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes

FOREVER_SECONDS = 60

# torch is imported once; each case forks two ranks, which write what they ended with
GROUPS = """
import os, signal, socket, sys
from pathlib import Path
from pgolf_post.base import ranks as module
from pgolf_post.errors import OverBudgetError

def fail(kind):
    if kind == "foreseen":
        raise OverBudgetError("the folder x is full", hint="empty it")
    raise KeyError("y") if kind == "unforeseen" else KeyboardInterrupt()

def work(failing, kind):
    ranks = module.Ranks.join()
    try:
        if ranks.rank in failing:
            fail(kind)
        ranks.wait()
    finally:
        ranks.leave()

for name, failing, kind in (
    ("first", (0,), "foreseen"), ("second", (1,), "foreseen"), ("unforeseen", (1,), "unforeseen"),
    ("interrupted", (1,), "interrupted"), ("both interrupted", (0, 1), "interrupted"), ("none", (), ""),
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in "01":
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        ended = "well"
        try:
            work(failing, kind)
        except BaseException as error:
            more = [getattr(error, name, "") for name in ("hint", "exit_code")]
            ended = f"{type(error).__name__} | {error} | {more[0]} | {more[1]}"
        Path(sys.argv[1], f"{name}.{rank}").write_text(ended)
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each rank of each case ended with."""
    folder = tmp_path_factory.mktemp("ended")
    processes.run(["-c", GROUPS, str(folder)], timeout=FOREVER_SECONDS).check_returncode()
    return folder


FULL = "OverBudgetError | the folder x is full | empty it | 3"
SAME = "PgolfError | the folder x is full | empty it | 3"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first", (FULL, SAME)),
        ("second", (SAME, FULL)),
        ("unforeseen", ("PgolfError | rank 1 failed: KeyError: 'y' | None | 1", "KeyError | 'y' |  | ")),
        ("interrupted", ("PgolfError | rank 1 was interrupted | None | 130", "KeyboardInterrupt |  |  | ")),
        ("both interrupted", ("KeyboardInterrupt |  |  | ", "KeyboardInterrupt |  |  | ")),
        ("none", ("well", "well")),
    ],
)
def test_every_rank_ends_with_the_error_of_the_first(name: str, expected: tuple[str, str], ended: Path) -> None:
    assert tuple((ended / f"{name}.{rank}").read_text() for rank in (0, 1)) == expected
