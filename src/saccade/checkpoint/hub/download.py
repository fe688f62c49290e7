"""One file of a repository into the download cache: resumed where it was cut, complete before it has its name.

Bytes go to <content>.incomplete, which a later run goes on with; only a whole file, of the right size and, where the
hub tells it, of the right SHA-256, becomes blobs/<content>, and then a link in the snapshot. huggingface_hub throws
away what a broken connection has brought. Knows requests and folders, no tensors. Next: web.py, which asks again.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

import httpx

from saccade.checkpoint.hub.remote import Repository, total_size
from saccade.checkpoint.hub.web import Trouble, check_status, persist, say_error
from saccade.errors import CheckpointError

WINDOW = 300.0  # seconds in which at least SLOWEST bytes must come
SLOWEST = 256 << 10
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOB = re.compile(r"[0-9A-Za-z_-]{1,128}")
FULL = {errno.ENOSPC, errno.EDQUOT}


class Counter:
    """Bytes that have come, of all threads together, and who wants to know."""

    def __init__(self, total: int, progress: Callable[[int, int], None]):
        self.total, self.done, self._progress, self._lock = total, 0, progress, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            self._progress(self.done, self.total)


def fetch_file(repository: Repository, file: str, cache: Path, folder: Path, counter: Counter) -> None:
    """Get a file whole into `folder`, the snapshot in `cache`; CheckpointError if that cannot be done."""
    name, size = repository.name, repository.sizes.get(file)
    content = repository.blobs.get(file) or ""
    if not BLOB.fullmatch(content):  # a server that does not tell: the same file of the same commit is the same
        content = hashlib.sha1(f"{repository.commit}/{file}".encode(), usedforsecurity=False).hexdigest()
    blob = cache / "blobs" / content
    while not is_whole(blob, size):
        with naming_disk(name, cache, counter), open_partial(repository, blob) as (partial, path):
            if is_whole(blob, size):  # another process has just ended
                path.unlink(missing_ok=True)
                break
            counter.add(partial.seek(0, os.SEEK_END))
            persist(repository.site, file, lambda: fill_file(repository, file, cache, partial, counter))
            partial.flush()
            with suppress(OSError):  # not on every file system; elsewhere no power cut may leave a hole of zeros
                os.fsync(partial.fileno())
            os.replace(path, blob)
    with naming_disk(name, cache, counter):
        link(blob, folder / file)


def is_whole(path: Path, size: int | None) -> bool:
    try:
        return path.is_file() and size in (None, path.stat().st_size)
    except OSError:
        return False


@contextmanager
def open_partial(repository: Repository, blob: Path) -> Iterator[tuple[BufferedRandom, Path]]:
    """The file that a content grows in, locked, with what has come of it; waits while another process fetches it.
    Where the file system has no locks, a new file of this process alone."""
    path, own, told = Path(f"{blob}.incomplete"), None, False
    while True:
        partial = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            partial.close()
            if not told:
                repository.site.tell(f"{repository.name}: another process is fetching it; waiting")
                told = True
            repository.site.pause(1.0)
            continue
        except OSError:
            partial.close()
            if path.stat().st_size == 0:
                path.unlink()
            own = path = Path(f"{blob}.{os.getpid()}.incomplete")
            partial = open(path, "w+b")  # noqa: SIM115
            break
        with suppress(OSError):
            if os.fstat(partial.fileno()).st_ino == path.stat().st_ino:
                break
        partial.close()  # the other process has finished and renamed it
    try:
        yield partial, path
    finally:
        partial.close()
        if own is not None:  # nobody would go on with it
            own.unlink(missing_ok=True)


def fill_file(
    repository: Repository, file: str, cache: Path, partial: BufferedRandom, counter: Counter
) -> bool | Trouble:
    """One attempt to append what is missing; Trouble if another may help."""
    size, site = repository.sizes.get(file), repository.site
    start = partial.seek(0, os.SEEK_END)
    if size is not None and start > size:
        start = restart(partial, counter)
    if size is not None and start == size:
        return verify(repository, file, partial, counter)
    headers = {"Range": f"bytes={start}-"} if start else {}
    with site.client.stream("GET", repository.url(file), headers=headers) as response:
        if response.status_code == 416:
            restart(partial, counter)
            return Trouble("HTTP 416")
        trouble = check_status(site, file, response)
        if trouble is not None:
            return trouble
        total = total_size(response)
        if size is not None and total not in (None, size):
            text = f"{file} has {total:,} bytes, but {size:,} are listed"
            raise CheckpointError(f"{repository.name}: {text}; it was changed meanwhile, run the same command again")
        wanted = total if size is None else size
        if start and not begins_at(response, start):  # the whole file comes once more
            start = restart(partial, counter)
        came, since, slow = 0, time.monotonic(), 0
        try:
            for chunk in response.iter_raw():
                with naming_disk(repository.name, cache, counter):
                    partial.write(chunk)
                came += len(chunk)
                slow += len(chunk)
                counter.add(len(chunk))
                if site.stopped.is_set():
                    raise CheckpointError(f"{repository.name}: stopped")
                if time.monotonic() - since > WINDOW:
                    if slow < SLOWEST:
                        raise CheckpointError(f"{repository.name}: {file} comes too slowly: {slow:,} bytes in 5 min")
                    since, slow = time.monotonic(), 0
        except httpx.TransportError as error:  # cut: go on behind what has come
            return Trouble(say_error(error), has_progressed=came > 0)
        with naming_disk(repository.name, cache, counter):
            partial.flush()
        if wanted is not None and start + came < wanted:
            return Trouble(f"{start + came:,} of {wanted:,} bytes came", has_progressed=came > 0)
        if wanted is not None and start + came > wanted:
            restart(partial, counter)
            return Trouble(f"{start + came:,} bytes came instead of {wanted:,}")
    return verify(repository, file, partial, counter)


def restart(partial: BufferedRandom, counter: Counter) -> int:
    """Throw away what has come."""
    counter.add(-partial.seek(0, os.SEEK_END))
    return partial.truncate(0)


def begins_at(response: httpx.Response, start: int) -> bool:
    return response.status_code == 206 and response.headers.get("content-range", "").startswith(f"bytes {start}-")


def verify(repository: Repository, file: str, partial: BufferedRandom, counter: Counter) -> bool | Trouble:
    """True if the hub tells no SHA-256, or this is it; else nothing of it is kept."""
    expected = repository.blobs.get(file) or ""
    if not SHA256.fullmatch(expected):
        return True
    partial.flush()
    partial.seek(0)
    if hashlib.file_digest(partial, "sha256").hexdigest() == expected:
        return True
    restart(partial, counter)
    return Trouble("what came is not what is listed: its SHA-256 differs")


def link(blob: Path, path: Path) -> None:
    """Make `path` a link to a content, or, where there are no links, the content itself."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.replace(blob, path)
    else:
        os.replace(beside, path)


@contextmanager
def naming_disk(name: str, cache: Path, counter: Counter | None = None) -> Iterator[None]:
    """What the file system refuses, as a CheckpointError with the folder and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            text = f"{name}: the disk of {cache} is full"
            with suppress(OSError):
                text += f": {shutil.disk_usage(cache).free:,} bytes are free"
            if counter is not None:
                text += f", {max(0, counter.total - counter.done):,} more are to be fetched"
            cure = "make room and run the same command again, which goes on where it stopped"
        else:
            text = f"{name}: the download cache {cache} cannot be written: {error.strerror or error}"
            cure = "make it writable"
        raise CheckpointError(f"{text}; {cure}, or set HF_HOME to another folder") from error
