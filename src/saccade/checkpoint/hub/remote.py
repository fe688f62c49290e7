"""The Index of a model on the Hugging Face Hub, without downloading it: config.json, index.json and file headers.

Headers are fetched by HTTP ranges, so that 690 GB cost about 23 MB; what lies in the download cache is read there.
Knows no torch and no plan; what the headers mean is index.py's. A failing network is one CheckpointError (web.py); a
broken header is a Problem in the Index, as it is for local files. Next: open.py, which decides whether a model is a
path or an id; fetch.py, which wants the whole files.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from saccade.checkpoint.foreign import describe_names
from saccade.checkpoint.header import HEADER_LIMIT, header_bytes, parse_json
from saccade.checkpoint.hub.snapshot import find_snapshot
from saccade.checkpoint.hub.web import ATTEMPTS, Site, Tell, Trouble, check_status, open_site, persist, work_through
from saccade.checkpoint.index import INDEX_FILE, SUFFIX, Index, build_index, read_weight_map
from saccade.checkpoint.starts import Header, read_start
from saccade.errors import CheckpointError, Problem

FIRST_GUESS = 64 << 10  # bytes fetched of a header whose length cannot be guessed
LINE_BYTES = 100  # guessed bytes of a header line beside its name; real ones have 75 to 95
JSON_LIMIT = HEADER_LIMIT
DEADLINE = 300.0  # seconds for one file, however slowly it drips


@dataclass
class Repository:
    """One repository at one commit: the files at its top level, and the bytes fetched so far."""

    site: Site
    name: str
    revision: str
    commit: str = ""
    sizes: dict[str, int | None] = field(default_factory=dict)
    blobs: dict[str, str] = field(default_factory=dict)  # the names of files' contents, where the hub tells them
    folder: Path | None = None  # in the download cache: what is there need not be fetched
    fetched: list[int] = field(default_factory=list)  # append is atomic: threads need no lock

    def find_cached(self, file: str) -> Path | None:
        """Where a file lies whole on this machine."""
        path = None if self.folder is None else self.folder / file
        try:
            is_whole = path is not None and self.sizes.get(file) in (None, path.stat().st_size)
        except OSError:  # not there, or a link whose content is gone
            return None
        return path if is_whole else None

    def url(self, file: str) -> str:
        return f"{self.site.endpoint}/{self.name}/resolve/{quote(self.commit, safe='')}/{quote(file)}"


@contextmanager
def open_repository(
    name: str,
    revision: str = "main",
    endpoint: str | None = None,
    wait: float = 0.5,
    tell: Tell = lambda _: None,
) -> Iterator[Repository]:
    """The repository `name` ("org/name") as `revision` is now. CheckpointError for: no such repository, no access, no
    network, no server of models; Unreachable, a kind of it, for what may be another time.

    `wait` are the seconds before the first of at most 3 repetitions, doubled for each. With something in the cache to
    fall back to, a server that cannot be reached is asked once.
    """
    attempts = 1 if find_snapshot(name, revision) else ATTEMPTS
    with open_site(name, endpoint, wait, tell, attempts) as site:
        repository = Repository(site, name, revision)
        list_files(repository)
        site.attempts = ATTEMPTS
        repository.folder = find_snapshot(name, repository.commit)
        yield repository


def read_remote(
    name: str,
    revision: str = "main",
    endpoint: str | None = None,
    wait: float = 0.5,
    tell: Tell = lambda _: None,
) -> tuple[bytes, Index]:
    """Fetch what `read_index` would read, of the repository `name`: its config.json, as bytes, and its Index, whose
    `bytes_read` are all bytes fetched. Arguments and errors: as for `open_repository`, and CheckpointError for a
    server without byte ranges. HF_HUB_OFFLINE is the caller's to look at.
    """
    with open_repository(name, revision, endpoint, wait, tell) as repository:
        return read_repository(repository)


def read_repository(repository: Repository) -> tuple[bytes, Index]:
    """config.json, as bytes, and the Index."""
    config = read_whole(repository, "config.json")
    listing = None
    if INDEX_FILE in repository.sizes:
        raw = read_whole(repository, INDEX_FILE)
        listing = Header(INDEX_FILE, len(raw), raw)
    guesses = guess_headers(listing)
    files = sorted(f for f in repository.sizes if f.endswith(SUFFIX))
    found = work_through(repository.site, files, lambda f: fetch_header(repository, f, guesses.get(f, FIRST_GUESS)))
    index = build_index(repository.name, listing, found)
    return config, replace(index, bytes_read=sum(repository.fetched))


def read_whole(repository: Repository, file: str) -> bytes:
    """A small file, from the cache if it is there."""
    cached = repository.find_cached(file)
    if cached is not None:
        try:
            return cached.read_bytes()
        except OSError:  # fetch it, then
            pass
    return fetch(repository, file).body


def list_files(repository: Repository) -> None:
    """Fill in the commit that the revision means now, and the top-level files with their sizes."""
    endpoint, revision = repository.site.endpoint, repository.revision
    url = f"{endpoint}/api/models/{repository.name}/revision/{quote(revision, safe='')}?blobs=true"
    raw = fetch(repository, "", url=url).body
    try:
        value, _ = parse_json(raw)
        top = [f for f in value["siblings"] if "/" not in f["rfilename"]]
        sizes = {f["rfilename"]: f.get("size") for f in top}
        blobs = {f["rfilename"]: (f.get("lfs") or {}).get("sha256") or f.get("blobId") for f in top}
        repository.blobs = {f: blob for f, blob in blobs.items() if isinstance(blob, str)}
        repository.commit = str(value.get("sha") or revision)
    except (ValueError, KeyError, TypeError, AttributeError):
        text = f"{repository.name}: {endpoint} gave no list of files; is it a Hugging Face server?"
        raise CheckpointError(text) from None
    if (foreign := describe_names(sizes)) is not None:
        raise CheckpointError(f"{repository.name}: {foreign}")
    if "config.json" not in sizes:
        raise CheckpointError(f"{repository.name}: the repository has no config.json, so it is no model")
    if not any(f.endswith(SUFFIX) for f in sizes):  # a list of files, and none of them
        raise CheckpointError(f"{repository.name}: the repository has no {SUFFIX} file")
    repository.sizes = {f: size if isinstance(size, int) and size >= 0 else None for f, size in sizes.items()}


def guess_headers(listing: Header | None) -> Mapping[str, int]:
    """About how long each file's header is, from the names in index.json: it saves a second round trip per file."""
    guesses: Counter[str] = Counter()
    problems: list[Problem] = []
    for name, file in ((listing and read_weight_map(listing, problems)) or {}).items():
        guesses[file] += len(name) + LINE_BYTES
    return {file: min(8 + LINE_BYTES + guess, JSON_LIMIT) for file, guess in guesses.items()}


