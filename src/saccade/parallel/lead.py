"""Rank 0's side: it starts the other ranks of its machine, or meets those that torchrun started, and leads them.

What all ranks do, rank 0 tells them in one message each time; they answer where an answer is asked for. watch.py looks
after them meanwhile. Knows no models: messages are JSON objects. Next: follow.py, the other side.
"""

import os
import secrets
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import saccade
from saccade.errors import RankError, SaccadeError
from saccade.parallel.link import LinkClosed, RankLink, RankMessage, pack_message
from saccade.parallel.place import NOT_FOR_CHILDREN, RankPlace
from saccade.parallel.progress import HANG_SECONDS, Tracker
from saccade.parallel.watch import GRACE, Peer, RankWatch

MEETING_SECONDS = 300.0  # for the ranks that torchrun starts to come: importing torch over a network takes a minute
ADDRESS = "saccade/address"  # key of the store under which rank 0 is to be found


class Store(Protocol):
    """What is used of torch.distributed's."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Lead:
    """Rank 0 and the others. `tell`, `ask` and `collect` raise RankError once a rank is gone."""

    def __init__(self, hang_seconds: float = HANG_SECONDS) -> None:
        self.tracker = Tracker()
        self.watch = RankWatch(self.tracker, socket.gethostname(), hang_seconds)
        self._telling = Lock()  # all ranks get all messages in one order
        self._owner = os.getpid()

    def start_local(self, ranks: int, module: str) -> None:
        """Start ranks 1 to `ranks` - 1 on this machine: `python -m module`."""
        self.watch.start(lambda: start_peers(ranks, module))

    def meet(self, place: RankPlace, store: Store, host: str) -> None:
        """Let the ranks that torchrun started come, by an address at `host` that `store` tells them."""
        self.watch.start(lambda: meet_peers(place, store, host))

    @property
    def peers(self) -> list[Peer]:
        return self.watch.peers

    def tell(self, head: Mapping[str, Any], payload: bytes | memoryview = b"") -> None:
        """Send every rank a message."""
        self.check()
        packed = pack_message(head, len(payload))
        with self._telling:
            for peer in self.peers:
                try:
                    peer.link.send(packed, payload)
                except LinkClosed:
                    raise self.explain(None) from None

    def tell_each(self, heads: Sequence[Mapping[str, Any]]) -> None:
        """Send each rank, from rank 1 on, a message of its own."""
        self.check()
        with self._telling:
            for peer, head in zip(self.peers, heads, strict=True):
                try:
                    peer.link.send(pack_message(head))
                except LinkClosed:
                    raise self.explain(None) from None

    def collect(self) -> list[RankMessage]:
        """One reply of each rank, from rank 1 on."""
        return self.watch.await_replies()

    def ask(self, head: Mapping[str, Any]) -> list[RankMessage]:
        self.tell(head)
        return self.collect()

    def check(self) -> None:
        """Raise RankError if a rank is gone."""
        self.watch.check()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While rank 0 does what others take part in: if one of them goes, rank 0 has to come back from it soon."""
        self.watch.busy += 1
        try:
            yield
        finally:
            self.watch.busy -= 1

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Something that all ranks do. What it raises here ends all of them: as a RankError that names the cause."""
        self.check()
        try:
            with self.busy():
                yield
                self.check()
        except Exception as error:
            if isinstance(error, RankError):  # it says all
                self.watch.end_with(error)
                raise
            raise self.explain(error) from error
        except BaseException as error:  # Ctrl-C, or the end of the process: the others wait for this rank
            self.watch.fail(0, f"left {what}: {type(error).__name__}")
            raise

    def explain(self, error: Exception | None) -> RankError:
        """Why rank 0 cannot go on: another rank is gone, which may take a moment to show, or else `error`."""
        watch = self.watch
        with watch.news:
            watch.news.wait_for(lambda: watch.failure is not None or watch.is_over, 2 * GRACE)
        if watch.failure is None:
            watch.fail(0, "lost a connection to the others" if error is None else describe_error(error))
        return RankError(str(watch.failure or "the ranks of this model have ended"))

    def close(self, wait: bool = True) -> None:
        """End all ranks. May be called twice, from finalizers, and does nothing in a process that was forked."""
        if os.getpid() != self._owner:
            return
        self.watch.end()
        if wait:
            self.watch.join()


def describe_error(error: BaseException) -> str:
    """An exception of a rank as what became of it; one that is a bug of ours with its place."""
    text, name = " ".join(str(error).split())[:600], type(error).__name__
    if isinstance(error, SaccadeError):
        return f"failed: {text}"
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({os.path.basename(place[0].filename)}:{place[0].lineno})" if place else ""
    return f"failed: {name}: {text}{where}" if text else f"failed: {name}{where}"


def start_peers(ranks: int, module: str) -> list[Peer]:
    peers = list[Peer]()
    try:
        for rank in range(1, ranks):
            mine, its = socket.socketpair()
            with its:
                peers.append(Peer(rank, RankLink(mine), start_process(module, its.fileno())))
    except BaseException:
        for peer in peers:
            if peer.process is not None:
                peer.process.kill()
                peer.process.wait()
        raise
    return peers


def start_process(module: str, fd: int) -> subprocess.Popen[bytes]:
    """A rank, which finds its link at `fd`. Its own session keeps a terminal's Ctrl-C from it: that is rank 0's."""
    command = [sys.executable, "-P", "-m", module, str(fd), str(os.getpid())]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[fd],
        env=make_rank_environment(os.environ), start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    return process


def make_rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A rank's: this process' own, where this very package is found, and without torchrun's variables."""
    made = {name: value for name, value in environment.items() if name not in NOT_FOR_CHILDREN}
    here = str(Path(saccade.__file__).parent.parent)
    made["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [environment.get("PYTHONPATH")])])
    return made


def meet_peers(place: RankPlace, store: Store, host: str) -> list[Peer]:
    """Wait for all other ranks. A key from the store tells them from strangers."""
    key = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=place.ranks) as server:
        store.set(ADDRESS, f"{host} {server.getsockname()[1]} {key}")
        server.settimeout(MEETING_SECONDS)
        found: dict[int, Peer] = {}
        while len(found) < place.ranks - 1:
            try:
                sock, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(r) for r in range(1, place.ranks) if r not in found)
                raise RankError(f"rank {missing} did not come within {MEETING_SECONDS:.0f} s") from None
            sock.settimeout(10.0)
            link = RankLink.__new__(RankLink)
            with suppress(LinkClosed, OSError, ValueError, TypeError, KeyError):
                link = RankLink(sock)
                head = link.receive().head
                if secrets.compare_digest(str(head["key"]), key) and 0 < int(head["rank"]) < place.ranks:
                    rank = int(head["rank"])
                    found[rank] = Peer(rank, link)
                    continue
            sock.close()
    return [found[rank] for rank in sorted(found)]


def find_leader(place: RankPlace, store: Store) -> RankLink:
    """The link of a rank that torchrun started, to rank 0. RankError if that cannot be reached."""
    host, port, key = store.get(ADDRESS).decode().split()
    try:
        link = RankLink(socket.create_connection((host, int(port)), timeout=MEETING_SECONDS))
    except OSError as error:
        raise RankError(f"rank {place.rank} cannot reach rank 0 at {host}:{port}: {error}") from None
    link.send(pack_message({"key": key, "rank": place.rank}))
    return link
