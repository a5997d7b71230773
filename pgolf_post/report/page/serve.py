"""`--watch`: the page on loopback, made again as rows arrive.

A page is made when it is asked for and something under the root has changed: the ledger's file, its write-ahead log, or
a run's log. Requests that name another host are refused, so that no page from elsewhere can read this one through a
name of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pgolf_post.base.progress import say
from pgolf_post.errors import PgolfError
from pgolf_post.ledger.store import LEDGER_FILE

HOST = "127.0.0.1"
WATCHED = (LEDGER_FILE, f"{LEDGER_FILE}-wal")
LOGS = "*/train.jsonl"


class Watched:
    """The newest page, made again where what it shows has changed."""

    def __init__(self, root: Path, make: Callable[[str], str]) -> None:
        self.root, self.make = root, make  # make(version) → the page
        self._lock = threading.Lock()
        self._version, self._page = "", ""

    def version(self) -> str:
        """Return a text that changes when rows or log lines arrive."""
        paths = [*(self.root / name for name in WATCHED), *sorted(self.root.glob(LOGS))]
        stats = [path.stat() for path in paths if path.is_file()]
        full = [stat for stat in stats if stat.st_size]  # reading can leave an empty write-ahead log
        return "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in full) or "empty"

    def page(self) -> str:
        """Return the page of this moment. Raises what making it raises, where there is no older one."""
        with self._lock:
            version = self.version()
            if version != self._version:
                try:
                    self._page = self.make(version)
                except PgolfError as error:
                    if not self._page:
                        raise
                    say(f"the page stays as it was: {error}")
                self._version = version
            return self._page


def server_of(watched: Watched, port: int = 0) -> ThreadingHTTPServer:
    """Return a server on loopback; port 0 takes a free one. Raises PgolfError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                self.send_error(403, "only on loopback")
            elif self.path == "/version":
                self._answer(watched.version(), "text/plain")
            elif self.path == "/":
                self._answer(watched.page(), "text/html")
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Requests are not logged."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise PgolfError(f"port {port} cannot be served on: {error}", hint="choose another: --port 0") from None
