"""One file from a server that answers oddly: what ends in the cache is the file that the hub lists, or nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_hub import serve

from saccade.checkpoint.hub.download import Counter, fetch_file
from saccade.checkpoint.hub.remote import Repository, open_repository
from saccade.checkpoint.hub.web import Site

FILE = "model.safetensors"
RAW = bytes(range(256)) * 40
HALF = len(RAW) // 2
Odd = tuple[int, bytes, dict[str, str]]


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[bytes, list[str | None]]]]:
    """Fetch a file of which `partial` has come before, from a hub that answers first as `odds` say: its bytes, and the
    ranges that were asked for."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Site, "pause", lambda site, seconds: setattr(site, "until", 0.0))
    with serve({"config.json": b"{}", FILE: RAW}) as hub:

        def run(partial: bytes, *odds: Odd, has_size: bool = True) -> tuple[bytes, list[str | None]]:
            hub.ranges.clear()
            left = list(odds)
            hub.odd = lambda file, start: left.pop(0) if left else None
            with open_repository("org/name", "main", hub.url) as repository:
                prepare_cache(repository, tmp_path, partial)
                if not has_size:
                    repository.sizes.clear()
                told: list[int] = []
                counter = Counter(len(RAW), lambda done, total: told.append(done))
                fetch_file(repository, FILE, tmp_path, tmp_path / "snapshot", counter)
            assert told[-1] == len(RAW)  # what was thrown away is not counted
            return (tmp_path / "snapshot" / FILE).read_bytes(), [asked for _, asked in hub.ranges]

        yield run


def prepare_cache(repository: Repository, cache: Path, partial: bytes) -> None:
    """A cache in which another run has left `partial`."""
    for folder in ("blobs", "snapshot"):
        (cache / folder).mkdir()
    repository.blobs[FILE] = "content"  # no SHA-256: sizes and ranges alone protect
    (cache / "blobs" / "content.incomplete").write_bytes(partial)


def test_bytes_of_another_range_are_not_appended(fetch: Callable[..., tuple[bytes, list[str | None]]]) -> None:
    other = 206, RAW[:HALF], {"Content-Range": f"bytes 0-{HALF - 1}/{len(RAW)}"}  # as many as are missing
    assert fetch(RAW[:HALF], other) == (RAW, [f"bytes={HALF}-", f"bytes={HALF}-"])


def test_more_bytes_than_the_hub_lists_are_thrown_away(fetch: Callable[..., tuple[bytes, list[str | None]]]) -> None:
    longer = 200, RAW + b"more", {"Content-Length": ""}  # no length told
    assert fetch(b"", longer) == (RAW, [None, None])


def test_a_partial_file_that_is_too_long_is_begun_anew(fetch: Callable[..., tuple[bytes, list[str | None]]]) -> None:
    assert fetch(RAW + b"more") == (RAW, [None])


def test_a_range_behind_the_end_begins_anew(fetch: Callable[..., tuple[bytes, list[str | None]]]) -> None:
    """The server tells no size, so that a partial file which is too long is found by its refusal."""
    assert fetch(RAW + b"more", has_size=False) == (RAW, [f"bytes={len(RAW) + 4}-", None])
