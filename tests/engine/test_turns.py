"""Turns by themselves: nobody waits for more than the turns before their own, nobody is forgotten, nothing is lost."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

import pytest

import saccade.engine.turns as turns_module
from saccade.base.hold import Hold
from saccade.engine.turns import Turns
from saccade.errors import RequestError

LIMIT = 20  # seconds until a test that hangs fails


def start(*actions: Callable[[], object]) -> list[Thread]:
    threads = [Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[Thread]) -> None:
    end = time.monotonic() + LIMIT
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


class Counter:
    """What is stepped: one number, and who stepped."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.steps, self.inside, self.by = 0, 0, list[int]()

    def step(self) -> None:
        self.inside += 1
        assert self.inside == 1
        self.by.append(threading.get_ident())
        time.sleep(0.0005)
        self.steps += 1
        self.inside -= 1

    def until(self, steps: int) -> None:
        self.turns.wait(lambda: self.steps >= steps, self.step)


def test_a_turn_that_comes_together_with_an_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the moment at which a thread is let in and the moment at which it knows, Ctrl-C may arrive."""
    turns, ends, made = Turns(), list[str](), turns_module.make_gate

    class Interrupted:
        """A gate whose `acquire` succeeds, and raises all the same."""

        def __init__(self) -> None:
            self.gate = made()
            self.release = self.gate.release

        def acquire(self) -> None:
            self.gate.acquire()
            raise KeyboardInterrupt

    def queue() -> None:
        try:
            with turns.turn():
                ends.append("a turn")
        except KeyboardInterrupt:
            ends.append("interrupted")

    monkeypatch.setattr(turns_module, "make_gate", Interrupted)
    with turns.turn():
        threads = start(queue)
        wait_until(lambda: len(turns._queue) == 1)
        monkeypatch.setattr(turns_module, "make_gate", made)
    join([*threads, *start(queue)])
    assert ends == ["interrupted", "a turn"] and turns._owner is None and not turns._queue


def test_whether_a_wait_is_over_is_asked_between_turns_only() -> None:
    """In the middle of a turn what is waited for may be half there."""
    turns, is_inside, asked = Turns(), False, list[bool]()

    def is_done() -> bool:
        asked.append(is_inside)
        return len(asked) > 1

    with turns.turn():
        is_inside = True
        threads = start(lambda: turns.wait(is_done))
        wait_until(lambda: bool(turns._waiters))
        time.sleep(0.05)  # it looks, and goes to sleep
        is_inside = False
    with turns.turn():  # at the end of each one it is asked
        pass
    join(threads)
    assert asked and not any(asked)


def test_each_leaves_when_its_own_is_done_while_others_step() -> None:
    counter, left, wanted = Counter(), set[int](), (40, 5, 80, 10, 20, 60)

    def step() -> None:
        wait_until(lambda: len(counter.turns._waiters) + len(left) == len(wanted))  # all are there
        # In the middle of a step: who has what it waited for needs no turn to leave.
        wait_until(lambda: left == {n for n in wanted if n <= counter.steps})
        counter.step()

    def wait(steps: int) -> None:
        counter.turns.wait(lambda: counter.steps >= steps, step)
        left.add(steps)

    join(start(*(lambda n=n: wait(n) for n in wanted)))  # type: ignore[misc]
    assert counter.steps == 80, "steps that nobody waited for"
    assert len(set(counter.by)) > 1 and not counter.turns._waiters and counter.turns._leader is None


def test_a_turn_comes_between_two_steps_in_order_of_arrival() -> None:
    counter, order, begun, go = Counter(), list[str](), Event(), Event()

    def step() -> None:
        begun.set()
        if not order:
            assert go.wait(LIMIT)
        order.append("step")
        counter.steps += 1

    def visit(name: str) -> None:
        with counter.turns.turn():
            order.append(name)

    threads = start(lambda: counter.turns.wait(lambda: counter.steps >= 3, step))
    assert begun.wait(LIMIT)
    for i, name in enumerate("abc"):
        threads += start(lambda name=name: visit(name))  # type: ignore[misc]
        wait_until(lambda i=i: len(counter.turns._queue) == i + 1)  # type: ignore[misc]
    go.set()
    join(threads)
    assert order == ["step", "a", "b", "c", "step", "step"]


def test_threads_that_come_again_and_again_do_not_keep_others_from_stepping() -> None:
    counter, visits, end = Counter(), [0, 0], Event()

    def visit(who: int) -> None:
        while not end.is_set():
            with counter.turns.turn():
                visits[who] += 1

    visitors = start(lambda: visit(0), lambda: visit(1))
    wait_until(lambda: min(visits) > 0)
    join(start(lambda: counter.until(100)))
    end.set()
    join(visitors)


def test_a_waiting_thread_sleeps_until_it_is_done() -> None:
    counter, asked = Counter(), [0]

    def is_done() -> bool:
        asked[0] += 1
        return counter.steps >= 50

    threads = start(lambda: counter.until(50))
    wait_until(lambda: counter.steps > 0)
    join([*threads, *start(lambda: counter.turns.wait(is_done, counter.step))])
    assert asked[0] <= 110  # once a turn, and when it is awake


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_step_raises_ends_one_wait_and_another_thread_goes_on(error: type[BaseException]) -> None:
    counter, caught = Counter(), list[BaseException]()
    second = Event()

    def step() -> None:
        assert second.wait(LIMIT)
        raise error

    def fail() -> None:
        try:
            counter.turns.wait(lambda: counter.steps >= 10, step)
        except BaseException as e:
            caught.append(e)

    threads = start(fail)
    wait_until(lambda: counter.turns._leader is not None)
    threads += start(lambda: counter.until(10), lambda: counter.until(20))
    wait_until(lambda: len(counter.turns._waiters) == 3)
    second.set()
    join(threads)
    assert [type(e) for e in caught] == [error] and counter.steps == 20


def test_what_is_posted_is_done_at_once_or_at_the_end_of_the_turn_under_way() -> None:
    turns, done = Turns(), list[int]()
    turns.post(lambda: done.append(1))
    assert done == [1]
    with turns.turn():
        turns.post(lambda: done.append(2))
        join(start(lambda: turns.post(lambda: done.append(3))))  # does not wait
        assert done == [1]
    assert done == [1, 2, 3]


def test_what_is_posted_wakes_whom_it_concerns() -> None:
    counter, flag = Counter(), Event()
    threads = start(lambda: counter.turns.wait(flag.is_set))
    wait_until(lambda: bool(counter.turns._waiters))
    counter.turns.post(flag.set)
    join(threads)


def test_a_turn_inside_one_s_own_is_refused_instead_of_waiting_for_itself() -> None:
    turns = Turns()
    with turns.turn(), pytest.raises(RequestError, match="in the middle of its own step"), turns.turn():
        pass
    with turns.turn():  # and nothing is stuck
        pass


def test_each_thread_enters_once_and_inside_its_turn() -> None:
    entered, fails = list[int](), [True]

    def enter() -> None:
        assert turns._owner == threading.get_ident()
        if fails.pop() if fails else False:
            raise ValueError
        entered.append(threading.get_ident())

    turns = Turns(enter)

    def visit() -> None:
        for _ in range(3):
            with turns.turn():
                pass

    with pytest.raises(ValueError), turns.turn():
        raise AssertionError
    visit()
    assert entered == [threading.get_ident()]
    join(start(visit, visit))
    assert len(entered) == 3


# Ctrl-C, which comes in the main thread: the one of the tests.


@pytest.fixture(autouse=True)
def interrupts_stay_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before


def test_an_interrupt_waits_for_the_end_of_the_block_but_not_in_an_open_one() -> None:
    hold, seen = Hold(), list[str]()
    with pytest.raises(KeyboardInterrupt), hold:
        with hold:
            signal.raise_signal(signal.SIGINT)
            seen.append("inner")
        seen.append("outer")
    with pytest.raises(KeyboardInterrupt), hold:
        try:
            with hold.opened():
                seen.append("open")
                signal.raise_signal(signal.SIGINT)
                seen.append("never")
        finally:
            signal.raise_signal(signal.SIGINT)  # what tidies up is held again
            seen.append("tidied")
    with pytest.raises(KeyboardInterrupt), hold:
        signal.raise_signal(signal.SIGINT)
        with hold.opened():  # what came before is not kept any longer
            seen.append("never")
    assert seen == ["inner", "outer", "open", "tidied"]


def test_a_handler_of_one_s_own_is_called_and_a_missing_one_left_alone() -> None:
    hold, came = Hold(), list[int]()
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with hold:
            signal.raise_signal(signal.SIGINT)
            assert not came
            with hold.opened():
                assert len(came) == 1
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                assert len(came) == 3  # it raises nothing, so the block stays open
        chosen = lambda number, _: came.append(-1)  # noqa: E731
        signal.signal(signal.SIGINT, lambda number, _: signal.signal(signal.SIGINT, chosen))
        with hold, hold.opened():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == chosen  # what a handler chose for the next time stays
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with hold:
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and len(came) == 3
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["turn", "wait"])
def test_an_interrupted_wait_leaves_the_queue(how: str) -> None:
    counter, inside, go = Counter(), Event(), Event()

    def occupy() -> None:
        with counter.turns.turn():
            inside.set()
            assert go.wait(LIMIT)

    def interrupt() -> None:
        wait_until(lambda: bool(counter.turns._queue if how == "turn" else counter.turns._waiters))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threads = start(occupy)
    assert inside.wait(LIMIT)
    threads += start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if how == "turn":
            with counter.turns.turn():
                raise AssertionError
        counter.until(5)
    assert not counter.turns._queue and not counter.turns._waiters
    go.set()
    join(threads)
    counter.until(5)
