"""`--watch`: on loopback alone, and a new page when a row arrives."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgolf_post.errors import NotFoundError, PgolfError
from pgolf_post.ledger import Ledger, Row
from pgolf_post.report.page.serve import HOST, Watched, server_of


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    with Ledger.open(tmp_path) as ledger:
        ledger.add(Row("trial", "t1"))

    def make(version: str) -> str:
        with Ledger.open(tmp_path, read_only=True) as ledger:
            return f"{version}: {len(ledger.rows())} rows"

    server = server_of(Watched(tmp_path, make))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, host: str = HOST) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_a_row_makes_a_new_page(port: int, tmp_path: Path) -> None:
    _, version = get(port, "/version")
    assert get(port, "/") == (200, f"{version}: 1 rows")
    assert get(port, "/version") == (200, version)
    with Ledger.open(tmp_path) as ledger:
        ledger.add(Row("trial", "t2"))
    _, later = get(port, "/version")
    assert later != version
    assert get(port, "/")[1].endswith(": 2 rows")


def test_other_hosts_and_paths_are_refused(port: int) -> None:
    assert get(port, "/", "attacker.example")[0] == 403
    assert get(port, "/", "localhost")[0] == 200
    assert get(port, "/etc/passwd")[0] == 404


def test_a_port_that_is_taken_is_named(port: int, tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=f"port {port} cannot be served on"):
        server_of(Watched(tmp_path, str), port)


def test_a_page_that_cannot_be_made_again_stays(tmp_path: Path) -> None:
    pages = iter(["first"])

    def make(version: str) -> str:
        try:
            return next(pages)
        except StopIteration:
            raise NotFoundError("gone") from None

    watched = Watched(tmp_path, make)
    assert watched.page() == "first"
    with Ledger.open(tmp_path) as ledger:
        ledger.add(Row("trial", "t1"))
    assert watched.page() == "first"
    with pytest.raises(NotFoundError):
        Watched(tmp_path, make).page()
