"""Downloading a model directory from the hub: what it needs is known before the first byte, and it can be resumed.

The hub's own library resumes by whole files, and a shard of the released model is 10 GB. So shards are fetched here,
into a partial file that the next run continues and that is checked against its sha256; the library does the rest
(small files, links of its cache, records of what was downloaded).
"""

import errno
import hashlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from hybrid.errors import DoesNotFit, KimiError, MissingExtra, Retry, UsageError
from hybrid.memory.hardware import disk_free

# Weights and what describes them. Never code: nothing from a repository is executed here.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*", "THIRD_PARTY*")
CONNECTIONS = 4
AGAIN = "Run the same command again to continue where it stopped."


class RemoteFile(NamedTuple):
    """One file of a repository that a model directory needs."""

    name: str
    size: int  # bytes
    sha256: str | None  # of large files


@dataclass(frozen=True)
class PullPlan:
    """What a download would do. `directory` is where the files go; None for the hub's shared cache at `cache`."""

    repo: str
    revision: str  # the commit, so that a resumed download continues the same version
    files: tuple[RemoteFile, ...]
    directory: Path | None
    cache: Path

    @property
    def target(self) -> Path:
        """A path on the disk that will hold the model."""
        return self.directory or self.cache

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes still to be downloaded: whole and partial files are counted as present."""
        return self.total - sum(min(file.size, self._present(file)) for file in self.files)

    @property
    def free(self) -> int:
        return disk_free(self.target)

    @property
    def _storage(self) -> Path:
        return self.cache / f"models--{self.repo.replace('/', '--')}"

    def destination(self, file: RemoteFile) -> Path:
        """Where the bytes of a large file end up."""
        return self.directory / file.name if self.directory else self._storage / "blobs" / str(file.sha256)

    def partial(self, file: RemoteFile) -> Path:
        """Where they are collected until they are whole."""
        place = self.directory / ".cache" / "kimi-local" if self.directory else self._storage / "blobs"
        return place / f"{file.sha256}.partial"

    def is_whole(self, file: RemoteFile) -> bool:
        return _size(self.destination(file)) == file.size

    def _present(self, file: RemoteFile) -> int:
        if file.sha256 is not None:
            return file.size if self.is_whole(file) else _size(self.partial(file))
        return _size((self.directory or self._storage / "snapshots" / self.revision) / file.name)

    def require_space(self) -> None:
        """Raise DoesNotFit, with the numbers, unless the rest of the download fits the disk."""
        if self.missing > self.free:
            raise DoesNotFit(
                f"{self.repo} needs {gigabytes(self.missing)} more, {self.target} has {gigabytes(self.free)} free.",
                f"Free {gigabytes(self.missing - self.free)} there or choose another disk with --dir.",
            )


def gigabytes(size: int) -> str:
    """Decimal, as disks are sold."""
    return f"{size / 1e9:,.1f} GB"


def plan_pull(repo: str, directory: Path | None = None, *, endpoint: str | None = None) -> PullPlan:
    """Ask the hub what `repo` holds. `endpoint` overrides the hub's address.

    Raises MissingExtra without huggingface-hub, KimiError if there is no such repository, Retry without a connection.
    """
    hub = _hub()
    with _Explained(hub, repo):
        info = hub.HfApi(endpoint=endpoint).model_info(repo, files_metadata=True)
        files = tuple(_wanted_files(info.siblings or []))
        if not any(file.name.endswith(".safetensors") for file in files):
            raise KimiError(f"{repo} holds no safetensors weights.", "Name a repository with the original checkpoint.")
        return PullPlan(repo, str(info.sha), files, directory, Path(hub.constants.HF_HUB_CACHE))


def pull(plan: PullPlan, *, endpoint: str | None = None) -> Path:
    """Download what is missing and return the model directory; running it again continues.

    Raises DoesNotFit before anything is written, Retry if the connection fails half-way.
    """
    plan.require_space()
    hub = _hub()
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    with _Explained(hub, plan.repo):
        _fetch_large_files(hub, plan, endpoint)
        path = hub.snapshot_download(
            plan.repo,
            revision=plan.revision,
            local_dir=plan.directory,
            allow_patterns=[file.name for file in plan.files],
            max_workers=CONNECTIONS,
            endpoint=endpoint,
        )
    directory = Path(path)
    for file in plan.files:
        if _size(directory / file.name) != file.size:
            raise Retry(f"{plan.repo}: {file.name} did not arrive whole.", AGAIN)
    return directory


def _fetch_large_files(hub: ModuleType, plan: PullPlan, endpoint: str | None) -> None:
    stop = threading.Event()
    large = [file for file in plan.files if file.sha256 is not None and not plan.is_whole(file)]
    with ThreadPoolExecutor(CONNECTIONS) as connections:
        try:
            list(connections.map(lambda file: _fetch(hub, plan, file, endpoint, stop), large))
        finally:
            stop.set()  # the other connections end at their next block, keeping what they have


def _fetch(hub: ModuleType, plan: PullPlan, file: RemoteFile, endpoint: str | None, stop: threading.Event) -> None:
    """Download one large file, continuing its partial file, and check it."""
    partial, destination = plan.partial(file), plan.destination(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _StoppableFile(partial, stop) as content:
        if content.tell() > file.size:
            content.truncate(0)
        if content.tell() < file.size:
            hub.file_download.http_get(
                hub.hf_hub_url(plan.repo, file.name, revision=plan.revision, endpoint=endpoint),
                content,
                resume_size=content.tell(),
                headers=hub.utils.build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        os.fsync(content.fileno())
    if _sha256(partial, stop) != file.sha256:
        partial.unlink()
        raise Retry(f"{file.name} arrived damaged and was removed.", AGAIN)
    os.replace(partial, destination)
    if plan.directory:
        _record(plan.directory, plan.revision, file)


class _StoppableFile(io.FileIO):
    """A file opened for appending, whose writes fail once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path, "ab")
        self.seek(0, os.SEEK_END)
        self._stop = stop

    def write(self, data: Any) -> int:
        if self._stop.is_set():
            raise InterruptedError("the download was stopped")
        return super().write(data)


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            if stop.is_set():
                raise InterruptedError("the download was stopped")
            digest.update(block)
    return digest.hexdigest()


