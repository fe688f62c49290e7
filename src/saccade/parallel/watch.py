"""Rank 0's watch over the other ranks: a thread that hears them, looks after them, and ends all when one is gone.

A rank is gone when its process has ended or is stopped, when it says that it failed, when it is silent, or when it
makes no progress while others wait for it. What only follows from that (a broken connection between ranks) is not taken
for the cause. The first cause becomes `failure`; then the others are killed, so that whatever rank 0 waits for in a
collective ends too. If it does not, the process ends. Knows neither tensors nor requests. Next: lead.py.
"""

import os
import selectors
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from signal import SIGKILL
from typing import IO

from saccade.base.printable import escape_lines
from saccade.errors import RankError
from saccade.parallel.link import LinkClosed, RankLink, RankMessage, pack_message
from saccade.parallel.processes import STOPPED, describe_end, read_start_time, read_state
from saccade.parallel.progress import RankProgress, Tracker, find_hung

TICK = 0.2  # seconds between two looks at /proc
GRACE = 1.0  # seconds in which the cause of a broken connection may show
SILENT_SECONDS = 8.0  # seconds without a word from a rank that is alone on its machine: each says one every second
PATIENCE = 4.0  # seconds for rank 0 to come back from what it waits for, once the others are killed
ENDING = 2.0  # seconds for ranks to end by themselves
EXIT_CODE = 2  # of a process that cannot come back: as of other errors that a user can mend
SHOWS_LOGS = ("NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS")  # whose output somebody wants to see


class Peer:
    """Another rank, as rank 0 sees it."""

    def __init__(self, rank: int, link: RankLink, process: subprocess.Popen[bytes] | None = None) -> None:
        self.rank, self.link, self.process = rank, link, process
        self.host, self.pid, self.start = "", process.pid if process else 0, ""
        self.is_near = process is not None  # its number means it on this machine
        self.is_alone = False  # on a machine where nobody else can look after it
        self.replies = deque[RankMessage]()
        self.progress, self.moved, self.heard = RankProgress(), time.monotonic(), time.monotonic()
        self.lines = deque[str](maxlen=20)  # the last of its stderr
        self.has_left = False  # in order

    def note(self, progress: RankProgress) -> None:
        if progress[:2] != self.progress[:2] or progress.is_compiling:
            self.moved = time.monotonic()
        self.progress = progress


