"""What ends the engine's process, and what only ends requests."""

from types import SimpleNamespace
from typing import Any

import pytest

from saccade.engine.params import SamplingParams
from saccade.errors import MemoryRefusedError, RankError, RequestError
from saccade.server.engine.loop import EngineLoop
from saccade.server.engine.wire import Failed, Stepped, Submit, Taken


class Loop:
    """A loop over an engine that does what a test says."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.error: Exception | None = None
        scheduler = SimpleNamespace(
            running=[], waiting=[], pages=SimpleNamespace(count=9, free=8), preemptions=0, prefix_tally=None
        )
        engine = SimpleNamespace(scheduler=scheduler, tally=SimpleNamespace(drafted=[], accepted=[]))
        shared = SimpleNamespace(step=self.fail, admit=self.fail)
        llm: Any = SimpleNamespace(shared=shared, engine=engine)
        link: Any = SimpleNamespace(send=self.sent.append)
        self.loop = EngineLoop(llm, link)

    def fail(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error

    def step(self, *errors: Exception | None) -> None:
        for self.error in errors:
            self.loop._step()


BUG, MEMORY = RuntimeError("a bug"), MemoryRefusedError("too little memory")


def test_a_step_that_fails_is_not_the_end_unless_the_next_ones_fail_too() -> None:
    made = Loop()
    made.step(BUG, MEMORY, None, BUG, BUG)
    assert [type(message) for message in made.sent] == [Stepped] * 5
    with pytest.raises(RuntimeError):
        made.step(BUG)
    assert made.sent[-1] == Failed("RuntimeError: a bug")


@pytest.mark.parametrize("error", [RankError("rank 1 is gone"), RuntimeError("CUDA error: an illegal memory access")])
def test_a_lost_rank_or_device_is_the_end_at_once(error: Exception) -> None:
    made = Loop()
    with pytest.raises(type(error)):
        made.step(error)
    assert isinstance(made.sent[-1], Failed) and str(error) in made.sent[-1].text


def test_whatever_adding_a_prompt_raises_is_told() -> None:
    made = Loop()
    for made.error in (RequestError("too long"), BUG):
        made.loop._submit(Submit(5, [1], SamplingParams()))
    assert made.sent == [Taken(5, "too long"), Taken(5, "a bug of the engine: RuntimeError: a bug", is_bug=True)]
