"""An engine shared by threads: who is let in while a push waits for the requests that run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from saccade.engine.shared import SharedEngine


def test_a_request_waits_again_if_another_push_begins_before_its_turn() -> None:
    """Between the end of one push and the turn of who waited for it, the next push may have begun."""
    shared = SharedEngine(SimpleNamespace(device="cpu", allow_interrupts=lambda around: None))  # type: ignore[arg-type]
    drains = [1, 1, 0]  # pushes under way at first, after the first wait, and after the second
    seen: list[int] = []

    def wait(is_over: Callable[[], bool], *_: Any) -> None:
        drains.pop(0)
        shared._drains = drains[0]

    shared.turns.wait = wait  # type: ignore[method-assign]
    shared._drains = drains[0]
    shared.admit(lambda engine: seen.append(shared._drains))
    assert seen == [0]
