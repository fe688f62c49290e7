"""Turns: many threads at one object that only one may use at a time, step by step.

Whoever waits for something steps for everybody until it has come; the others sleep until theirs has, or until they are
the one to step. A turn lasts one step. Turns are given in order of arrival: the thread that steps queues for each step
like all others, so nobody waits for more than the turns before its own. Knows neither requests nor tensors, and runs no
thread of its own. Next: shared.py, an engine behind it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident, local

from saccade.base.hold import Hold
from saccade.errors import RequestError

Action = Callable[[], None]


class Waiter:
    """A thread that waits until `is_done`; `step` is what it does meanwhile, if it is the one to do it."""

    def __init__(self, is_done: Callable[[], bool], step: Callable[[], object] | None) -> None:
        self.is_done, self.step = is_done, step
        self.is_over = False  # `is_done` was true at the end of a turn
        self._gate = make_gate()

    def sleep(self) -> None:
        self._gate.acquire()

    def wake(self) -> None:
        """From its next sleep, if it is awake. Called by one thread at a time."""
        if self._gate.locked():
            self._gate.release()


class Turns:
    """Who is in, who is next, and who waits for what."""

    def __init__(self, enter: Action = lambda: None) -> None:
        """`enter` is called in each thread, inside the first of its turns."""
        self.hold = Hold()  # a turn is not interrupted, but for what it opens
        self._enter = enter
        self._known = local()  # whether this thread has entered
        self._mutex = Lock()  # of the fields below, for moments
        self._owner: int | None = None  # the thread whose turn it is
        self._queue: deque[tuple[Lock, int]] = deque()  # the gates of those who want one, in order of arrival
        self._waiters: list[Waiter] = []  # in order of arrival
        self._leader: Waiter | None = None  # the one that steps
        self._posted: deque[Action] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else is in meanwhile. Waits for the turns before this one. RequestError inside another of the same
        thread: a signal handler or a finalizer would wait for itself."""
        with self.hold:
            self._take()
            try:
                if not hasattr(self._known, "has_entered"):
                    self._enter()
                    self._known.has_entered = True
                yield
            finally:
                self._end()

    def wait(self, is_done: Callable[[], bool], step: Callable[[], object] | None = None) -> None:
        """Until `is_done`, which is asked between turns only. Without `step` somebody else has to bring it about.

        `step` is called in a turn, as often as needed, by one of those who wait. What it raises ends the wait of that
        thread alone; another takes over.
        """
        me = Waiter(is_done, step)
        with self.hold:
            try:
                with self._mutex:
                    self._waiters.append(me)
                while not self._is_over(me):
                    if self._leader is me and step is not None:
                        with self.turn():
                            if not is_done():
                                step()
                        with self.hold.opened():  # a step that opens nothing is interrupted behind it
                            pass
                    else:
                        with self.hold.opened():
                            me.sleep()
            finally:
                self._quit(me)

    def post(self, action: Action) -> None:
        """Have `action` done at once if it is nobody's turn, else at the end of this one. Never waits, so finalizers
        may: garbage is collected in any thread, at any moment."""
        self._posted.append(action)
        self._do_posted()

    def _take(self) -> None:
        me, gate = get_ident(), make_gate()
        with self._mutex:
            if self._owner == me:
                raise RequestError(
                    "called in the middle of its own step, by a signal handler or a finalizer: call it from a thread"
                )
            if self._owner is None:
                self._owner = me
                return
            self._queue.append((gate, me))
        try:
            with self.hold.opened():
                gate.acquire()
        except BaseException:
            with self._mutex:
                is_mine = (gate, me) not in self._queue  # it came all the same
                if not is_mine:
                    self._queue.remove((gate, me))
            if is_mine:
                self._end()
            raise

    def _end(self) -> None:
        self._give()
        self._do_posted()

    def _give(self) -> None:
        """End a turn: do what was posted, wake those whose wait is over, let the next one in."""
        try:
            while self._posted:
                self._posted.popleft()()
        finally:
            with self._mutex:
                for waiter in self._waiters:
                    if not waiter.is_over and waiter.is_done():
                        waiter.is_over = True
                        waiter.wake()
                if self._queue:
                    gate, self._owner = self._queue.popleft()
                    gate.release()
                else:
                    self._owner = None

    def _do_posted(self) -> None:
        """Unless it is somebody's turn, who does it then. A mutex that is held may be held by this very thread, in
        which garbage is collected; whoever holds it comes here afterwards."""
        while self._posted:
            with self.hold:
                if not self._mutex.acquire(blocking=False):
                    return
                try:
                    if self._owner is not None:
                        return
                    self._owner = get_ident()
                finally:
                    self._mutex.release()
                self._give()

    def _is_over(self, me: Waiter) -> bool:
        with self._mutex:
            if not me.is_over and self._owner is None:
                me.is_over = me.is_done()
            if self._leader is None and me.step is not None and not me.is_over:
                self._leader = me
            return me.is_over

    def _quit(self, me: Waiter) -> None:
        """Leave, and name another one to step."""
        with self._mutex:
            if me in self._waiters:
                self._waiters.remove(me)
            if self._leader is me:
                self._leader = next((w for w in self._waiters if w.step is not None and not w.is_over), None)
                if self._leader is not None:
                    self._leader.wake()
        self._do_posted()


def make_gate() -> Lock:
    """Closed; `release` opens it for one `acquire`."""
    gate = Lock()
    gate.acquire()
    return gate
