"""The two ends of the socket between HTTP and the engine, each against a written other one."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from saccade.engine.params import SamplingParams
from saccade.errors import RequestError, SaccadeError
from saccade.server.engine import client as engine_client
from saccade.server.engine.answers import EngineDown
from saccade.server.engine.client import EngineClient
from saccade.server.engine.start import StartRefused, wait_until_ready
from saccade.server.engine.wire import (
    Cancel,
    Counts,
    Delta,
    Failed,
    Load,
    Ping,
    Pong,
    Ready,
    Refused,
    Stepped,
    Submit,
    Taken,
    pack,
    receive,
)

READY = Ready("", None, 100, 100, 4, (1,), 0, "loaded")
PROMPT = ([1, 2], SamplingParams())
Test = Callable[[EngineClient, "Peer"], Awaitable[None]]


class Peer:
    """The engine's end, in the hands of a test."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, *messages: Any) -> None:
        self.end.sendall(b"".join(map(pack, messages)))

    async def receive(self, kind: type) -> Any:
        """The next message of a kind; pings are passed over."""
        while not isinstance(message := await asyncio.to_thread(receive, self.end), kind):
            pass
        return message


def run(test: Test, timeout: float = 60.0) -> int | None:
    """A test with both ends, and a process that only sleeps; how that ended."""
    ours, theirs = socket.socketpair()
    with theirs, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:

        async def whole() -> None:
            client = EngineClient(process, ours, READY, timeout)
            await client.connect()
            async with asyncio.timeout(20):
                await test(client, Peer(theirs))

        try:
            asyncio.run(whole())
            return process.poll()
        finally:
            process.kill()


def test_answers_come_in_pieces_and_late_readers_miss_nothing() -> None:
    async def test(client: EngineClient, peer: Peer) -> None:
        task = asyncio.create_task(client.submit([PROMPT, PROMPT]))
        ids = [(await peer.receive(Submit)).id for _ in range(2)]
        peer.send(*map(Taken, ids))
        answers = await task
        assert client.unanswered == 2
        for i in range(3):
            rows = [(i, -1.0, [])]
            last = ("stop", None, Counts(2, 1, 1)) if i == 2 else (None, None, Counts())
            peer.send(Stepped([(ids[0], Delta([i], str(i), rows, *last))], Load(steps=i)))
        peer.send(Stepped([(ids[1], Delta([7], "x", None, "length"))], Load(running=1)))
        while client.unanswered:
            await asyncio.sleep(0.01)
        found = [each async for each in answers]
        whole = Delta([0, 1, 2], "012", [(i, -1.0, []) for i in range(3)], "stop", None, Counts(2, 1, 1))
        assert found == [(0, whole), (1, Delta([7], "x", None, "length"))] and client.load.running == 1

    run(test)


def test_one_refusal_refuses_all_and_a_closed_answer_is_cancelled() -> None:
    async def test(client: EngineClient, peer: Peer) -> None:
        task = asyncio.create_task(client.submit([PROMPT, PROMPT]))
        ids = [(await peer.receive(Submit)).id for _ in range(2)]
        peer.send(Taken(ids[0]), Taken(ids[1], "too long"))
        with pytest.raises(RequestError, match="too long"):
            await task
        assert (await peer.receive(Cancel)).ids == (ids[0],) and client.unanswered == 0
        task = asyncio.create_task(client.submit([PROMPT]))
        peer.send(Taken((await peer.receive(Submit)).id, "a bug of the engine", is_bug=True))
        with pytest.raises(SaccadeError, match="a bug") as error:
            await task
        assert not isinstance(error.value, RequestError)  # which would be the request's fault
        task = asyncio.create_task(client.submit([PROMPT]))
        peer.send(Taken((await peer.receive(Submit)).id))
        answers = await task
        answers.close()
        answers.close()
        assert len((await peer.receive(Cancel)).ids) == 1 and client.unanswered == 0

    run(test)


async def begin(client: EngineClient, peer: Peer) -> asyncio.Task[Any]:
    """A reader of an answer that has begun, and is told of nothing more."""
    task = asyncio.create_task(client.submit([PROMPT]))
    peer.send(Taken((await peer.receive(Submit)).id))
    answers = await task
    return asyncio.create_task(anext(answers))  # type: ignore[arg-type]


def test_failures_reach_everybody() -> None:
    async def fails(client: EngineClient, peer: Peer) -> None:
        reader = await begin(client, peer)
        waiting = asyncio.create_task(client.submit([PROMPT]))
        await peer.receive(Submit)
        peer.send(Failed("CUDA error"))
        for task, status in ((reader, 500), (waiting, 500), (client.submit([PROMPT]), 503)):
            with pytest.raises(EngineDown, match="CUDA error") as told:
                await task
            assert told.value.status == status
        assert client.failed.is_set() and client.unanswered == 0

    async def ends(client: EngineClient, peer: Peer) -> None:
        reader = await begin(client, peer)
        client.process.terminate()
        peer.end.shutdown(socket.SHUT_RDWR)
        with pytest.raises(EngineDown, match="by signal SIGTERM"):
            await reader

    async def hangs(client: EngineClient, peer: Peer) -> None:
        reader = await begin(client, peer)
        peer.send(Pong(61.0))
        with pytest.raises(EngineDown, match="not ended its step for 61 seconds"):
            await reader
        client.process.wait(10)

    run(fails)
    run(ends)
    assert run(hangs) == -signal.SIGKILL


def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "PING_PERIOD", 0.05)
    monkeypatch.setattr(engine_client, "SILENCE", 0.1)

    async def silent(client: EngineClient, peer: Peer) -> None:
        with pytest.raises(EngineDown, match="has not answered"):
            await client.submit([PROMPT])
        client.process.wait(10)

    assert run(silent) == -signal.SIGKILL


def test_a_stall_of_our_own_is_not_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that was judged for minutes had the server kill its engine, which had answered all the time."""
    monkeypatch.setattr(engine_client, "PING_PERIOD", 0.05)
    monkeypatch.setattr(engine_client, "SILENCE", 0.2)

    async def stall(client: EngineClient, peer: Peer) -> None:
        async def answer() -> None:
            while True:
                await peer.receive(Ping)
                peer.send(Pong(0.0))

        answering = asyncio.create_task(answer())
        await asyncio.sleep(0.1)
        for _ in range(3):
            time.sleep(0.4)  # nothing runs on the event loop
            await asyncio.sleep(0.1)
        failure = client.failure
        answering.cancel()
        peer.end.shutdown(socket.SHUT_RDWR)  # which ends its thread
        assert failure is None

    run(stall)


def test_a_start_that_is_refused_or_killed() -> None:
    for message, code, text in (
        (Refused("no such model", 2), 2, "no such model"),
        (None, 70, "with code 3 while it loaded"),
    ):
        ours, theirs = socket.socketpair()
        with ours, subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as process:
            with theirs:
                if message is not None:
                    theirs.sendall(pack(message))
            with pytest.raises(StartRefused, match=text) as error:
                wait_until_ready(process, ours, print, print)
            assert error.value.code == code
