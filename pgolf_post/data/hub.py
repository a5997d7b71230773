"""Files from a dataset repository of the Hugging Face hub, one at a time: pinned, resumable, verified.

A revision is resolved to its commit once, so that a download never mixes two versions. A file is written under a
partial name made from its checksum and renamed once that checksum holds. huggingface_hub resumes a cut connection only
within one call and then deletes the partial file, so the partial file is kept here, and its `http_get` is given the
position to resume from, in the next attempt or the next run. The endpoint is passed explicitly; no access token is
sent.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pgolf_post.base.progress import progress_bar, say
from pgolf_post.errors import DamagedFileError, NotFoundError, PgolfError

MAX_ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # doubled after every failed attempt
PARTIAL_PREFIX = ".partial-"
TRANSIENT_STATUS = (408, 425, 429)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its size, and the checksum that the hub states for it."""

    path: str
    size_bytes: int
    sha256: str | None  # of files in large-file storage
    git_sha1: str  # of the git blob, for the others

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit. Open it with `Repository.open`."""

    endpoint: str
    repository: str
    commit: str
    _hub: Any = field(repr=False)

    @classmethod
    def open(cls, endpoint: str, repository: str, revision: str) -> Repository:
        """Resolve `revision` to its commit. Raises NotFoundError for an unknown repository, PgolfError otherwise."""
        hub = _import_hub()
        api = hub.HfApi(endpoint=endpoint, token=False)
        what = f"{endpoint}/datasets/{repository} at revision {revision!r}"
        info = with_retries(what, lambda: api.repo_info(repository, repo_type="dataset", revision=revision))
        return cls(endpoint.rstrip("/"), repository, str(info.sha), hub)

    def files(self, folder: str) -> list[RemoteFile]:
        """The files directly in `folder`, sorted by path. Raises NotFoundError if there is no such folder."""
        api = self._hub.HfApi(endpoint=self.endpoint, token=False)

        def listing() -> list[Any]:
            return list(api.list_repo_tree(self.repository, folder, repo_type="dataset", revision=self.commit))

        entries = with_retries(f"{self.repository}: folder {folder!r}", listing)
        files = [
            RemoteFile(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs else None, str(entry.blob_id))
            for entry in entries
            if hasattr(entry, "blob_id")
        ]
        return sorted(files, key=lambda file: file.path)

    def file(self, path: str) -> RemoteFile:
        """One file by its path. Raises NotFoundError if the repository has none."""
        for file in self.files(path.rpartition("/")[0]):
            if file.path == path:
                return file
        raise NotFoundError(f"{self.repository} has no file {path!r} at commit {self.commit}")

    def fetch(self, file: RemoteFile, destination: Path) -> None:
        """Download `file` to `destination` unless it is there, resuming an earlier attempt.

        Raises DamagedFileError if it arrives with another checksum than stated, PgolfError if it does not arrive.
        """
        if destination.is_file() and is_intact(destination, file):
            return
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f"{PARTIAL_PREFIX}{(file.sha256 or file.git_sha1)[:16]}-{destination.name}")
        self._transfer(file, partial)
        if not is_intact(partial, file):
            partial.unlink()
            raise DamagedFileError(
                f"{file.path} arrived with other bytes than {self.repository} states "
                f"({'sha256 ' + file.sha256 if file.sha256 else 'git blob ' + file.git_sha1}); it was deleted",
                hint="run the same command again; if it happens again, the served file itself is damaged",
            )
        partial.replace(destination)

    def _transfer(self, file: RemoteFile, partial: Path) -> None:
        """Append to `partial` until it has the file's size."""
        url = self._hub.hf_hub_url(
            self.repository, file.path, repo_type="dataset", revision=self.commit, endpoint=self.endpoint
        )
        have = partial.stat().st_size if partial.exists() else 0
        if have:
            say(f"{file.name}: going on after {have / 1e6:.1f} of {file.size_bytes / 1e6:.1f} MB")
        with progress_bar(f"{file.name}", round(file.size_bytes / 1e6), "MB") as advance:
            report = _position_reporter(advance)
            with_retries(
                f"{self.repository}: {file.path}", lambda: self._attempt(url, file.size_bytes, partial, report)
            )

    def _attempt(self, url: str, size_bytes: int, partial: Path, report: Callable[[int], None]) -> None:
        """Request the bytes that are still missing."""
        from huggingface_hub.file_download import http_get

        have = partial.stat().st_size if partial.exists() else 0
        if have > size_bytes:
            partial.unlink()
            have = 0
        headers = {**self._hub.utils.build_hf_headers(token=False), "Accept-Encoding": "identity"}
        with partial.open("ab") as file:
            counted = CountedFile(file, report)
            http_get(url, counted, resume_size=have, headers=headers, expected_size=size_bytes)


def _position_reporter(advance: Callable[..., None]) -> Callable[[int], None]:
    """Return `report(position in bytes)` that drives a progress bar's `advance`; a position may also go back."""
    shown_bytes = 0

    def report(position: int) -> None:
        nonlocal shown_bytes
        advance((position - shown_bytes) / 1e6)
        shown_bytes = position

    return report


class CountedFile:
    """The file interface that a transfer needs; it reports its position after every change."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file, self._report = file, report
        report(file.tell())

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._report(self._file.tell())
        return written

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        remaining = self._file.truncate(size)
        self._report(self._file.tell())
        return remaining


def _import_hub() -> Any:
    """Return huggingface_hub with its progress bars off. Raises PgolfError naming the extra that installs it."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise PgolfError(
            "downloading needs huggingface_hub, which is not installed", hint="pip install 'pgolf-post[data]'"
        ) from None
    disable_progress_bars("huggingface_hub.http_get")
    return huggingface_hub


def is_intact(path: Path, file: RemoteFile) -> bool:
    """Return whether a local file has the remote file's size and checksum."""
    if path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as stream:
        if file.sha256:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
        digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest() == file.git_sha1


def with_retries(what: str, action: Callable[[], T]) -> T:
    """Return action(), tried again after a wait if the connection fails. Raises NotFoundError or PgolfError."""
    wait_s = FIRST_WAIT_S
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return action()
        except PgolfError:
            raise
        except Exception as error:
            if not is_transient(error):
                raise _explain(what, error) from error
            if attempt == MAX_ATTEMPTS:
                raise PgolfError(
                    f"{what}: gave up after {attempt} attempts: {error}",
                    hint="run the same command again when the connection is back: it goes on where it stopped",
                ) from error
            say(f"{what}: {_first_line(error)}; attempt {attempt + 1} of {MAX_ATTEMPTS} in {wait_s:g} s")
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("unreachable")


def is_transient(error: Exception) -> bool:
    """Return whether trying again can help: the connection failed, or the server is busy or broken."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in TRANSIENT_STATUS
    if type(error).__name__ == "OfflineModeIsEnabled" or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS


def _status(error: Exception) -> int | None:
    """Return the HTTP status that the error carries, or None."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return int(status) if status is not None else None


def _explain(what: str, error: Exception) -> PgolfError:
    """Return a permanent failure as an error that names what was requested."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return PgolfError(
            f"{what}: could not write: {error}", hint="free disk space or fix its permissions, run it again"
        )
    if _status(error) in (401, 403, 404):
        return NotFoundError(
            f"{what}: not found (HTTP {_status(error)}); it does not exist or is not public",
            hint="pgolf-post data download --help lists --repository, --revision, --subfolder and --endpoint",
        )
    return PgolfError(f"{what}: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