def fetch_header(repository: Repository, file: str, guess: int) -> Header:
    """The first bytes of a file up to the end of its header: one request, or two where the guess was short."""
    cached = repository.find_cached(file)
    if cached is not None:
        return read_start(cached.parent, file)
    if repository.sizes.get(file) == 0:  # a range of nothing is an error to a server
        return Header(file, 0, b"")
    answer = fetch(repository, file, 0, guess)
    size = answer.size if answer.size is not None else repository.sizes.get(file)
    if size is None:
        raise CheckpointError(f"{repository.name}: the server does not tell the size of {file}")
    raw = answer.body
    end = header_bytes(raw, file, size)
    if isinstance(end, Problem):
        return Header(file, size, raw, end)
    if len(raw) < end:
        raw += fetch(repository, file, len(raw), end, answer.url).body
    return Header(file, size, raw[:end])


class Answer(NamedTuple):
    body: bytes
    size: int | None  # of the whole file, if the server said so
    url: str  # where redirects ended


def fetch(repository: Repository, file: str, start: int = 0, stop: int | None = None, url: str | None = None) -> Answer:
    """A file, or its bytes from `start` to `stop`, asked for again if the trouble looks temporary.

    Never reads more than it asked for, even from a server that ignores ranges and begins to send 5 GB.
    """
    where = url or repository.url(file)
    what = file or "the list of files"
    return persist(repository.site, what, lambda: request(repository, file, start, stop, where))


def request(repository: Repository, file: str, start: int, stop: int | None, url: str) -> Answer | Trouble:
    """One attempt: the answer, or why another attempt may help. CheckpointError if none will."""
    name, what, deadline = repository.name, file or "the list of files", time.monotonic() + DEADLINE
    headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
    with repository.site.client.stream("GET", url, headers=headers) as response:
        trouble = check_status(repository.site, what, response, is_listing=not file)
        if trouble is not None:
            return trouble
        size = total_size(response)
        if response.status_code == 200 and stop is not None:
            size = size if size is not None else repository.sizes.get(file)
            if size is None or size > stop or start:
                text = f"{name}: the server ignored the byte range asked of {file} and would send all of it"
                raise CheckpointError(f"{text}; download the model and give its path")
        limit = JSON_LIMIT if stop is None else stop - start
        body = bytearray()
        for chunk in response.iter_raw(64 << 10):
            body += chunk
            if len(body) > limit or time.monotonic() > deadline or repository.site.stopped.is_set():
                break
        repository.fetched.append(len(body))
        if time.monotonic() > deadline:
            raise CheckpointError(f"{name}: {what} came too slowly: {len(body):,} bytes in {DEADLINE:.0f} s")
        if len(body) > limit and stop is None:
            raise CheckpointError(f"{name}: {what} has more than {limit:,} bytes")
        wanted = limit if size is None else min(limit, size - start)
        if len(body) < wanted and (stop is not None or size is not None):
            return Trouble(f"{len(body):,} of {wanted:,} bytes came")
        return Answer(bytes(body[:limit]), size, str(response.url))


def total_size(response: httpx.Response) -> int | None:
    """The size of the whole file, from an answer to a range or to a plain request."""
    if response.status_code == 206:
        total: Any = response.headers.get("content-range", "").rpartition("/")[2]
    else:
        total = response.headers.get("content-length", "")
    return int(total) if total.isdecimal() and len(total) < 20 else None
