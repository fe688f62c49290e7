"""Headers that come too slowly, on a first request and on a later one of the same connection."""

import asyncio
import json
import socket

import uvicorn
from scripted_engine import ScriptedEngine, make_service, say_text

from saccade.server.app import make_app
from saccade.server.connections import make_protocol

BODY = b'{"prompt": "a"}'
WHOLE = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n" + BODY
)


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, object]]:
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.decode().lower().splitlines() if line.startswith("content-length:")]
    return int(head.split()[1]), json.loads(await reader.readexactly(int(lengths[0].partition(":")[2])))


def test_slow_headers_end_a_connection_and_others_go_on() -> None:
    async def run() -> None:
        engine = ScriptedEngine(lambda tokens, params: say_text("Hi"))
        app = make_app(make_service(engine))
        config = uvicorn.Config(app, http=make_protocol(0.2), log_level="critical", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.01)
            port = listener.getsockname()[1]
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
            server.should_exit = True
            await task

    asyncio.run(run())
