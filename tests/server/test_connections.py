"""Headers that come too slowly, on a first request and on a later one of the same connection; bodies that are too long."""

import asyncio
import errno
import json
import os
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from scripted_engine import ScriptedEngine, make_service, say_text

from saccade.server.app import make_app
from saccade.server.connections import count_descriptors, make_protocol, tell_exhaustion
from saccade.server.settings import ServeSettings

BODY = b'{"prompt": "a"}'
WHOLE = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n" + BODY
)


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, object]]:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.decode().lower().splitlines() if line.startswith("content-length:")]
    return int(head.split()[1]), json.loads(await reader.readexactly(int(lengths[0].partition(":")[2])))


@asynccontextmanager
async def listening(
    engine: ScriptedEngine,
    settings: ServeSettings | None = None,
    most: int = 100,
    servers: list[uvicorn.Server] | None = None,
) -> AsyncIterator[int]:
    """A server before an engine, for 20 seconds; its port."""
    app = make_app(make_service(engine, settings))
    config = uvicorn.Config(app, http=make_protocol(0.2, most), log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    if servers is not None:
        servers.append(server)
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    async with asyncio.timeout(20):
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        await task


def test_no_part_of_an_answer_waits_for_an_acknowledgement() -> None:
    """Each connection has TCP_NODELAY: with Nagle's algorithm a body comes 40 ms after its headers."""

    async def run() -> None:
        servers: list[uvicorn.Server] = []
        async with listening(ScriptedEngine(lambda tokens, params: say_text("Hi")), servers=servers) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(WHOLE)
            assert (await read_response(reader))[0] == 200
            (connection,) = servers[0].server_state.connections
            own = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(run())


def test_a_long_body_is_refused_with_an_answer_that_its_client_can_read() -> None:
    """A client reads when it has written all. If the connection were closed before, it would be reset, and the answer
    lost; 4 MB are more than the sockets hold."""

    async def run() -> None:
        engine = ScriptedEngine(lambda tokens, params: say_text("Hi"))
        body = json.dumps({"prompt": "a" * (4 << 20)}).encode()
        pieces = [body[i : i + 65536] for i in range(0, len(body), 65536)]
        chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
        kinds = ((b"content-length: %d" % len(body), pieces), (b"transfer-encoding: chunked", chunks))
        async with listening(engine, ServeSettings(max_body=1 << 16)) as port:
            for path, kind in (("/v1/completions", "invalid_request_error"), ("/v1/messages", "request_too_large")):
                for header, parts in kinds:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode()
                    writer.write(head + header + b"\r\n\r\n")
                    for part in parts:
                        writer.write(part)
                        await writer.drain()
                    status, told = await read_response(reader)
                    assert (status, told["error"]["type"]) == (413, kind)  # type: ignore[index]
                    assert "more than 65,536 bytes" in told["error"]["message"]  # type: ignore[index]
                    assert await reader.read() == b""

    asyncio.run(run())


def test_slow_headers_end_a_connection_and_others_go_on() -> None:
    async def run() -> None:
        engine = ScriptedEngine(lambda tokens, params: say_text("Hi"))
        async with listening(engine) as port:
            for first in (b"", WHOLE):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                if first:
                    writer.write(first)
                    assert (await read_response(reader))[0] == 200
                    await asyncio.sleep(0.3)  # an idle connection may wait for longer than headers may
                writer.write(WHOLE[:40])
                status, body = await read_response(reader)
                assert (status, body["error"]["type"]) == (408, "timeout_error")  # type: ignore[index]
                assert await reader.read() == b""  # and it is closed
            engine.pause = 0.5  # an answer may take longer than headers
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for part in (WHOLE[:60], WHOLE[60:]):
                writer.write(part)
                await asyncio.sleep(0.02)
            assert (await read_response(reader))[0] == 200

    asyncio.run(run())


def test_what_is_no_request_is_told_why() -> None:
    async def run() -> None:
        engine = ScriptedEngine(lambda tokens, params: say_text("Hi"))
        async with listening(engine) as port:

            async def ask(raw: bytes) -> tuple[int, str]:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(raw)
                await writer.drain()
                status, told = await read_response(reader)
                assert await reader.read() == b""
                return status, told["error"]["message"]  # type: ignore[index]

            head = b"GET /health HTTP/1.1\r\n"
            # More than the sockets hold: a client reads when it has written all.
            assert await ask(head + b"x: " + b"a" * (8 << 20)) == (431, "the headers of the request are too long")
            status, text = await ask(head + b"\r\n")
            assert status == 400 and "Host" in text
            packed = b"host: a\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\nconnection: close\r\n"
            status, text = await ask(b"POST /tokenize HTTP/1.1\r\ncontent-length: 2\r\n" + packed + b"\r\n{}")
            assert status == 415 and "Content-Encoding: expected none, found 'gzip'" in text

    asyncio.run(run())


def test_HEAD_is_GET_without_a_body() -> None:
    async def run() -> None:
        async with listening(ScriptedEngine(lambda tokens, params: say_text("Hi"))) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"HEAD /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            head = (await reader.read()).lower()
            assert head.startswith(b"http/1.1 200") and b"content-length: 16" in head and head.endswith(b"\r\n\r\n")

    asyncio.run(run())


def test_connections_beyond_the_most_are_refused_until_others_end() -> None:
    async def run() -> None:
        engine = ScriptedEngine(lambda tokens, params: say_text("Hi"))
        async with listening(engine, most=2) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            status, told = await read_response(reader)
            writer.write(WHOLE)  # which nobody takes any more
            assert status == 503 and "2 connections already" in told["error"]["message"]  # type: ignore[index]
            assert await reader.read() == b""
            for reader, writer in held:
                await reader.read()  # its headers did not come in time
                writer.close()
            assert not engine.prompts
            for _ in range(200):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(WHOLE)
                status = (await read_response(reader))[0]
                if status == 200:
                    break
                await asyncio.sleep(0.05)
            assert status == 200

    asyncio.run(run())


def test_a_want_of_descriptors_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio tells each connection that it cannot accept, thousands in a second."""
    said, others = list[str](), list[dict[str, object]]()
    handle = tell_exhaustion(said.append)
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(loop, "default_exception_handler", others.append)
    for number in (errno.EMFILE, errno.EMFILE, errno.EIO):
        handle(loop, {"message": "accept", "exception": OSError(number, os.strerror(number))})
    loop.close()
    assert len(said) == 1 and "Too many open files" in said[0] and len(others) == 1


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, hard, raised, most in (
        (1024, 4096, [4096], 4032),
        (100, 100, [], 36),
        (256, -1, [65536], 65472),
        (9, 9, [], 1),
    ):
        given = list[int]()
        monkeypatch.setattr(resource, "getrlimit", lambda kind, found=(soft, hard): found)
        monkeypatch.setattr(resource, "setrlimit", lambda kind, pair, given=given: given.append(pair[0]))
        assert (count_descriptors(), given) == (most, raised)