class RankWatch:
    """The thread. `begin` starts ranks: it does so here because the kernel kills them when their thread ends."""

    def __init__(self, own: Tracker, host: str, hang_seconds: float) -> None:
        self.peers: list[Peer] = []
        self.failure: RankError | None = None
        self.news = threading.Condition()  # a reply, a failure, or the end
        self.is_over = False
        self._own, self._host, self._hang_seconds = own, host, hang_seconds
        self._own_progress, self._own_moved = RankProgress(), time.monotonic()
        self._doubt: tuple[float, int, str] | None = None  # until when, and what is taken for the cause then
        self._selector = selectors.DefaultSelector()
        self._bell_in, self._bell_out = socket.socketpair()
        self._is_ending = False
        self.release: Callable[[], None] = lambda: None  # rank 0 from a collective that does not end by itself
        self.busy = 0  # depth of what rank 0 does that others take part in

    def start(self, begin: Callable[[], Sequence[Peer]]) -> None:
        """RankWatch the ranks that `begin` starts or meets. Raises what it raises."""
        has_begun, errors = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                self.peers = list(begin())
            except BaseException as error:
                errors.append(error)
                self._end_over()
                return
            finally:
                has_begun.set()
            self._run()

        self._thread = threading.Thread(target=run, name="saccade-watch", daemon=True)
        self._thread.start()
        has_begun.wait()
        if errors:
            raise errors[0]

    def ring(self) -> None:
        """Have the thread look at once."""
        with suppress(OSError):
            self._bell_out.send(b"!")

    def end(self) -> None:
        """Let the ranks leave. Does not wait: finalizers call it."""
        self._is_ending = True
        self.ring()

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(ENDING + 1)

    def fail(self, rank: int, reason: str, is_certain: bool = True) -> None:
        """Note why a rank is gone; of several reasons the first that is certain, or after GRACE the first."""
        if self.failure is not None or self._is_ending:
            return
        if not is_certain:
            self._doubt = self._doubt or (time.monotonic() + GRACE, rank, reason)
            return
        hosts = {peer.rank: peer.host for peer in self.peers}
        host = hosts.get(rank, "") or self._host
        self.failure = RankError(f"rank {rank} on {host} {reason}; the {len(self.peers) + 1} ranks have ended")
        self.ring()

    def end_with(self, failure: RankError) -> None:
        """End all ranks for a reason that is a whole line, unless one has been found before."""
        if self.failure is None:
            self.failure = RankError(str(failure))
            self.ring()

    def _run(self) -> None:
        self._selector.register(self._bell_in, selectors.EVENT_READ, None)
        for peer in self.peers:
            self._selector.register(peer.link.socket, selectors.EVENT_READ, peer)
            if peer.process is not None and peer.process.stderr is not None:
                self._selector.register(peer.process.stderr, selectors.EVENT_READ, peer)
        looked = 0.0
        while self.failure is None and not self._is_ending:
            self._hear(TICK)
            if time.monotonic() - looked >= TICK:
                looked = time.monotonic()
                self._look(looked)
        if self.failure is not None:
            self._kill()
            self._let_go()
        else:
            self._see_off()
        self._end_over()

    def _hear(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._bell_in.recv(4096)
            elif key.fileobj is key.data.link.socket:
                self._read_link(key.data)
            else:
                self._read_lines(key.data, key.fileobj)  # type: ignore[arg-type]

    def _read_link(self, peer: Peer) -> None:
        try:
            for message in peer.link.take_all():
                peer.heard = time.monotonic()
                self._take(peer, message)
        except LinkClosed:
            self._selector.unregister(peer.link.socket)
            if not peer.has_left:
                self.fail(peer.rank, self._describe_end(peer))

    def _take(self, peer: Peer, message: RankMessage) -> None:
        head = message.head
        if "failed" in head:
            self.fail(peer.rank, str(head["failed"]), not head.get("is_lost"))
        elif "stopped" in head:  # a neighbour saw it
            self.fail(int(head["stopped"]), "is stopped by a signal")
        elif "progress" in head:
            peer.note(RankProgress(*head["progress"]))
        elif "left" in head:
            peer.has_left = True
        else:
            with self.news:
                peer.replies.append(message)
                self.news.notify_all()

    def _read_lines(self, peer: Peer, pipe: IO[bytes]) -> None:
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(pipe)
            return
        peer.lines += data.decode(errors="replace").splitlines()
        if any(name in os.environ for name in SHOWS_LOGS):
            with suppress(OSError):
                os.write(2, data)

    def _describe_end(self, peer: Peer) -> str:
        """How a process ended whose connection is closed."""
        if peer.process is None:
            return "has ended: its connection is closed"
        with suppress(subprocess.TimeoutExpired):
            code = peer.process.wait(GRACE)
            if code > 0 and peer.process.stderr is not None:
                with suppress(OSError, ValueError, KeyError):
                    self._read_lines(peer, peer.process.stderr)
            said = f": {peer.lines[-1].strip()[:300]}" if code > 0 and peer.lines else ""
            return describe_end(code) + said
        return "has closed its connection"

    def _look(self, now: float) -> None:
        """At processes, silence and progress."""
        for peer in self.peers:
            if peer.is_near and peer.pid and read_state(peer.pid)[:1] in STOPPED and read_state(peer.pid):
                self.fail(peer.rank, "is stopped by a signal")
            elif peer.is_alone and now - peer.heard > SILENT_SECONDS:
                self.fail(
                    peer.rank, f"is silent for {SILENT_SECONDS:.0f} s: it is stopped, or its host cannot be reached"
                )
        if self._doubt is not None and now > self._doubt[0]:
            self.fail(*self._doubt[1:])
        if not self._own.is_working:
            self._own_moved = now
            for peer in self.peers:
                peer.moved = now
            return
        progress = self._own.read()
        if progress[:2] != self._own_progress[:2] or progress.is_compiling:
            self._own_moved = now
        self._own_progress = progress
        everyone = {0: progress} | {peer.rank: peer.progress for peer in self.peers}
        still = {0: now - self._own_moved} | {peer.rank: now - peer.moved for peer in self.peers}
        hung = find_hung(everyone, still, self._hang_seconds)
        if hung is not None:
            at = f" at {everyone[hung].where}" if everyone[hung].where else ""
            self.fail(hung, f"makes no progress{at} for {self._hang_seconds:.0f} s while others wait for it")

    def _kill(self) -> None:
        """All ranks but this one: what they hold open closes, and collectives with them end."""
        for peer in self.peers:
            peer.link.close()
            if peer.process is not None:
                peer.process.kill()
            elif peer.is_near and peer.start and read_start_time(peer.pid) == peer.start:
                with suppress(OSError):
                    os.kill(peer.pid, SIGKILL)
        self._reap(ENDING)

    def _reap(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for peer in self.peers:
            if peer.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    peer.process.wait(max(0.0, until - time.monotonic()))
                if peer.process.stderr is not None:
                    peer.process.stderr.close()

    def _let_go(self) -> None:
        """Tell whoever waits for a reply, and see that rank 0 comes back; else end the process with the reason."""
        with self.news:
            self.news.notify_all()
        threading.Thread(target=self.release, daemon=True).start()  # which may wait itself
        until = time.monotonic() + PATIENCE
        while self.busy:
            if time.monotonic() > until:
                with suppress(OSError):
                    os.write(2, escape_lines(f"saccade: {self.failure}\n").encode(errors="replace"))
                os._exit(EXIT_CODE)
            time.sleep(0.02)

    def _see_off(self) -> None:
        """The others leave in order; who does not is killed."""
        for peer in self.peers:
            with suppress(LinkClosed):
                peer.link.send(pack_message({"do": "end"}))
        until = time.monotonic() + ENDING
        while time.monotonic() < until and not all(peer.has_left for peer in self.peers):
            self._hear(0.05)
        self._reap(max(0.1, until - time.monotonic()))
        self._kill()
        self.release()

    def _end_over(self) -> None:
        with self.news:
            self.is_over = True
            self.news.notify_all()
        self._selector.close()
        self._bell_in.close()
        self._bell_out.close()

    def check(self) -> None:
        """Raise RankError if a rank is gone, or all were sent home."""
        if self.failure is not None:
            raise RankError(str(self.failure))
        if self.is_over or self._is_ending:
            raise RankError("the ranks of this model have ended: it was closed")

    def await_replies(self) -> list[RankMessage]:
        """The next reply of each rank. Raises RankError."""
        with self.news:
            while True:
                self.check()
                if all(peer.replies for peer in self.peers):
                    return [peer.replies.popleft() for peer in self.peers]
                self.news.wait()
