"""Requests to a model hub: asked again while that may help, and every trouble told in words.

Temporary troubles are asked again a few times; a server that says when to come back is believed, for PATIENCE seconds
in all. What cannot get better is raised at once. Knows no model, no header of a file and no cache. Next: remote.py.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx

from saccade.base.values import show
from saccade.checkpoint.hub.snapshot import Tell as Tell
from saccade.checkpoint.hub.snapshot import read_environment
from saccade.errors import CheckpointError

THREADS = 8
ATTEMPTS = 4  # in a row in which not one byte came
BUSY_ATTEMPTS = 8  # of a server that is busy and does not say for how long: 64 s with waits from 0.5 s on, doubled
BUSY_STATUS = {429, 503}
TEMPORARY = {408, 500, 502, 504, *BUSY_STATUS}
BUSY_PATIENCE = 120.0  # seconds that a busy server may make one request wait in all
LONG_WAIT = 2.0  # seconds: longer waits are told
TIMEOUT = httpx.Timeout(30.0, connect=10.0)

T = TypeVar("T")
Item = TypeVar("Item")


class Unreachable(CheckpointError):
    """The server cannot be reached, or is busy for too long: what lies in the cache may do instead."""


class Trouble(NamedTuple):
    """Why an attempt failed, if another may help."""

    text: str
    after: float | None = None  # seconds to wait, if the server says so
    is_busy: bool = False
    has_progressed: bool = False  # some bytes came, and the next attempt goes on behind them


@dataclass
class Site:
    """A server as one model is asked of it: an open connection, and what all threads that use it share."""

    name: str  # of the model: the beginning of every text
    endpoint: str
    client: httpx.Client
    wait: float  # seconds before the first repetition
    tell: Tell
    attempts: int = ATTEMPTS
    stopped: threading.Event = field(default_factory=threading.Event)
    until: float = 0.0  # monotonic: nobody asks before
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pause(self, seconds: float) -> None:
        """Wait, unless all are told to stop."""
        if self.stopped.wait(max(0.0, seconds)):
            raise CheckpointError(f"{self.name}: stopped")

    def hold(self, seconds: float, why: str) -> None:
        """Let nobody ask for so long; says so once if it is long."""
        with self.lock:
            until = time.monotonic() + seconds
            if until > self.until + LONG_WAIT and seconds > LONG_WAIT:
                self.tell(f"{self.name}: {self.endpoint} is busy ({why}); waiting {seconds:,.0f} s")
            self.until = max(self.until, until)


@contextmanager
def open_site(
    name: str, endpoint: str | None = None, wait: float = 0.5, tell: Tell = lambda _: None, attempts: int = ATTEMPTS
) -> Iterator[Site]:
    """A connection to `endpoint`, huggingface_hub's unless given, with the token that huggingface_hub finds.

    CheckpointError for an address, a proxy, certificates or a token that cannot be used.
    """
    endpoint = check_endpoint(name, endpoint or read_environment().ENDPOINT)
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        headers = {**build_hf_headers(library_name="saccade"), "Accept-Encoding": "identity"}
    except Exception as error:  # the file that `hf auth login` writes cannot be read
        raise CheckpointError(f"{name}: the token of `hf auth login` cannot be read: {say_error(error)}") from error
    token = headers.get("authorization", "")
    if not (token.isascii() and token.isprintable()):
        raise CheckpointError(f"{name}: the token (HF_TOKEN, or of `hf auth login`) has characters that no token has")
    try:
        limits = httpx.Limits(max_connections=2 * THREADS)
        client = httpx.Client(headers=headers, timeout=TIMEOUT, limits=limits, follow_redirects=True)
    except Exception as error:  # a proxy of a kind that needs a package, an address that is none, lost certificates
        text = f"{name}: no connection can be made{show_proxy()}: {say_error(error)}"
        if isinstance(error, OSError):
            text += "; look at SSL_CERT_FILE and SSL_CERT_DIR"
        raise CheckpointError(text) from error
    with client:
        yield Site(name, endpoint, client, wait, tell, attempts)


def check_endpoint(name: str, endpoint: str) -> str:
    """`endpoint` without a slash at its end. CheckpointError if it is no address of a server."""
    try:
        parts = urlsplit(endpoint)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or a bracket too many
        is_right = False
    if not is_right or not endpoint.isprintable() or " " in endpoint:
        text = f"expected the hub's address, like https://huggingface.co, in HF_ENDPOINT, found {show(endpoint)}"
        raise CheckpointError(f"{name}: {text}")
    return endpoint.rstrip("/")


def persist(site: Site, what: str, attempt: Callable[[], T | Trouble]) -> T:
    """What `attempt` returns at last, or Unreachable. `attempt` says with Trouble that another may help."""
    failed, waited = 0, 0.0
    while True:
        site.pause(site.until - time.monotonic())
        try:
            answer = attempt()
        except CheckpointError:
            raise
        except Exception as error:  # whatever httpx, ssl and sockets raise
            answer = find_trouble(site, what, error)
        if not isinstance(answer, Trouble):
            return answer
        failed = 1 if answer.has_progressed else failed + 1
        most = BUSY_ATTEMPTS if answer.is_busy else site.attempts
        pause = site.wait * 2.0 ** (failed - 1)
        if answer.after is not None:
            pause = max(answer.after, pause)
            if waited + pause > BUSY_PATIENCE:
                when = datetime.now() + timedelta(seconds=pause)
                text = f"{site.endpoint} is busy ({answer.text}) and says to come back in {pause:,.0f} s"
                raise Unreachable(f"{site.name}: {text}, at {when:%H:%M}; a token (HF_TOKEN) may raise the limit")
            waited += pause
        elif failed >= most:
            text = f"{site.name}: no such path, and {what} cannot be fetched from {site.endpoint}{show_proxy()}"
            text += f" ({answer.text[:200]}, {failed} attempts); "
            cure = "try again later" if answer.is_busy else "check the network"
            raise Unreachable(f"{text}{cure}, or download the model and give its path")
        if answer.is_busy:
            site.hold(pause, answer.text)
        else:
            site.pause(pause)


def find_trouble(site: Site, what: str, error: Exception) -> Trouble:
    """Trouble for what may be gone at the next attempt; CheckpointError for what will stay."""
    text = say_error(error)
    stays = f"{site.name}: {what} cannot be fetched from {site.endpoint}{show_proxy()}: "
    if isinstance(error, httpx.ProxyError) and "407" in text:
        raise CheckpointError(stays + ask_password()) from error
    if isinstance(error, httpx.TooManyRedirects):
        raise CheckpointError(stays + "it redirects in a circle") from error
    if "CERTIFICATE_VERIFY_FAILED" in text:
        cure = "a company's own certificates go into the file that SSL_CERT_FILE names"
        raise CheckpointError(f"{stays}its certificate cannot be verified ({text[:200]}); {cure}") from error
    if any(mark in text for mark in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "record layer failure")):
        raise CheckpointError(stays + "it does not speak TLS; is its address http:// and not https://?") from error
    if not isinstance(error, httpx.TransportError) or isinstance(error, httpx.UnsupportedProtocol):
        raise CheckpointError(stays + text[:300]) from error
    return Trouble(text)


def check_status(site: Site, what: str, response: httpx.Response, is_listing: bool = False) -> Trouble | None:
    """None for an answer with a body, Trouble for one that may change; CheckpointError, in words, for all others."""
    status, headers = response.status_code, response.headers
    if status in (200, 206):
        if headers.get("content-type", "").startswith("text/html"):
            text = f"{site.endpoint} answered with a web page in place of {what}; is it a Hugging Face server"
            raise CheckpointError(f"{site.name}: {text}, or does a network's login page stand before it?")
        if headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(f"{site.name}: {site.endpoint} compresses {what} although it was asked not to")
        return None
    if status in TEMPORARY:
        reason = "HTTP 429: too many requests" if status == 429 else f"HTTP {status}"
        return Trouble(reason, read_wait(headers) if status in BUSY_STATUS else None, status in BUSY_STATUS)
    code, said = headers.get("x-error-code", ""), " ".join(headers.get("x-error-message", "").split())[:200]
    where, login = f"{site.endpoint}", "log in with `hf auth login`, or set HF_TOKEN"
    if code == "GatedRepo":
        text = f"{where} refuses access (HTTP {status}); accept the model's terms at {where}/{site.name}, then {login}"
    elif code == "RevisionNotFound":
        text = f"{where} has the model, but not this revision: {said or 'no such branch, tag or commit'}"
    elif is_listing and status in (401, 404):
        text = f"no such path, and no such model on {where} (or no such revision, or it is private: {login})"
    elif status in (401, 403):
        said = f": {said}" if said else ""
        text = f"{where} refuses access (HTTP {status}{said}); accept the model's terms there, and {login}"
    elif status == 407:
        text = f"{what} cannot be fetched from {where}{show_proxy()}: {ask_password()}"
    elif status in (301, 302, 303, 307, 308):
        text = f"{where} redirects {what} to nowhere (HTTP {status})"
    else:
        text = f"{where} answers HTTP {status} for {what}" + (f": {said}" if said else "")
    raise CheckpointError(f"{site.name}: {text}")


def read_wait(headers: httpx.Headers) -> float | None:
    """Seconds that a busy server asks to wait: Retry-After, in seconds or as a date, or the hub's own RateLimit."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return float(text)
    date = read_date(text)
    if date is not None:
        now = read_date(headers.get("date", "")) or datetime.now(UTC)  # by the server's own clock, if it tells it
        return max(0.0, (date - now).total_seconds())
    found = re.search(r"\bt=(\d{1,9})\b", headers.get("ratelimit", ""), re.ASCII)
    return float(found[1]) if found else None


