"""Processes whose imports are done: forked from one that has torch and our packages loaded and has computed nothing.

A new interpreter spends three to five CPU seconds on imports before the first line that a test is about. A forked one
is from there on what `python WORDS…` would be: a process of its own, with its own streams, variables, folder, signals
and exit code. Real interpreters start in `tests/cli/test_cli_start.py`, a real torchrun in
`tests/calibrate/test_processes.py`.

Run as `python -m tests.processes FD` it is the process that is forked, which serves requests from a socket until that
is closed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).parents[1]
SECONDS = 300.0  # for one process, on a busy machine
LOADED = (
    *("numba", "torch", "torch._dynamo", "torch.distributed", "scipy.linalg", "scipy.special", "safetensors.torch"),
    *("trainer.run.loop", "trainer.family", "pgolf_post.cli", "pgolf_post.calibrate", "pgolf_post.artifacts"),
    *("pgolf_post.fit.prepare", "pgolf_post.score.stage", "pgolf_post.score.protocols"),
)


# ---- for tests -------------------------------------------------------------------------------------------------------


class Forks:
    """The process that is forked, and how those that were have ended."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "tests.processes", str(theirs.fileno())],
                cwd=REPOSITORY,
                pass_fds=[theirs.fileno()],
            )
        self.unread = b""
        self.codes: dict[int, int] = {}

    def start(self, job: Mapping[str, Any], streams: list[int]) -> int:
        """Return the id of a new process."""
        message = json.dumps(job).encode()
        socket.send_fds(self.socket, [len(message).to_bytes(8, "big")], streams)
        self.socket.sendall(message)
        while (pid := self._answer(SECONDS)) is None:
            pass
        return pid

    def code(self, pid: int, seconds: float | None) -> int | None:
        """Return a process's exit code, or minus the signal that ended it; None if it is running after `seconds`."""
        deadline = time.monotonic() + (SECONDS if seconds is None else seconds)
        while pid not in self.codes:
            left = deadline - time.monotonic()
            self._answer(max(0.0, left))
            if left <= 0:
                break
        return self.codes.get(pid)

    def _answer(self, seconds: float) -> int | None:
        """Read one answer: return the process that was started, or note how one ended, if either comes in time."""
        while b"\n" not in self.unread:
            if not select.select([self.socket], [], [], seconds)[0]:
                return None
            received = self.socket.recv(4096)
            assert received, f"the process that is forked has ended: {self.server.wait()}"
            self.unread += received
        line, _, self.unread = self.unread.partition(b"\n")
        answer = json.loads(line)
        if "started" in answer:
            return int(answer["started"])
        self.codes[answer["ended"]] = answer["code"]
        return None


@cache
def forks() -> Forks:
    """Return this process's own, started at the first call; it ends with its socket."""
    return Forks()


class Process:
    """`python WORDS…`, forked; `words` begin with -m MODULE, -c CODE or a script. As subprocess.Popen, with text."""

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str] | None = None,
        cwd: Path | str = REPOSITORY,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> None:
        opened: list[int] = [os.open(os.devnull, os.O_RDONLY)]
        self.words, self.returncode = words, None
        self.stdout, out = _stream(stdout, 1, opened)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _stream(stderr, 2, opened)
        job = {"words": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd)}
        self.pid = forks().start(job, [opened[0], out, err])
        for number in opened:
            os.close(number)

    returncode: int | None

    def poll(self) -> int | None:
        self.returncode = forks().code(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self.returncode = forks().code(self.pid, timeout)
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, SECONDS if timeout is None else timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what is left of both streams, once the process has ended."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            self.wait(timeout)
            out, err = (text.result() if text else "" for text in texts)
        return out, err

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


def _stream(wanted: int | IO[Any] | None, own: int, opened: list[int]) -> tuple[IO[str] | None, int]:
    """Return what to read a stream from, if anything, and the file that the process writes it to."""
    if wanted == subprocess.PIPE:
        reader, writer = os.pipe()
        opened.append(writer)
        return os.fdopen(reader), writer
    if wanted == subprocess.DEVNULL:
        opened.append(os.open(os.devnull, os.O_WRONLY))
        return None, opened[-1]
    return None, own if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno()


def run(
    words: list[str], env: Mapping[str, str] | None = None, cwd: Path | str = REPOSITORY, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS…`, forked, to its end."""
    return _ended([words], [env], cwd, timeout)


def run_ranks(num_processes: int, *words: str, cwd: Path | str = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS…` as so many ranks, as torchrun would; what they print is joined, one rank after the other."""
    return _ended([list(words)] * num_processes, places_of_ranks(num_processes), cwd, None)


def places_of_ranks(num_processes: int) -> list[dict[str, str]]:
    """Return the environment of each of so many ranks on this machine, which meet at a store of this process's."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)  # as long as any of them may ask
    size = str(num_processes)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    group |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return [{**os.environ, **group, **place} for place in places]


_stores: list[object] = []


def _ended(
    commands: list[list[str]], variables: list[Any], cwd: Path | str, timeout: float | None
) -> subprocess.CompletedProcess[str]:
    """Run processes side by side to their ends; the exit code is the first that is not 0."""
    with ExitStack() as stack:
        outs, errs = ([stack.enter_context(TemporaryFile("w+")) for _ in commands] for _ in range(2))
        each = zip(commands, variables, outs, errs, strict=True)
        running = [Process(words, env, cwd, out, err) for words, env, out, err in each]
        codes = [process.wait(timeout) for process in running]
        for file in (*outs, *errs):
            file.seek(0)
        said = ["".join(file.read() for file in files) for files in (outs, errs)]
    return subprocess.CompletedProcess(commands[0], next(filter(None, codes), 0), *said)


# ---- the process that is forked --------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork for every request and tell how each fork ended; in a fork, return what it is to run."""
    ended, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(notice)
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _tell_ended(requests)
        if requests in ready:
            head, streams, _, _ = socket.recv_fds(requests, 8, 3)
            if not head:
                os._exit(0)
            message = requests.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
            job: dict[str, Any] = json.loads(message)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                for number in (ended, notice):
                    os.close(number)
                _take_streams(streams)
                return job
            for number in streams:
                os.close(number)
            requests.sendall(json.dumps({"started": pid}).encode() + b"\n")


def _tell_ended(requests: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        code = os.waitstatus_to_exitcode(status)
        requests.sendall(json.dumps({"ended": pid, "code": code}).encode() + b"\n")


def _take_streams(streams: list[int]) -> None:
    for own, given in enumerate(streams):
        os.dup2(given, own)
    for given in streams:
        os.close(given)


def become(job: dict[str, Any]) -> None:
    """Run in this process what `python WORDS…` runs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    kind, *rest = job["words"]
    sys.path[0] = str(Path(kind).parent) if kind not in ("-m", "-c") else ""
    sys.path[1:1] = [path for path in job["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def end(code: object) -> NoReturn:
    """End as an interpreter does, but leave it to the kernel to take down what was loaded: that takes a second."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError):  # whoever read them may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays shared memory
    job = serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        become(job)
    except SystemExit as done:
        end(done.code)
    except BaseException:
        traceback.print_exc()
        end(1)
    end(0)
