"""The variables of a distributed start: whole sets are taken, halves and nonsense refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pgolf_post.base.rank_variables import Place, place_of_process
from pgolf_post.errors import SettingsError
from tests import processes

WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_whole_sets_are_taken() -> None:
    assert place_of_process({}) == Place()
    assert place_of_process({"WORLD_SIZE": "1", "RANK": "0"}) == Place()
    assert place_of_process(WHOLE) == Place(3, 4, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "%q"}, "LOCAL_RANK is '%q'"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT is 'tcp"),
        ({"RANK": "4"}, "RANK must be below WORLD_SIZE"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "1"}, "RANK must be below WORLD_SIZE"),
    ],
)
def test_partial_and_senseless_ones_are_refused_by_name(change: dict[str, str | None], named: str) -> None:
    variables = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    with pytest.raises(SettingsError, match="the variable") as caught:
        place_of_process(variables)
    assert named in str(caught.value)
    assert caught.value.hint


def test_a_command_that_shares_work_names_the_variable_and_exits_2(pico_run: Path) -> None:
    variables = {**os.environ, "WORLD_SIZE": "2"}
    done = processes.run(["-m", "pgolf_post", "eval", str(pico_run / "latest")], variables)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "WORLD_SIZE" in done.stderr
    assert "next: start it with torchrun" in done.stderr


WAIT = """
import sys
from pgolf_post.base import ranks
ranks.JOIN_SECONDS, ranks.SAY_SECONDS = 2, 0.5
from pgolf_post.errors import PgolfError
try:
    ranks.Ranks.join()
except PgolfError as error:
    print(error)
"""


@pytest.mark.parametrize(("rank", "named"), [("0", "for rank 1, 2; gave up after 2 s"), ("1", "for rank 0")])
def test_a_rank_that_waits_says_for_whom_and_gives_up(rank: str, named: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "3", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    done = processes.run(["-c", WAIT], {**os.environ, **place})
    assert done.returncode == 0, done.stderr
    assert named in done.stdout
    assert f"localhost:{port}" in done.stdout
    if rank == "0":
        assert "waits for rank 1, 2, for at most 2 s" in done.stderr
