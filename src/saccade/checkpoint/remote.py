"""The Index of a model on the Hugging Face Hub, without downloading it: config.json, index.json and file headers.

Headers are fetched by HTTP ranges, so that 690 GB cost about 23 MB. Knows no torch and no plan; what the headers mean
is index.py's. A failing network is one CheckpointError; a broken header is a Problem in the Index, as it is for local
files. Next: open.py, which decides whether a model is a path or an id.
"""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from saccade.checkpoint.header import HEADER_LIMIT, header_bytes, parse_json
from saccade.checkpoint.index import INDEX_FILE, SUFFIX, Header, Index, build_index, read_weight_map
from saccade.errors import CheckpointError, Problem

THREADS = 8
ATTEMPTS = 4
FIRST_GUESS = 64 << 10  # bytes fetched of a header whose length cannot be guessed
LINE = 100  # guessed bytes of a header line beside its name; real ones have 75 to 95
JSON_LIMIT = HEADER_LIMIT
DEADLINE = 300.0  # seconds for one file, however slowly it drips
TEMPORARY = {408, 429, 500, 502, 503, 504}


@dataclass
class Repository:
    """One repository at one commit: an open connection, the files at its top level, and the bytes fetched so far."""

    name: str
    endpoint: str
    client: httpx.Client
    wait: float
    commit: str = "main"
    sizes: dict[str, int | None] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)  # append is atomic: threads need no lock


def read_remote(
    name: str, revision: str = "main", endpoint: str | None = None, wait: float = 0.5
) -> tuple[bytes, Index]:
    """Fetch what `read_index` would read, of the repository `name` ("org/name"): its config.json, as bytes, and its
    Index, whose `bytes_read` are all bytes fetched.

    `endpoint` is huggingface_hub's unless given; `wait` are the seconds before the first of at most 3 repetitions,
    doubled for each. CheckpointError for: no such repository, no access, no network, a server without byte ranges.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE and endpoint is None:
        raise CheckpointError(f"{name}: no such path, and HF_HUB_OFFLINE forbids to look for it on the network")
    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    headers = {**build_hf_headers(library_name="saccade"), "Accept-Encoding": "identity"}
    limits = httpx.Limits(max_connections=THREADS)
    timeout = httpx.Timeout(30.0, connect=10.0)
    with httpx.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=True) as client:
        repository = Repository(name, endpoint, client, wait)
        list_files(repository, revision)
        config = fetch(repository, "config.json").body
        listing = None
        if INDEX_FILE in repository.sizes:
            raw = fetch(repository, INDEX_FILE).body
            listing = Header(INDEX_FILE, len(raw), raw)
        guesses = guess_headers(listing)
        files = sorted(f for f in repository.sizes if f.endswith(SUFFIX))
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda f: fetch_header(repository, f, guesses.get(f, FIRST_GUESS)), files))
    index = build_index(name, listing, found)
    return config, replace(index, bytes_read=sum(repository.fetched))


def list_files(repository: Repository, revision: str) -> None:
    """Fill in the commit that `revision` means now, and the top-level files with their sizes."""
    url = f"{repository.endpoint}/api/models/{repository.name}/revision/{quote(revision, safe='')}?blobs=true"
    raw = fetch(repository, "", url=url).body
    try:
        value, _ = parse_json(raw)
        sizes = {f["rfilename"]: f.get("size") for f in value["siblings"] if "/" not in f["rfilename"]}
        repository.commit = str(value.get("sha") or revision)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = f"{repository.name}: {repository.endpoint} gave no list of files; is it a Hugging Face server?"
        raise CheckpointError(text) from None
    if "config.json" not in sizes:
        raise CheckpointError(f"{repository.name}: the repository has no config.json, so it is no model")
    if not any(f.endswith(SUFFIX) for f in sizes):
        raise CheckpointError(f"{repository.name}: the repository has no {SUFFIX} file")
    repository.sizes = {f: size if isinstance(size, int) and size >= 0 else None for f, size in sizes.items()}


def guess_headers(listing: Header | None) -> Mapping[str, int]:
    """About how long each file's header is, from the names in index.json: it saves a second round trip per file."""
    guesses: Counter[str] = Counter()
    problems: list[Problem] = []
    for name, file in ((listing and read_weight_map(listing, problems)) or {}).items():
        guesses[file] += len(name) + LINE
    return {file: min(8 + LINE + guess, JSON_LIMIT) for file, guess in guesses.items()}


def fetch_header(repository: Repository, file: str, guess: int) -> Header:
    """The first bytes of a file up to the end of its header: one request, or two where the guess was short."""
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
    if url is None:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(repository.name, file, revision=repository.commit, endpoint=repository.endpoint)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(repository.wait * 2 ** (attempt - 1))
        try:
            answer = request(repository, file, start, stop, url)
        except httpx.TransportError as e:
            trouble = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as e:
            raise CheckpointError(f"{repository.name}: {file or 'list of files'}: {e}") from None
        else:
            if isinstance(answer, Answer):
                return answer
            trouble = answer
    what = file or "the list of files"
    raise CheckpointError(
        f"{repository.name}: no such path, and {what} cannot be fetched from {repository.endpoint}"
        f" ({trouble[:200]}, {ATTEMPTS} attempts); check the network, or download the model and give its path"
    )


def request(repository: Repository, file: str, start: int, stop: int | None, url: str) -> Answer | str:
    """One attempt: the answer, or why another attempt may help. CheckpointError if none will."""
    name, deadline = repository.name, time.monotonic() + DEADLINE
    headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
    with repository.client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status in TEMPORARY:
            return f"HTTP {status}"
        check_status(repository, file, status)
        size = total_size(response)
        if status == 200 and stop is not None:
            size = size if size is not None else repository.sizes.get(file)
            if size is None or size > stop or start:
                text = f"{name}: the server ignored the byte range asked of {file} and would send all of it"
                raise CheckpointError(f"{text}; download the model and give its path")
        limit = JSON_LIMIT if stop is None else stop - start
        body = bytearray()
        for chunk in response.iter_raw(64 << 10):
            body += chunk
            if len(body) > limit or time.monotonic() > deadline:
                break
        repository.fetched.append(len(body))
        if time.monotonic() > deadline:
            raise CheckpointError(f"{name}: {file or 'the list of files'} came too slowly: {len(body):,} bytes")
        if len(body) > limit and stop is None:
            raise CheckpointError(f"{name}: {file or 'the list of files'} has more than {limit:,} bytes")
        wanted = limit if size is None else min(limit, size - start)
        if stop is not None and len(body) < wanted:
            return f"{len(body):,} of {wanted:,} bytes came"
        return Answer(bytes(body[:limit]), size, str(response.url))


def check_status(repository: Repository, file: str, status: int) -> None:
    """CheckpointError, in words, for an answer that asking again will not change."""
    if status in (200, 206):
        return
    name, server = repository.name, repository.endpoint
    if not file and status in (401, 404):
        text = f"{name}: no such path, and no such model on {server} (or it is private: log in with `hf auth login`)"
    elif status in (401, 403):
        text = f"{name}: {server} refuses access (HTTP {status}); accept the model's terms there and log in"
    else:
        text = f"{name}: {server} answers HTTP {status} for {file or 'the list of files'}"
    raise CheckpointError(text)


def total_size(response: httpx.Response) -> int | None:
    """The size of the whole file, from an answer to a range or to a plain request."""
    if response.status_code == 206:
        total: Any = response.headers.get("content-range", "").rpartition("/")[2]
    else:
        total = response.headers.get("content-length", "")
    return int(total) if total.isdecimal() else None