def _record(directory: Path, revision: str, file: RemoteFile) -> None:
    """The hub library's own note on a file: commit, sha256, time. It spares reading 10 GB to recognise it."""
    note = directory / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{revision}\n{file.sha256}\n{time.time()}\n")


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise MissingExtra("Downloading needs huggingface-hub.", 'pip install "kimi-local[hub]"') from error
    return huggingface_hub


def _wanted_files(siblings: list[Any]) -> Iterator[RemoteFile]:
    for sibling in siblings:
        name = str(sibling.rfilename)
        # Everything lives at the top; a subdirectory holds other exports of the same weights.
        if "/" not in name and any(fnmatch(name, pattern) for pattern in WANTED):
            yield RemoteFile(name, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _Explained:
    """Turns what the hub's library raises into one line with a remedy."""

    def __init__(self, hub: ModuleType, repo: str) -> None:
        self._errors, self._repo = hub.errors, repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, KimiError):
            return
        # The base classes are the exceptions of whichever HTTP library this version of the hub's library uses.
        network = (OSError, RuntimeError, *self._errors.HfHubHTTPError.__bases__)
        explained = self._explain(error)
        if explained is None and isinstance(error, network):
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            explained = Retry(f"Downloading {self._repo} stopped: {reason.rstrip('.')}.", AGAIN)
        if explained is not None:
            raise explained from error

    def _explain(self, error: BaseException) -> KimiError | None:
        errors, repo = self._errors, self._repo
        if isinstance(error, errors.HFValidationError):
            return UsageError(f"{repo!r} is not the name of a model repository.", "Write OWNER/NAME.")
        if isinstance(error, errors.GatedRepoError):
            return KimiError(f"Access to {repo} must be granted.", "Accept its terms on its page, then: hf auth login")
        if isinstance(error, errors.RepositoryNotFoundError):
            remedy = "Check the name; for a private one log in first: hf auth login"
            return KimiError(f"There is no model repository {repo} on the hub.", remedy)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return KimiError("The hub is switched off by HF_HUB_OFFLINE.", "Unset it and run the command again.")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DoesNotFit(f"The disk filled up while downloading {repo}.", "Free space and run the command again.")
        return None