def read_date(text: str) -> datetime | None:
    """A date of HTTP, which is in UTC; None for what is none."""
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def say_error(error: BaseException) -> str:
    """An exception of a library on one line, by its class if it has no text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def show_proxy() -> str:
    """Which proxies the environment names, without passwords: " through the proxy http://..."; "" for none."""
    urls = dict.fromkeys(re.sub(r"//[^/]*@", "//...@", url) for kind, url in getproxies().items() if kind != "no")
    return f" through the proxy {' or '.join(urls)}" if urls else ""


def ask_password() -> str:
    return "the proxy wants a password (HTTP 407); write HTTPS_PROXY=http://user:password@host:port"


def work_through(site: Site, items: Iterable[Item], do: Callable[[Item], T]) -> list[T]:
    """`do` of every item, in THREADS threads, in order. The first exception, or Ctrl-C, stops all: those at work end
    at their next byte or wait, and nobody waits for them."""
    todo = list(items)
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    queue = iter(range(len(todo)))  # next() on it is atomic
    ended = threading.Semaphore(0)

    def work() -> None:
        try:
            while not site.stopped.is_set() and (place := next(queue, None)) is not None:
                results[place] = do(todo[place])
        except BaseException as error:  # raised again in the caller's thread
            if not site.stopped.is_set():
                failures.append(error)
            site.stopped.set()
        finally:
            ended.release()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(THREADS, len(todo)))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            ended.acquire()
            if failures:
                raise failures[0]
    except BaseException:
        site.stopped.set()
        raise
    return [results[place] for place in range(len(todo))]
